"""What each rank of task=verify does: rank 0 trains alone, all train together, rank 0 compares.

What could be wrong in both is not used twice: the single device trains in a plain loop with torch's own clipping, and
the layout's gradients are added up here, not by the train step.
"""

import gc
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from src.config.tree import identity, read
from src.data.batches import Batch
from src.distributed.collectives import world_sum
from src.distributed.init_weights import seed_of
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages, forward_loss
from src.distributed.process.rank_context import RankContext
from src.errors import VerdictError
from src.models.cross_entropy import IGNORED
from src.models.moe.moe import MoE
from src.planning.recompute_choice import resolve_auto_recompute
from src.run import Run
from src.storage.atomic_write import atomic_write
from src.tasks.verify.certificate import TOLERANCES, Certificate, Gradient, LayerRouting, Trace, compare
from src.tasks.verify.config import Verify
from src.train.setup import Training, build_training, join_ranks

CERTIFICATE_FILE = "certificate.json"
TABLE_COLUMNS = 160  # where the output is a file
DOCUMENT_TOKENS = 24  # mean length of the documents that a row is made of
MOST_IGNORED = 0.75  # of a row's labels: ranks must differ in what counts, or a mean of means would do
SECTIONS = ("model", "parallel", "precision", "recompute", "compile", "optim", "parametrization")


def verify(task: Verify, run: Run, folder: Path) -> bool:
    """Compare the layout with one device and write certificate.json. Collective. True when they agree; VerdictError
    otherwise.
    """
    ranks = join_ranks(run, folder)
    run = resolve_auto_recompute(run, folder)
    certificate = certify(task, run, ranks, {"config": identity(read(folder / "config.yaml"))})
    if ranks.rank == 0:
        atomic_write(folder / CERTIFICATE_FILE, json.dumps(certificate.to_dict(), indent=2) + "\n")
        terminal = Console(markup=False, emoji=False)
        if not terminal.is_terminal:
            terminal.width = TABLE_COLUMNS
        terminal.print(*certificate.tables(), sep="\n")
        terminal.print(certificate.tolerances.why, soft_wrap=not terminal.is_terminal)
        said = "FAILED" if certificate.failed else "passed"
        terminal.print(f"{said}: {folder / CERTIFICATE_FILE}", soft_wrap=True)
    ranks.leave()
    if certificate.failed:
        raise VerdictError(certificate.problem())
    return True


def certify(task: Verify, run: Run, ranks: RankContext, facts: dict[str, Any]) -> Certificate:
    """Train both and compare; the certificate is the same on every rank. Collective."""
    single = run.on_one_device()
    alone = Mesh(single.parallel, ranks.device.type, copies=ranks.world)
    reference = _train_alone(task, single, ranks, alone) if ranks.rank == 0 else None
    _release(ranks.device)
    layout = _train_together(task, run, ranks)
    tolerances = TOLERANCES[run.precision.compute if run.precision.float8 is None else "float8"]
    shared = [None if reference is None else compare(layout, reference, tolerances)]
    dist.broadcast_object_list(shared, src=0, device=torch.device("cpu"))
    assert shared[0] is not None, "rank 0 sends its own"
    return Certificate(facts | _facts(run, ranks), tolerances, shared[0])


def _facts(run: Run, ranks: RankContext) -> dict[str, Any]:
    cuda = ranks.device.type == "cuda"
    return {
        "layout": {axis: degree for axis, degree in run.parallel.axes.items() if degree > 1},
        "sections": {name: getattr(run, name).model_dump() for name in SECTIONS},
        "seed": run.seed,
        "world": ranks.world,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def rows(task: Verify, run: Run, rank: int, ranks: int) -> list[Batch]:
    """Micro-batches of a data rank. The same in each step, so that the loss falls and a wrong update shows in it."""
    count = task.global_batch // (task.micro_batch * ranks)
    starts = [(index * ranks + rank) * task.micro_batch for index in range(count)]
    return [_batch(task, run, range(start, start + task.micro_batch)) for start in starts]


def _batch(task: Verify, run: Run, samples: Sequence[int]) -> Batch:
    tokens, labels, starts = (
        torch.stack(stages) for stages in zip(*(_row(task, run, g) for g in samples), strict=True)
    )
    places = torch.arange(task.seq_len).expand_as(tokens)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    positions = places - first if run.model.within_documents else None
    documents = starts.cumsum(dim=1).int() if run.model.within_documents else None
    return Batch(tokens, labels, positions, documents, tuple(samples))


def _row(task: Verify, run: Run, sample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels, and where documents start, of one sample, whoever reads it."""
    generator = torch.Generator().manual_seed(seed_of(run.seed, f"sample {sample}"))
    window = torch.randint(run.model.vocab_size, (task.seq_len + 1,), generator=generator)
    ignored = int(torch.rand((), generator=generator) * MOST_IGNORED * task.seq_len)
    starts = torch.rand(task.seq_len, generator=generator) < 1 / DOCUMENT_TOKENS
    labels = window[1:].clone()
    labels[:ignored] = IGNORED
    return window[:-1], labels, starts


def _train_alone(task: Verify, run: Run, ranks: RankContext, mesh: Mesh) -> Trace:
    """Plain training on this rank's device; no other rank takes part."""
    training = build_training(run, ranks, skips=0, mesh=mesh)
    (model,), optimizer, weights = training.network.stages, training.state.optimizer, training.network.weights
    assert weights is not None, "nothing is gathered on one device"
    batches = rows(task, run, rank=0, ranks=1)
    tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    if task.router_z_loss:
        model.set_router_z_loss(torch.tensor(task.router_z_loss / tokens, device=ranks.device))
    optimizer.found_inf = torch.zeros((), device=ranks.device)  # type: ignore[attr-defined]
    losses, grad_norms, gradients, loads = [], [], {}, _Loads(training.network)
    for step in range(task.steps):
        losses.append(0.0)
        weights.before_backward(len(batches))
        with weights.in_place():
            for batch in batches:
                loss = forward_loss(model, batch, ranks.device) / tokens
                loss.backward()
                losses[-1] += loss.item()
        weights.after_backward(any_dtype=False)
        if step == 0:
            gradients = _read(_names(run), _measure(_names(run), model.named_parameters(), run.seed, ranks.device))
        grad_norms.append(_whole_norm(model))
        nn.utils.clip_grad_norm_(model.parameters(), run.optim.max_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        model.post_optimizer_step(lambda counts: counts, torch.ones((), device=ranks.device))
        loads.read()
    return Trace(losses, grad_norms, gradients, {name: [layer] for name, layer in loads.layers().items()})


def _whole_norm(model: nn.Module) -> float:
    """Of all gradients of a model that is whole on this rank; float64, since torch's sums on the CPU lose 1e-5."""
    gradients = [_local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())


def _train_together(task: Verify, run: Run, ranks: RankContext) -> Trace:
    """Collective. The layout's own train step, looked at from outside."""
    training = build_training(run, ranks, skips=0)
    names = _names(run)
    batches = rows(task, run, training.mesh.data_rank, training.mesh.data_ranks)
    outcomes, loads = [], _Loads(training.network)
    held = training.network.named_parameters
    with _first_gradients(training, lambda: _measure(names, held(), run.seed, ranks.device)) as measured:
        for _ in range(task.steps):
            outcomes.append(training.stepper(batches, stop=False))
            loads.read()
    losses, grad_norms = ([float(outcome[name]) for outcome in outcomes] for name in ("loss", "grad_norm"))
    return Trace(losses, grad_norms, _read(names, world_sum(measured[0])), _of_all_ranks(loads.layers()))


class _Loads:
    """What a rank counts and learns of the experts of its layers."""

    def __init__(self, network: ModelStages) -> None:
        blocks = chain.from_iterable(part.numbered_blocks().items() for part in network.stages)
        found = {f"layers.{number}": getattr(block, "moe", None) for number, block in blocks}
        self._mixtures = {name: moe for name, moe in found.items() if isinstance(moe, MoE)}
        self._steps: list[dict[str, tuple[int, ...]]] = []

    def read(self) -> None:
        """After each step; waits for the device."""
        self._steps.append({name: tuple(moe.load.tolist()) for name, moe in self._mixtures.items()})

    def layers(self) -> dict[str, LayerRouting]:
        """After the last step, by layer."""
        return {
            name: LayerRouting(
                tuple(step[name] for step in self._steps), tuple(moe.expert_bias.tolist()), moe.load_balance_coeff
            )
            for name, moe in self._mixtures.items()
        }


def _of_all_ranks(mine: dict[str, LayerRouting]) -> dict[str, list[LayerRouting]]:
    """Collective. Of each layer what every rank that holds it has to say, the first layer first."""
    said: list[dict[str, LayerRouting]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(said, mine)
    names = sorted({name for each in said for name in each}, key=lambda name: int(name.split(".")[1]))
    return {name: [each[name] for each in said if name in each] for name in names}


@contextmanager
def _first_gradients(training: Training, measure: Callable[[], Tensor]) -> Iterator[list[Tensor]]:
    """What `measure` finds just before the first update, which clips as it reads. Until then the list is empty."""
    found: list[Tensor] = []

    def look(*_: object) -> None:
        if not found:
            found.append(measure())

    handle = training.state.optimizer.register_step_pre_hook(look)
    try:
        yield found
    finally:
        handle.remove()


def _names(run: Run) -> list[str]:
    """Every parameter of the whole model, in one order on all ranks, whichever stage holds it."""
    return [weight.name for weight in run.model.weights()]


@torch.no_grad()
def _measure(
    names: list[str], parameters: Iterable[tuple[str, nn.Parameter]], seed: int, device: torch.device
) -> Tensor:
    """(parameters, 3) in float64: squared norm and direction of this rank's shard, and 1 / pieces.

    Sums over any set of ranks that holds every parameter give the figures of the whole, see `_read`.
    """
    held = dict(parameters)
    table = torch.zeros(len(names), 3, dtype=torch.float64, device=device)
    for index, name in enumerate(names):
        if (parameter := held.get(name)) is None:
            continue
        table[index, 2] = 1 / _pieces(parameter)
        if parameter.grad is not None:
            gradient = _local(parameter.grad).to(device, torch.float64)
            direction = _local(_direction(parameter, name, seed, device)).double()
            table[index, :2] = torch.stack((gradient.square().sum(), (gradient * direction).sum()))
    return table


def _read(names: list[str], table: Tensor) -> dict[str, Gradient]:
    """A shard that several ranks hold was counted as often: the third column has become that number."""
    found = {}
    for name, (squares, direction, copies) in zip(names, table.tolist(), strict=True):
        assert copies, f"no rank holds {name}"
        found[name] = Gradient((squares / copies) ** 0.5, direction / copies)
    return found


def _direction(parameter: nn.Parameter, name: str, seed: int, device: torch.device) -> Tensor:
    """Normal numbers that depend on the name alone, cut as the parameter is; `device`: where ranks compute."""
    generator = torch.Generator(device).manual_seed(seed_of(seed, f"direction {name}"))
    whole = torch.randn(parameter.shape, dtype=torch.float32, device=device, generator=generator)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(parameter: nn.Parameter) -> int:
    """Into how many different shards its mesh cuts the parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    cut = zip(parameter.placements, parameter.device_mesh.shape, strict=True)
    return prod(size for placement, size in cut if not isinstance(placement, Replicate))


def _release(device: torch.device) -> None:
    """The single device's memory, before the layout's is asked for."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
