"""One rank of any layout, really built, on this CPU: no memory for its tensors and no other rank are needed.

A process group that only pretends lets a single process be rank r of thousands; tensors on the meta device have shapes
and no storage. What is counted is what the real rank would hold, and the plan's formula has to agree.
"""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.table import Table

from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline.stages import module_of, owned, split
from src.distributed.precision.config import BYTES
from src.planning.advice import told
from src.planning.memory import local_state_bytes
from src.run import Run

if TYPE_CHECKING:
    import torch

AGREEMENT = 0.01  # relative
PARTS = ("parameters", "gradients", "optimizer")


@dataclass(frozen=True)
class RehearsedBytes:
    """Of one rank, at rest between two steps; gradients as they are at the update."""

    parameters: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Rehearsal:
    """A rank's real model beside the plan's formula."""

    rank: int
    stages: tuple[int, ...]
    layers: int
    built: RehearsedBytes
    planned: RehearsedBytes
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the plan's JSON."""
        return asdict(self) | {"problems": self.problems}

    @property
    def problems(self) -> list[str]:
        """Where the two differ by more than 1 %."""
        pairs = {part: (getattr(self.built, part), getattr(self.planned, part)) for part in PARTS}
        return [
            f"rank {self.rank} holds {built:,} bytes of {part}, the plan says {planned:,}: "
            f"{built / planned - 1:+.2%} is beyond {AGREEMENT:.0%}"
            for part, (built, planned) in pairs.items()
            if abs(built - planned) > AGREEMENT * planned
        ]


def rehearse(run: Run, ranks: Iterable[int] | None) -> list[Rehearsal]:
    """Build these ranks, each in a process of its own; None: the first rank of the first, middle and last stage."""
    chosen = default_ranks(run.parallel) if ranks is None else list(ranks)
    # spawn: a process group can be made once in a process, and a fork would inherit torch's threads.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(build, [run] * len(chosen), chosen))


def default_ranks(degrees: ParallelDims) -> list[int]:
    """Pipeline is the outermost axis: its ranks are blocks of equal length."""
    each = degrees.world // degrees.pipeline
    stages = dict.fromkeys((0, degrees.pipeline // 2, degrees.pipeline - 1))
    return [stage * each for stage in stages]


def build(run: Run, rank: int) -> Rehearsal:
    """In a process without a process group, which it gets."""
    begin = monotonic()
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from src.distributed.mesh import Mesh
    from src.train.setup import build_stages, owners_of

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=run.parallel.world)
    mesh = Mesh(run.parallel, "cpu")
    stages = build_stages(run, mesh)
    named = [pair for part in stages.values() for pair in part.named_parameters()]
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    device = torch.device("cpu")
    optimizer = run.optim.build(named, device, owners_of(run, mesh, device))
    kept = [each for state in optimizer.state.values() for name, each in state.items() if name != "step"]
    built = RehearsedBytes(
        parameters=_bytes(parameter for _, parameter in named),
        gradients=_bytes(parameter.grad for _, parameter in named if parameter.grad is not None),
        optimizer=_bytes(kept),
    )
    layers = sum(len(part.layers) for part in stages.values())
    stage_rank = mesh.pipeline.get_local_rank()
    dist.destroy_process_group()
    return Rehearsal(rank, tuple(stages), layers, built, planned(run, stage_rank), monotonic() - begin)


def _bytes(tensors: "Iterable[torch.Tensor]") -> int:
    from torch.distributed.tensor import DTensor

    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def planned(run: Run, stage_rank: int) -> RehearsedBytes:
    """What the plan counts for the fullest rank of this pipeline rank's stages."""
    degrees = run.parallel
    stages = split(degrees, run.model.n_layers)
    mine = owned(stage_rank, degrees.pipeline, len(stages), degrees.pipeline_schedule) if len(stages) > 1 else (0,)
    modules = {module for stage in mine for module in stages[stage]}
    weights = [weight for weight in run.model.weights() if module_of(weight.name) in modules]
    stored = sum(weight.local_elements(degrees) for weight in weights) * BYTES[run.precision.storage]
    state = sum(local_state_bytes(run.optim, weight, degrees) for weight in weights)
    return RehearsedBytes(parameters=stored, gradients=stored, optimizer=state)


def render(rehearsals: list[Rehearsal]) -> Table:
    """For a terminal."""
    table = Table(title="ranks that were built, beside the plan", title_justify="left")
    for heading in ("rank", "stages", "layers", "weights", "gradients", "optimizer", "of plan", "s"):
        table.add_column(heading, justify="right")  # 79 columns in all
    for each in rehearsals:
        shares = [getattr(each.built, part) / getattr(each.planned, part) for part in PARTS]
        share = max(shares, key=lambda share: abs(share - 1))
        sizes = (f"{told(getattr(each.built, part))}" for part in PARTS)
        stages = " ".join(map(str, each.stages))
        table.add_row(str(each.rank), stages, str(each.layers), *sizes, f"{share:.2%}", f"{each.seconds:.1f}")
    return table
