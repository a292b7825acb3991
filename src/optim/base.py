"""`Optimizer`, the interface of the section `optim`: builds a torch optimizer, and knows the bytes of its state."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from src.config.base import Config
from src.config.bounds import GradientNorm, LearningRate, WeightDecay

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from src.optim.owners import Owners

StateDtype = Literal["float32", "bfloat16"]
# What an update of one number reads besides its own gradient and state.
Reads = Literal["elements", "rows", "matrices"]

Heads = tuple[int, int]  # how many, and which axis of the matrix they cut: 0 its rows, 1 its columns

STATE_BYTES: dict[StateDtype, int] = {"float32": 4, "bfloat16": 2}
# bfloat16 keeps 8 bits: a value that shrinks by less than 2**-8 in a step can round back to itself and never fall.
SLOWEST_BFLOAT16_BETA = 1.0 - 2.0**-8


class StateTensor(NamedTuple):
    """One tensor that is kept for a parameter, and sharded as the parameter is."""

    dtype: StateDtype
    shape: tuple[int, ...]  # the parameter's, or that with 1 in the place of its last: a number for each row

    @property
    def bytes(self) -> int:
        return STATE_BYTES[self.dtype] * prod(self.shape)


class Optimizer(Config):
    """Base of every class of the group optim. A subclass answers `state` and `from_groups`; the rest has defaults.

    lr: peak learning rate; the schedule multiplies it, and that of each parameter alike (`learning_rate`).
    weight_decay: decoupled: each step scales the weights by 1 - lr * weight_decay.
    decay_norms_and_embeddings: false: 1-D parameters and the token embedding are not decayed.
    max_norm: the global gradient norm that gradients are clipped to; null: never.
    """

    reads: ClassVar[Reads] = "elements"

    lr: LearningRate
    """Peak learning rate; the schedule multiplies it."""
    weight_decay: WeightDecay
    """Decoupled weight decay; each step scales the weights by 1 - lr * weight_decay."""
    decay_norms_and_embeddings: bool
    """False: 1-D parameters and the token embedding are not decayed."""
    max_norm: GradientNorm | None
    """Global gradient norm that gradients are clipped to; null: never clip."""

    @abstractmethod
    def state(self, name: str, shape: Sequence[int]) -> Mapping[str, StateTensor]:
        """By name, each tensor that is kept for the parameter of this name and whole shape.

        Beside them each parameter has `step`, a float32 scalar: the updates so far, without those that were skipped.
        """

    @abstractmethod
    def from_groups(
        self, groups: list[dict[str, Any]], device: "torch.device", owners: "Owners | None"
    ) -> "torch.optim.Optimizer":
        """The torch optimizer of these parameter groups; each has lr and weight_decay of its own.

        `owners`: where matrices are sharded, what brings each of them together on one rank.

        `step()` reads two attributes of it, 0-dim float32 tensors on the device, and the host never waits to know:
        where `found_inf` is 1 weights and state stay as they are; gradients are divided by `grad_scale` as they are
        read, which is how they are clipped. torch's fused optimizers and `Elementwise` do both.
        """

    def learning_rate(self, name: str, parameter: "nn.Parameter") -> float:
        """Peak learning rate of one parameter."""
        return self.lr

    def decay(self, name: str, parameter: "nn.Parameter") -> float:
        """Weight decay of one parameter."""
        decays = self.decay_norms_and_embeddings or (parameter.ndim > 1 and "tok_embeddings" not in name.split("."))
        return self.weight_decay if decays else 0.0

    def options(self, name: str, parameter: "nn.Parameter", heads: Mapping[str, Heads]) -> dict[str, Any]:
        """What else the group of a parameter has, hashable; `heads` as in `build`."""
        return {}

    def orthogonal(self, name: str, shape: tuple[int, ...], heads: Mapping[str, Heads]) -> tuple[int, int] | None:
        """Rows and columns of the matrices in a parameter that an update makes orthogonal and multiplies by the root of
        the longer side; None: every number moves by about the learning rate. `heads` as in `build`.
        """
        return None

    def smaller_state(self) -> tuple[str, Self] | None:
        """The command-line words of a variant with fewer bytes of state, and that variant; None: there is none."""
        return None

    def problems(self, *, storage: str, row_shards: int, tensor: int) -> list[str]:
        """Why it cannot update weights of type `storage` that FSDP cuts into `row_shards` along their first axis.

        `tensor`: into how many parts tensor parallelism cuts them, along either axis.
        """
        found = []
        if self.reads != "elements" and tensor > 1:
            found.append(
                f"optim: {type(self).__name__} reads whole {self.reads}, which parallel.tensor={tensor} cuts; "
                "at most parallel.tensor=1"
            )
        if self.reads == "matrices" and row_shards > 1:
            found.append(
                f"optim: {type(self).__name__} reads whole matrices, which FSDP cuts into {row_shards} shards; at most "
                "parallel.shard=1 and parallel.context=1 (parallel.replicate takes any number of ranks)"
            )
        return found

    def working_bytes(self, shapes: Mapping[str, Sequence[int]], *, ranks: int, copies: int) -> int:
        """Bytes on the fullest of `ranks` that an update needs for a while, beside gradients and state.

        `shapes`: of the whole parameters that these ranks hold between them, by name; `copies`: ranks that hold each
        shard.
        """
        return 0

    def build(
        self,
        named_parameters: "Iterable[tuple[str, nn.Parameter]]",
        device: "torch.device",
        owners: "Owners | None" = None,
        heads: Mapping[str, Heads] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> "torch.optim.Optimizer":
        """The optimizer of the parameters that ask for gradients, with zero state in place: a checkpoint loads into it.

        `owners`: as in `from_groups`. `heads`: of each matrix of attention, by name, the heads that cut its rows (0) or
        columns (1). `rates`: by name, what the learning rate is multiplied by; what a step decays stays as it is.
        Raises ConfigError where the device has no such optimizer.
        """
        from src.optim.state import materialise

        named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        optimizer = self.from_groups(self._groups(named, heads or {}, rates or {}), device, owners)
        materialise(optimizer, {parameter: self.state(name, parameter.shape) for name, parameter in named}, owners)
        return optimizer

    def _groups(
        self,
        named_parameters: "Sequence[tuple[str, nn.Parameter]]",
        heads: Mapping[str, Heads],
        rates: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """One group for each learning rate, decay and option, on each device mesh: torch's kernels take one."""
        groups: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        for name, parameter in named_parameters:
            mesh = getattr(parameter, "device_mesh", None)
            options = tuple(self.options(name, parameter, heads).items())
            rate = rates.get(name, 1.0)  # a step shrinks weights by lr * decay, whatever the factor
            key = (self.learning_rate(name, parameter) * rate, self.decay(name, parameter) / rate, options, mesh)
            groups.setdefault(key, []).append(parameter)
        return [
            {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay, **dict(options)}
            for (lr, decay, options, _), parameters in groups.items()
        ]


def skipped_update(optimizer: "torch.optim.Optimizer") -> "Tensor | None":
    """0-dim: above 0 where the last `step()` has left weights and state as they were; None: nobody has said."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found


def bfloat16_problem(**betas: float) -> str | None:
    """Which of these decay factors is too slow for a state in bfloat16."""
    for name, beta in betas.items():
        if beta > SLOWEST_BFLOAT16_BETA:
            return f"{name}={beta} never decays in moments=bfloat16; at most {SLOWEST_BFLOAT16_BETA} does"
    return None
