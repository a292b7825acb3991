"""Time of the expert-parallel all-to-all (dispatch and combine), by CUDA events read where the device idles anyway."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from src.distributed.mesh import Mesh
from src.models.moe.moe import MoE


def watch(model: nn.Module, mesh: Mesh) -> None:
    """After FSDP, whose own hooks then stay outside of what is timed; where tokens travel between ranks at all."""
    for moe in model.modules() if mesh.degrees.expert > 1 else ():
        if isinstance(moe, MoE):
            moe.stopwatch = DispatchTimer(moe, mesh.whole.device_type)


class DispatchTimer:
    """Times dispatch and combine of one MoE layer's last forward pass, or of its recomputation."""

    def __init__(self, moe: MoE, device_type: str) -> None:
        self._cuda = device_type == "cuda"
        self._marks: dict[str, Any] = {}  # events, or seconds
        moe.dispatcher.register_forward_pre_hook(self._at("leave"), prepend=True)
        moe.experts.register_forward_pre_hook(self._at("arrive"), prepend=True)
        moe.experts.register_forward_hook(self._at("return"))
        moe.dispatcher.register_forward_hook(self._at("home"))

    def milliseconds(self) -> tuple[float, float]:
        """From the choice of experts to rows before them, and from their results to the sum of each token's. What runs
        meanwhile, such as the shared experts, is not taken off.
        """
        return self._between("leave", "arrive"), self._between("return", "home")

    def _at(self, place: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            if self._cuda:
                self._marks.setdefault(place, torch.cuda.Event(enable_timing=True)).record()
            else:
                self._marks[place] = time.perf_counter()

        return mark

    def _between(self, first: str, second: str) -> float:
        if second not in self._marks:
            return 0.0
        began, ended = self._marks[first], self._marks[second]
        return float(began.elapsed_time(ended) if self._cuda else 1e3 * (ended - began))
