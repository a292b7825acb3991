"""Muon for matrices (arXiv 2502.16982): a momentum, orthogonalised. AdamW for embedding, head, norms and routers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from src.config.base import Config
from src.config.bounds import Beta, Count, Epsilon, LearningRate, Scale, WeightDecay
from src.optim.adamw import own_kernel
from src.optim.base import Heads, Optimizer, Reads, StateDtype, StateTensor, bfloat16_problem
from src.optim.owners import working_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn

    from src.optim.owners import Owners

Part = Literal["matrices", "embedding", "head", "router", "norms"]


class AdamWPart(Config):
    """Learning rate and decay of one kind of parameters that AdamW updates."""

    lr: LearningRate | None
    """Peak learning rate; null: that of the matrices."""
    weight_decay: WeightDecay | None
    """Decoupled weight decay; null: that of the matrices, where it acts at all."""


class Muon(Optimizer):
    """Each step of a matrix is lr * update_rms * sqrt(its longer side) * U V^T, where U S V^T is its momentum's SVD.

    Its root mean square is then about lr * update_rms, AdamW's: one lr does for both. Of routed experts each is a
    matrix of its own. Matrices may be sharded in any way: src/distributed/matrix_owners.py.
    """

    reads: ClassVar[Reads] = "matrices"

    momentum: Beta
    """Decay of the momentum of matrices, Nesterov's."""
    newton_schulz_steps: Count
    """Steps of Newton-Schulz, which makes a matrix nearly orthogonal."""
    update_rms: Scale
    """Root mean square of an update of a matrix, in learning rates."""
    per_head: bool
    """True: of attention each head is orthogonalised by itself; false: its matrices as wholes."""
    row_beta: Beta | None
    """Decay of the second moment of each row, by whose root rows are divided (NorMuon); null: Muon."""
    adamw_beta1: Beta
    """Decay of AdamW's first moment."""
    adamw_beta2: Beta
    """Decay of AdamW's second moment."""
    eps: Epsilon
    """Added to the roots of second moments."""
    moments: StateDtype
    """Dtype of momentum and AdamW's moments; bfloat16: 2 instead of 4 bytes of a matrix's element."""
    embedding: AdamWPart
    """Learning rate and decay of the token embedding, by AdamW."""
    head: AdamWPart
    """The same of the head, where it is not the embedding."""
    router: AdamWPart
    """The same of the routers of experts."""
    norms: AdamWPart
    """The same of norms."""

    @model_validator(mode="after")
    def _bfloat16_moments_can_work(self) -> "Muon":
        if self.moments == "bfloat16" and (problem := self._bfloat16_problem()) is not None:
            raise ValueError(problem)
        return self

    def _bfloat16_problem(self) -> str | None:
        betas = {"momentum": self.momentum, "adamw_beta1": self.adamw_beta1, "adamw_beta2": self.adamw_beta2}
        return bfloat16_problem(**betas)

    def state(self, name: str, shape: Sequence[int]) -> Mapping[str, StateTensor]:
        same = StateTensor(self.moments, tuple(shape))
        if part_of(name, len(shape)) != "matrices":
            return {"exp_avg": same, "exp_avg_sq": same}
        if self.row_beta is None:
            return {"momentum": same}
        return {"momentum": same, "row_moment": StateTensor("float32", (*shape[:-1], 1))}

    def smaller_state(self) -> tuple[str, Self] | None:
        if self.moments == "bfloat16" or self._bfloat16_problem() is not None:
            return None
        return "optim.moments=bfloat16", self.model_copy(update={"moments": "bfloat16"})

    def problems(self, *, storage: str, row_shards: int, tensor: int) -> list[str]:
        return []  # owners get whole matrices, however they are cut

    def working_bytes(self, shapes: Mapping[str, Sequence[int]], *, ranks: int, copies: int) -> int:
        matrices = {name: shape for name, shape in shapes.items() if part_of(name, len(shape)) == "matrices"}
        return working_bytes(matrices, ranks=ranks, copies=copies)

    def learning_rate(self, name: str, parameter: "nn.Parameter") -> float:
        own = self._own(name, parameter)
        return self.lr if own is None or own.lr is None else own.lr

    def decay(self, name: str, parameter: "nn.Parameter") -> float:
        own = self._own(name, parameter)
        return super().decay(name, parameter) if own is None or own.weight_decay is None else own.weight_decay

    def options(self, name: str, parameter: "nn.Parameter", heads: Mapping[str, Heads]) -> dict[str, Any]:
        matrix = part_of(name, parameter.ndim) == "matrices"
        return {"matrices": matrix, "heads": heads.get(name) if matrix and self.per_head else None}

    def orthogonal(self, name: str, shape: tuple[int, ...], heads: Mapping[str, Heads]) -> tuple[int, int] | None:
        if part_of(name, len(shape)) != "matrices":
            return None
        rows, columns = shape[-2:]
        if not self.per_head or name not in heads:
            return rows, columns
        count, axis = heads[name]
        return (rows // count, columns) if axis == 0 else (rows, columns // count)

    def _own(self, name: str, parameter: "nn.Parameter") -> AdamWPart | None:
        part = part_of(name, parameter.ndim)
        own: AdamWPart | None = None if part == "matrices" else getattr(self, part)
        return own

    def from_groups(
        self, groups: list[dict[str, Any]], device: "torch.device", owners: "Owners | None"
    ) -> "torch.optim.Optimizer":
        from src.optim.matrices import MatrixOptimizer, MatrixRule

        rule = MatrixRule(self.momentum, self.newton_schulz_steps, self.update_rms, self.row_beta, self.eps)
        return MatrixOptimizer(groups, rule, (self.adamw_beta1, self.adamw_beta2), device, owners, own_kernel(groups))


def part_of(name: str, axes: int) -> Part:
    """Which rule a parameter of this name, with so many axes, is updated by."""
    words = name.split(".")
    if "tok_embeddings" in words:
        return "embedding"
    if "output" in words:
        return "head"
    if axes < 2:
        return "norms"
    return "router" if "gate" in words else "matrices"
