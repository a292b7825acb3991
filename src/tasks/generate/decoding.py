"""Text after prompts, a token at a time, under any layout; every rank ends up with all of it."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from src.distributed.collectives import any_rank
from src.distributed.init_weights import seed_of
from src.distributed.model_stages import ModelStages
from src.models.base import pass_multiple
from src.models.cache import Cache, attending
from src.tasks.generate.graph import NextToken, Told, has_graph
from src.tasks.generate.sampling import SamplingParams, sample

# A pass over prompts brings this many tokens of all rows at once: at 128,256 words their logits are 0.5 GiB in bf16.
TOKENS_AT_ONCE = 2048


def generate(
    network: ModelStages,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    rule: SamplingParams,
    seed: int,
    ends: Collection[int],
    batch: int,
) -> list[list[int]]:
    """Continue each prompt by at most `count` ids, without the one of `ends` that stops it. Collective, with equal
    arguments.

    `batch`: prompts at once on each data rank. Prompt number i draws from a generator of (seed, i), so neither the
    layout nor other prompts change what is drawn.
    """
    longest = network.stages[0].config.max_seq_len
    assert all(0 < len(prompt) <= longest - count for prompt in prompts), "the task refuses longer prompts"
    together = batch * network.mesh.data_ranks
    mine: dict[int, list[int]] = {}
    with ExitStack() as stack:
        stack.enter_context(network.inference())
        # Each pass has another length: a graph for each would cost more than it saves.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for first in range(0, len(prompts), together):
            numbers = range(first, min(first + together, len(prompts)))
            mine |= DecodingGroup(network, {i: prompts[i] for i in numbers}, count, seed).write(rule, ends)
    everywhere: list[dict[int, list[int]]] = [{}] * network.mesh.world
    dist.all_gather_object(everywhere, mine)
    merged = {number: ids for part in everywhere for number, ids in part.items()}
    return [merged[number] for number in range(len(prompts))]


class DecodingGroup:
    """Prompts decoded together, divided over data ranks. A rank without prompts repeats another's, so collectives
    match.
    """

    def __init__(self, network: ModelStages, prompts: dict[int, Sequence[int]], count: int, seed: int) -> None:
        mesh, config = network.mesh, network.stages[0].config
        share = -(-len(prompts) // mesh.data_ranks)
        numbers = sorted(prompts)
        self.numbers = numbers[mesh.data_rank * share : (mesh.data_rank + 1) * share]
        rows = self.numbers or numbers[:1]
        # All ranks take passes of the same length: those of one data rank share matrices with those of others.
        self.width = max(len(prompt) for prompt in prompts.values())
        self.multiple = pass_multiple(mesh.degrees)
        padding = [self.width - len(prompts[number]) for number in rows]
        self.tokens = torch.tensor([[0] * gap + list(prompts[i]) for i, gap in zip(rows, padding, strict=True)])
        self.network, self.count = network, count
        self.cache = Cache(config, padding, self.width + count + self.multiple, network.device)
        self.generators = [torch.Generator().manual_seed(seed_of(seed, f"prompt {number}")) for number in rows]

    def write(self, rule: SamplingParams, ends: Collection[int]) -> dict[int, list[int]]:
        """Decode; returns the new ids of this rank's prompts, by prompt number. Collective."""
        texts: dict[int, list[int]] = {number: [] for number in self.numbers}
        writing = set(self.numbers)
        with ExitStack() as stack:
            for part in self.network.stages:
                stack.enter_context(attending(part, self.cache))
            for written, ids in enumerate(self._ids(rule), 1):
                for number, chosen in zip(self.numbers, ids, strict=False):
                    if number in writing and chosen not in ends:
                        texts[number].append(chosen)
                    else:
                        writing.discard(number)
                if written == self.count or not self._anyone(bool(writing)):
                    break
        return texts

    def _ids(self, rule: SamplingParams) -> Iterator[list[int]]:
        """The next id of every row, `count` times."""
        ids = self._sample(self.read(self.tokens), rule)
        if not has_graph(self.network):
            for _ in range(self.count - 1):
                yield ids.tolist()
                ids = self._sample(self.read(ids.unsqueeze(1)), rule)
        else:
            step = NextToken(self.network, self.cache)
            for _ in range(self.count - 1):
                told = Told(ids)
                ids = self._sample(step(ids.unsqueeze(1)), rule)  # the GPU need not wait until somebody has looked
                yield told.ids()
        yield ids.tolist()

    def _sample(self, logits: Tensor, rule: SamplingParams) -> Tensor:
        uniforms = self._uniforms() if rule.temperature else torch.empty(0)
        return sample(logits, rule, uniforms.to(logits.device))

    def _anyone(self, writing: bool) -> bool:
        """Whether a row of any rank is not at its end."""
        return writing if self.network.mesh.world == 1 else any_rank(writing, self.network.device)

    def _uniforms(self) -> Tensor:
        """One number for each row."""
        return torch.stack([torch.rand((), dtype=torch.float64, generator=one) for one in self.generators])

    def read(self, tokens: Tensor) -> Tensor:
        """tokens (rows, length) join the cache -> logits (rows, vocabulary) after the last of them."""
        at_once = max(TOKENS_AT_ONCE // len(tokens) // self.multiple, 1) * self.multiple
        for piece in tokens.to(self.network.device).split(at_once, dim=1):
            length = piece.shape[1]
            if length % self.multiple:
                piece = F.pad(piece, (0, -length % self.multiple))
            positions, mask = self.cache.positions(piece.shape[1]), self.cache.mask(piece.shape[1])
            logits = self.network.logits(piece, length - 1, positions, mask)
            self.cache.add(length)
        return logits
