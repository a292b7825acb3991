"""float8 matrix products in the blocks, through torchao: forward and both gradients multiply e4m3 and e5m2 numbers.

Parameters, optimizer state and checkpoints stay in `precision.storage`. The embedding and the head are never converted.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import model_validator

from src.config.base import Config, Names
from src.errors import PlanError, divisors, some

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.distributed.parallel_dims import ParallelDims
    from src.models.decoder import Decoder

ROUTER = "router"  # routers choose experts in float32
MULTIPLE = 16  # the kernels want both sides of a matrix, as one rank holds it, to be multiples of this
NEEDED_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
HOPPER = (9, 0)  # has grouped products of float8
SPLITS_BACKWARD_SINCE = (
    2,
    13,
)  # torch; 2.11 fails at a product of torchao when it asks for the weight's gradient alone
# Weights of blocks by their names; what joins two vectors in front of a block stays wide, as in released weights.
IN_BLOCK = re.compile(r"layers\.\d+\.|mtp\.\d+\.block\.")
EXPERT_KERNELS = "prototype/moe_training/fp8_grouped_mm.py"
NO_GPU = "precision.float8: the CPU has no float8 products; pass precision.float8.emulate=true, or precision=bf16"


class Matrix(Protocol):
    """What the checks need of a parameter; src.models.accounting.Weight has it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def tensor_dim(self) -> int | None: ...


class Float8(Config):
    """float8 matrix products of the blocks. Routed experts, if `experts`, always use rowwise scales."""

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
    """Scales of a product; tensorwise: one a tensor; rowwise: one a row; rowwise_with_gw_hp: one a row, and gradients
    of the weights multiply in bfloat16.
    """
    exclude: Names
    """Matrices to leave in bfloat16, by whole parts of their names: wo, feed_forward, layers.0."""
    experts: bool
    """True: products of routed experts too, by rows, on Hopper; pays where an expert gets many tokens."""
    all_gather: bool
    """True: FSDP sends float8, half the traffic; one reduction a step brings the scales of all weights."""
    emulate: bool
    """True: bfloat16 products of rounded numbers, for machines without float8; eager only."""

    @model_validator(mode="after")
    def _one_scale_is_gathered(self) -> "Float8":
        if self.all_gather and self.recipe != "tensorwise":
            raise ValueError(f"all_gather=true with recipe={self.recipe}; only recipe=tensorwise gathers float8")
        return self

    @property
    def exchanged(self) -> bool:
        """Whether tensor parallel ranks send each other float8: with one scale a tensor, and where NCCL carries it."""
        return self.recipe == "tensorwise" and not self.emulate

    @property
    def keeps_float8(self) -> bool:
        """Whether a compiled product keeps no wide copy of its input: by rows, the gradient needs other scales."""
        return self.recipe == "tensorwise"

    def problems(
        self,
        weights: Iterable[Matrix],
        degrees: "ParallelDims",
        *,
        compiled: bool,
        gpu: bool,
        capability: tuple[int, int] | None = None,
    ) -> list[str]:
        """Why this recipe cannot run here: key, value, rule, remedy. `gpu`: whether ranks have one, as far as known."""
        weights = tuple(weights)
        found, names = [], _linears(weights)
        for entry in self.exclude:
            if not any(_within(entry, name) for name in names):
                there = ", ".join(sorted({_any_layer(name) for name in names}))
                found.append(
                    f"precision.float8.exclude: no matrix of a block has {entry} in its name; there are {there}"
                )
        if not found and not self._chosen(names, degrees.tensor):
            found.append(
                f"precision.float8: no matrix is left to convert; each side must be a multiple of {MULTIPLE} on a rank"
            )
        if self.recipe == "tensorwise" and degrees.tensor > 1 and any(len(weight.shape) == 3 for weight in weights):
            found.append(
                f"precision.float8.recipe=tensorwise scales a whole matrix, of which parallel.tensor={degrees.tensor} "
                "ranks of a model with routed experts hold parts without asking each other; pass "
                "precision=fp8_rowwise or parallel.tensor=1"
            )
        if self.experts:
            found += _expert_problems(weights, degrees, gpu=gpu and not self.emulate)
        if self.all_gather:
            found += self._gather_problems(names, degrees)
        if degrees.splits_backward and _torch() < SPLITS_BACKWARD_SINCE:
            found.append(
                f"precision.float8 with parallel.pipeline_schedule={degrees.pipeline_schedule} needs torch 2.13, and "
                f"this is {version('torch')}; pass precision=bf16 or parallel.pipeline_schedule=Interleaved1F1B"
            )
        if self.emulate and compiled:
            found.append("precision.float8.emulate=true is eager only; pass compile=off")
        if not self.emulate and not gpu:
            found.append(NO_GPU)
        if not self.emulate and gpu and capability is not None and capability < self.needed_capability:
            found.append(_too_old(capability, self.needed_capability))
        if find_spec("torchao") is None:
            found.append("precision.float8 needs the package torchao; pip install torchao==0.17.0, or precision=bf16")
        return found

    def _gather_problems(self, names: dict[str, Matrix], degrees: "ParallelDims") -> list[str]:
        """Why FSDP cannot send float8: uneven shards are padded where they are wide, and sent as they are where not."""
        if degrees.fsdp == 1:
            return [
                f"precision.float8.all_gather=true gathers nothing: parallel.shard={degrees.shard}; "
                "pass precision.float8.all_gather=false, or a layout with shards"
            ]
        rows = {name: _local(names[name], degrees.tensor)[0] for name in self._chosen(names, degrees.tensor)}
        odd = sorted({_any_layer(name) for name, count in rows.items() if count % degrees.fsdp})
        if not odd:
            return []
        cut = f"parallel.shard={degrees.shard}" + (
            f" * parallel.context={degrees.context}" if degrees.context > 1 else ""
        )
        return [
            f"precision.float8.all_gather=true sends shards of equal size, and {cut} does not divide the rows of "
            f"{some(odd)} ({divisors(gcd(*rows.values()), degrees.fsdp)}); or pass precision.float8.all_gather=false"
        ]

    @property
    def token_multiple(self) -> int:
        """What the tokens of a forward on a rank must be a multiple of: a weight's gradient sums over them."""
        return 1 if self.recipe == "rowwise_with_gw_hp" else MULTIPLE

    @property
    def needed_capability(self) -> tuple[int, int]:
        """CUDA's compute capability of the oldest GPU that has these products."""
        return HOPPER if self.experts else NEEDED_CAPABILITY

    def left_out(self, weights: Iterable[Matrix], tensor: int) -> list[str]:
        """Lines for people: the matrices that stay in the compute dtype though nobody asked for it."""
        names = _linears(weights)
        wanted = {name for name in names if not any(_within(entry, name) for entry in self.exclude)}
        odd = sorted(wanted - self._chosen(names, tensor))
        shapes = {_any_layer(name): _local(names[name], tensor) for name in odd}
        return [
            f"precision.float8 leaves {name} as it is: {rows} x {columns} on a rank, not multiples of {MULTIPLE}"
            for name, (rows, columns) in shapes.items()
        ]

    def _chosen(self, names: dict[str, Matrix], tensor: int) -> set[str]:
        """Of these linears, those that are converted."""
        return {name for name, weight in names.items() if self.converts(name, *_local(weight, tensor))}

    def converts(self, name: str, rows: int, columns: int) -> bool:
        """Whether a linear of a block is converted, by its name and both sides as one rank holds them."""
        kept = any(_within(entry, name) for entry in (ROUTER, *self.exclude))
        return not kept and rows % MULTIPLE == 0 and columns % MULTIPLE == 0

    def convert(self, model: "Decoder", tensor: int, device_type: str) -> None:
        """Replace the linear modules by float8 ones. In place, on the meta device, before any other change; names
        stay.
        """
        from torch import nn

        from src.models.moe.experts import Experts

        with _quiet():
            from torchao.float8.float8_linear import Float8Linear

        if not self.emulate:
            _require(device_type, self.needed_capability)
        config = self._torchao()
        chosen = self._chosen(_linears(model.config.weights()), tensor)
        for name, module in list(model.named_modules()):
            if name in chosen:
                assert isinstance(module, nn.Linear)
                model.set_submodule(name, Float8Linear.from_float(module, config=config))
        if self.experts:
            from src.distributed.precision import float8_experts

            with _quiet():
                product = float8_experts.emulated if self.emulate else float8_experts.kernels()
            for experts in (module for module in model.modules() if isinstance(module, Experts)):
                experts.product, experts.multiple = product, MULTIPLE

    def _torchao(self) -> Any:
        from dataclasses import replace

        from torchao.float8 import Float8LinearConfig

        config = Float8LinearConfig.from_recipe_name(self.recipe)
        return replace(config, enable_fsdp_float8_all_gather=self.all_gather, emulate=self.emulate)

    def after_update(self, model: "nn.Module") -> None:
        """Compute the scales of all weights with one reduction, after each optimizer step. Collective."""
        if self.all_gather:
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

            precompute_float8_dynamic_scale_for_fsdp(model)


def _torch() -> tuple[int, int]:
    """Its version, without importing it."""
    major, minor = version("torch").split(".")[:2]
    return int(major), int(minor)


def _expert_problems(weights: Iterable[Matrix], degrees: "ParallelDims", *, gpu: bool) -> list[str]:
    """Why grouped products cannot be float8. `gpu`: whether kernels will run, rather than their emulation."""
    experts = [weight for weight in weights if len(weight.shape) == 3]
    if not experts:
        return ["precision.float8.experts=true: this model has no routed experts; pass precision.float8.experts=false"]
    found = []
    for side in sorted({side for weight in experts for side in _expert_sides(weight, degrees.expert_tensor)}):
        if side % MULTIPLE:
            found.append(
                f"precision.float8.experts=true: experts have a side of {side} on a rank, which is no multiple of "
                f"{MULTIPLE}; pass precision.float8.experts=false, or a width that is"
            )
    package = find_spec("torchao")
    places = [] if package is None else package.submodule_search_locations or []
    if gpu and places and not any((Path(place) / EXPERT_KERNELS).exists() for place in places):
        found.append("precision.float8.experts=true: this torchao has no kernels for them; pip install torchao==0.17.0")
    return found


def _expert_sides(weight: Matrix, ranks: int) -> tuple[int, ...]:
    """Of one expert's matrix, as a rank holds it where `ranks` cut each."""
    cut = weight.tensor_dim
    return tuple(size // ranks if dim == cut else size for dim, size in enumerate(weight.shape) if dim > 0)


def plain(tensor: "Tensor") -> "Tensor":
    """The numbers of a weight that FSDP gathers in float8, without torchao's wrapper; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    held = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    inner: Tensor | None = getattr(held, "_tensor", None)
    if inner is None:
        return tensor
    if not isinstance(tensor, DTensor):
        return inner
    return DTensor.from_local(
        inner, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns on import of kernels of its own that this machine cannot load; float8 products are torch's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _require(device_type: str, needed: tuple[int, int]) -> None:
    import torch

    if device_type != "cuda":
        raise PlanError(NO_GPU)
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        raise PlanError(_too_old(capability, needed))


def _too_old(capability: tuple[int, int], needed: tuple[int, int]) -> str:
    here, least = (".".join(map(str, each)) for each in (capability, needed))
    return f"precision.float8: this GPU has compute capability {here}, this needs {least}; pass precision=bf16"


def _linears(weights: Iterable[Matrix]) -> dict[str, Matrix]:
    """The matrices of the blocks, by the name of their module."""
    matrices = (weight for weight in weights if len(weight.shape) == 2 and IN_BLOCK.match(weight.name))
    return {weight.name.removesuffix(".weight"): weight for weight in matrices if not _within(ROUTER, weight.name)}


def _local(weight: Matrix, tensor: int) -> tuple[int, int]:
    """Both sides as one tensor rank holds them."""
    rows, columns = weight.shape
    return (
        rows // tensor if weight.tensor_dim == 0 else rows,
        columns // tensor if weight.tensor_dim == 1 else columns,
    )


def _any_layer(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _within(entry: str, name: str) -> bool:
    """Whether `entry` is a run of whole parts of a dotted name: `wo`, `attention.wo`, `layers.1`."""
    return f".{entry}." in f".{name}."
