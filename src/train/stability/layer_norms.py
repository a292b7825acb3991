"""Norms of each layer's gradients, updates and hidden states, on the steps that are logged, in one collective.

Other steps cost nothing. A step that is logged reads gradients once more, holds a copy of this rank's weights while the
optimizer runs, and squares the result of each block.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from src.distributed.collectives import world_sum
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.model_stages import ModelStages
from src.optim.elementwise import local
from src.train.stability.attention_logits import AttentionLogits

GRADIENT, UPDATE, HIDDEN, ELEMENTS = range(4)  # columns: sums of squares, and how many squares are of hidden states


class LayerNorms:
    """`wanted` before a step makes it measured; `values` afterwards reports it, and the next is not."""

    def __init__(
        self,
        network: ModelStages,
        optimizer: Optimizer,
        gradients: Gradients,
        logits: AttentionLogits | None = None,
    ) -> None:
        """`logits`: where they can be looked at, of this object alone."""
        self._logits = logits
        self._config = config = network.stages[0].config
        self._wanted = False
        self._names = [f"layer_{layer:02}" for layer in range(config.n_layers)]
        self._names += [*(f"mtp_{depth:02}" for depth in range(config.prediction_depths)), "embedding", "head"]
        self._gradients, self._device = gradients, network.device
        row_of = {parameter: self._row(name) for name, parameter in network.named_parameters()}
        self._rows = torch.tensor([row_of[each] for each in gradients.parameters], device=network.device)
        self._table = torch.zeros(len(self._names), 4, dtype=torch.float64, device=network.device)
        self._before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._when_wanted(self._before_update))
        optimizer.register_step_post_hook(self._when_wanted(self._after_update))
        for part in network.stages:
            for number, block in part.numbered_blocks().items():
                block.register_forward_hook(partial(self._after_block, number))

    @property
    def wanted(self) -> bool:
        """Of the step that comes."""
        return self._wanted

    @wanted.setter
    def wanted(self, wanted: bool) -> None:
        self._wanted = wanted
        if self._logits is not None:
            self._logits.wanted = wanted

    def values(self) -> dict[str, float]:
        """Collective; waits for the device. By name: `norms/layer_07/gradient`, before clipping, and `.../update`, both
        Frobenius norms, and `.../hidden`, the root mean square of what the block hands on; with
        logits `.../attention_logit`, the largest. Modules of multi-token
        prediction are `mtp_00` and so on.
        """
        table = world_sum(self._table.clone())
        self._table.zero_()
        self.wanted = False
        table[:, HIDDEN] /= table[:, ELEMENTS].clamp(min=1.0)
        found: dict[str, float] = {}
        for name, (gradient, update, hidden, elements) in zip(self._names, table.sqrt().tolist(), strict=True):
            found |= {f"norms/{name}/gradient": gradient, f"norms/{name}/update": update}
            found |= {f"norms/{name}/hidden": hidden} if elements else {}
        return found | self._largest_logits()

    def _largest_logits(self) -> dict[str, float]:
        """Collective."""
        if self._logits is None:
            return {}
        largest = self._logits.reduce().amax(dim=1).tolist()
        named = zip(self._names, largest, strict=False)
        return {f"norms/{name}/attention_logit": value for name, value in named if isfinite(value)}

    def _row(self, name: str) -> int:
        if (number := self._config.block_number(name)) is not None:
            return number
        return self._names.index("embedding" if name.startswith("tok_embeddings.") else "head")

    def _when_wanted(self, act: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.wanted:
                act()

        return hook

    @torch.no_grad()
    def _before_update(self) -> None:
        self._table[:, :HIDDEN].zero_()  # a step that replica groups did not commit is taken again
        self._add(GRADIENT, self._gradients.local())
        self._before = [local(each).detach().clone() for each in self._gradients.parameters]

    @torch.no_grad()
    def _after_update(self) -> None:
        before, self._before = self._before, []
        weights = (local(each) for each in self._gradients.parameters)
        self._add(UPDATE, [now.float() - old.float() for now, old in zip(weights, before, strict=True)])

    def _add(self, column: int, shards: Sequence[Tensor]) -> None:
        squares = torch.stack(torch._foreach_norm(list(shards), 2, dtype=torch.float32)).square()
        shares = (squares * self._gradients.shares).to(self._device, torch.float64)
        self._table[:, column].index_add_(0, self._rows, shares)

    @torch.no_grad()
    def _after_block(self, layer: int, block: nn.Module, inputs: Any, result: tuple[Tensor, Any]) -> None:
        """What is computed again for the backward counts twice, above and below the line alike."""
        if self.wanted and block.training:
            hidden = local(result[0].detach())
            self._table[layer, HIDDEN] += torch.linalg.vector_norm(hidden, dtype=torch.float32).square()
            self._table[layer, ELEMENTS] += hidden.numel()
