"""Builds model, optimizer and stepper of this rank from the sections of a run, in the order of execution."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from src.distributed.init_weights import initialise, materialise
from src.distributed.matrix_owners import MatrixOwners
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.distributed.parallelize import parallelize
from src.distributed.pipeline.pipeline_parallel import build, connect
from src.distributed.process.flight_recorder import TRACES
from src.distributed.process.rank_context import RankContext, device_type
from src.distributed.tensor.symmetric_memory import share_memory
from src.fault_tolerance.replica_groups import ReplicaGroups
from src.models.decoder import Decoder
from src.optim.elementwise import Elementwise
from src.run import Averages, ClipsLogits, Penalises, Run, WatchesSpikes
from src.train.average import WeightAverage
from src.train.replicated.step import ReplicatedStepper
from src.train.stability.attention_logits import AttentionLogits, QKClip
from src.train.stability.spikes import SpikeWatch
from src.train.state import TrainState
from src.train.step import metrics as step_metrics
from src.train.step.graph import GraphedStepper
from src.train.step.stepper import Stepper

# Loading and compiling hold ranks apart by minutes; a rank that is missing for half an hour will not come.
START_TIMEOUT_SECONDS = 1800.0
# A collective of a later step that takes this long hangs. A checkpoint's write waits for the file system between two
# steps, so it must not be shorter than that.
STEP_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Training:
    """One rank's share of a run."""

    ranks: RankContext
    mesh: Mesh
    network: ModelStages
    state: TrainState
    stepper: Stepper


def join_ranks(run: Run, folder: Path) -> RankContext:
    """Collective: this rank among those of the run's layout, with time for a start. What every task does first."""
    return RankContext.join(
        device_type(), run.parallel.world, timeout_seconds=START_TIMEOUT_SECONDS, traces=folder / TRACES
    )


def build_training(
    run: Run, ranks: RankContext, *, skips: int, mesh: Mesh | None = None, groups: ReplicaGroups | None = None
) -> Training:
    """Collective. The parallel model with its name-seeded weights, its optimizer, and a state at step 0.

    `mesh`: where the world is not the layout's own. `groups`: where there are several.
    """
    torch.manual_seed(run.seed)  # weights do not draw from it; what does, draws alike in every attempt
    mesh = mesh or Mesh(run.parallel, ranks.device.type)
    network = build_uninitialized(run, ranks, mesh)
    for part in network.stages:
        initialise(part, run.seed, run.parametrization.initializers(run.model, part.initializers()))
    if isinstance(run.task, Penalises):
        network.router_z_loss = run.task.router_z_loss
        for head in (part.output for part in network.stages if part.output is not None):
            head.z_loss = run.task.z_loss
    optimizer = run.optim.build(
        network.named_parameters(),
        ranks.device,
        owners_of(run, mesh, ranks.device),
        run.model.heads(),
        run.parametrization.rates(run.model, run.optim.orthogonal),
    )
    float8 = run.precision.float8
    network.follow = [] if float8 is None else [partial(float8.after_update, part) for part in network.stages]
    after_update = [*network.follow]
    if network.weights is not None and isinstance(optimizer, Elementwise) and groups is None:
        network.any_gradient_dtype, optimizer.copies = True, network.weights.beside()
        after_update.insert(0, network.weights.written)
    state = TrainState(network, optimizer, run.seed, more=groups)
    if isinstance(run.task, ClipsLogits) and run.task.qk_clip is not None:
        clip = QKClip(AttentionLogits(network), network, optimizer, run.task.qk_clip)
        after_update.insert(len(after_update) - len(network.follow), clip.clip)
    if isinstance(run.task, Averages) and run.task.ema_decay is not None:
        state.average = WeightAverage(
            network,
            optimizer,
            run.task.ema_decay,
            getattr(torch, run.task.ema_dtype),
            offload=run.task.ema_offload,
        )
        after_update.append(state.average.update)
    if isinstance(run.task, WatchesSpikes) and run.task.spike_score is not None:
        state.spikes = SpikeWatch(run.task.spike_score, run.task.spike_window, run.task.on_spike)
    metrics = step_metrics.STEP_METRICS + (step_metrics.PREDICTION_METRICS if run.model.prediction_depths else ())
    arguments = (network, optimizer, run.optim.max_norm, skips, after_update, metrics)
    if groups is None:
        stepper = (GraphedStepper if run.compile.graph else Stepper)(*arguments)
        return Training(ranks, mesh, network, state, stepper)
    groups.watch(network, after_update)
    return Training(ranks, mesh, network, state, ReplicatedStepper(*arguments, groups=groups))


def owners_of(run: Run, mesh: Mesh, device: torch.device) -> MatrixOwners | None:
    """Collective. Where an optimizer reads whole matrices and ranks have shards: who brings them together."""
    if run.optim.reads != "matrices" or run.parallel.on_one_device:
        return None
    return MatrixOwners(mesh.stage_group(), device)


def build_uninitialized(run: Run, ranks: RankContext, mesh: Mesh) -> ModelStages:
    """Collective. The parallel model on its device; its weights are whatever was in memory."""
    if run.parallel.async_tensor and mesh.tensor is not None:
        share_memory(mesh.tensor)
    stages = build_stages(run, mesh)
    for part in stages.values():
        materialise(part, ranks.device, offload=run.parallel.cpu_offload)
    return connect(stages, mesh, ranks.device, run.precision)


def build_stages(run: Run, mesh: Mesh) -> dict[int, Decoder]:
    """This rank's stages in their layout, by number, on the meta device."""
    stages = build(run.model.build, run.model.n_layers, run.parallel, mesh.pipeline.get_local_rank())
    for part in stages.values():
        part.to(getattr(torch, run.precision.storage))
        parallelize(part, mesh, run.precision, run.recompute, run.compile)
    return stages


def make_deterministic() -> None:
    """Only kernels that give the same bits every time; one without such a form raises."""
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
