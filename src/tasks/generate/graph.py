"""One more token of every row on one GPU as a CUDA graph: Python launches some 1,000 kernels a token no more."""

import torch
from torch import Tensor

from src.distributed.model_stages import ModelStages
from src.models.cache import Cache


def has_graph(network: ModelStages) -> bool:
    """Whether a pass of one token can be captured: on one GPU, without a wait for the device.

    Grouped products of experts wait for it, but for bf16 on Hopper and later.
    """
    if network.device.type != "cuda" or network.mesh.world > 1:
        return False
    experts = [moe.experts for part in network.stages for moe in part.mixtures()]
    hopper = torch.cuda.get_device_capability(network.device) >= (9, 0)
    return all(hopper and each.multiple == 1 and each.w1.dtype == torch.bfloat16 for each in experts)


class NextToken:
    """tokens (rows, 1) join `cache`, which is fixed from here on -> logits (rows, vocabulary), until the next call.

    The first call launches its kernels one by one, as a capture needs it; all others replay the graph.
    """

    def __init__(self, network: ModelStages, cache: Cache) -> None:
        self.network, self.cache = network, cache
        self._stream = torch.cuda.Stream(network.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens = torch.zeros(len(cache.padding), 1, dtype=torch.int64, device=network.device)
        self._logits: Tensor | None = None
        cache.fix()

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        if self._logits is None:
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                self._logits = next_logits(self.network, self.cache, self._tokens)
            current.wait_stream(self._stream)
            return self._logits
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="relaxed"):
                self._logits = next_logits(self.network, self.cache, self._tokens)
        self._graph.replay()
        return self._logits


class Told:
    """Ids (rows) on their way from the GPU, behind which it may go on."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids.to("cpu", non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def ids(self) -> list[int]:
        """Waits for them, and for nothing that was launched later."""
        self._there.synchronize()
        return self._ids.tolist()


def next_logits(network: ModelStages, cache: Cache, tokens: Tensor) -> Tensor:
    """The pass itself, for a cache that is fixed."""
    logits = network.logits(tokens, 0, cache.positions(1), cache.mask(1))
    cache.add(1)
    return logits
