"""Rules about the machines of a run: what a GPU can compute, and the memory of a host whose CPU computes."""

from src.config.groups import options
from src.planning.advice import told
from src.planning.memory import GIB, Load, estimate
from src.planning.time.devices import GPUS
from src.planning.time.site import SiteFacts
from src.run import Run, WithoutModel
from src.runs.cluster import Devices

NARROWEST_FLEX_HEAD = 16  # elements: what the GPU's matrix units multiply at once


def float8_problems(run: Run, devices: Devices | None) -> list[str]:
    """Why float8 cannot run on this GPU, layout and compile section."""
    float8 = run.precision.float8
    if float8 is None:
        return []
    model = run.cluster.gpu_model if isinstance(run.cluster, SiteFacts) else None
    if model is not None and GPUS[model].float8 is None and not float8.emulate:
        return [f"precision.float8: cluster.gpu_model={model} has no float8 products; pass precision=bf16"]
    capability = None if devices is None else devices.capability
    return float8.problems(
        run.model.weights(),
        run.parallel,
        compiled=run.compile.blocks,
        gpu=has_gpu(run, devices),
        capability=capability,
    )


def expert_problems(run: Run) -> list[str]:
    """Why compiled experts cannot multiply in this precision."""
    if not run.compile.blocks or not run.model.routed or run.precision.compute == "bfloat16":
        return []
    return [
        f"compile.blocks=true with precision.compute={run.precision.compute}: grouped products of experts are "
        "traced in bfloat16 only; pass precision=bf16 or compile=off"
    ]


def kernel_problems(run: Run, devices: Devices | None) -> list[str]:
    """Why an attention kernel cannot run on this GPU."""
    narrowest = min(run.model.head_widths)
    if run.model.attention != "flex" or narrowest >= NARROWEST_FLEX_HEAD:
        return []
    if devices is None or not has_gpu(run, devices):
        return []
    return [
        f"model.attention=flex has no GPU kernel for heads of {narrowest} elements, only from {NARROWEST_FLEX_HEAD}; "
        "pass wider or fewer heads, model.attention=sdpa, or cluster.gpus=0"
    ]


def graph_problems(run: Run, devices: Devices | None) -> list[str]:
    """Why a step cannot be one CUDA graph."""
    if not run.compile.graph:
        return []
    if not has_gpu(run, devices):
        return ["compile.graph=true makes a CUDA graph, and there is no GPU here; pass compile=blocks"]
    if (ranks := run.parallel.world * run.fault_tolerance.copies) > 1:
        return [
            f"compile.graph=true makes a CUDA graph of the step of one GPU, and there are {ranks} ranks; pass "
            "parallel=single without replica groups, or compile=blocks"
        ]
    return []


def host_problems(run: Run, load: Load, devices: Devices | None) -> list[str]:
    """Ranks on a CPU share its memory; a system that runs out of it ends any process."""
    ranks, peak = run.parallel.world * run.fault_tolerance.copies, estimate(load).peak
    if (there := host_bytes(run, devices)) is None or ranks * peak <= there:
        return []
    return [
        f"does not fit: there is no GPU here, and the {ranks} ranks need about {told(ranks * peak)} of the "
        f"{told(there)} of this machine; pass a smaller model, cluster={_elsewhere()}, or "
        "dry_run=true for the plan alone"
    ]


def host_bytes(run: Run, devices: Devices | None) -> int | None:
    """Memory of the machine on whose CPU all ranks compute; None where there is none, and for a dry run, whose ranks
    would live elsewhere, or build no model.
    """
    if devices is None or devices.host_gib is None or run.dry_run or isinstance(run.task, WithoutModel):
        return None
    return int(devices.host_gib * GIB)


def gpu_bytes(run: Run, devices: Devices | None, limit_bytes: int | None) -> int | None:
    """Memory of a GPU: `limit_bytes`, or else what cluster.gpu_model has; None on a CPU and of a GPU that nobody
    knows.
    """
    if not has_gpu(run, devices):
        return None
    if limit_bytes is not None:
        return limit_bytes
    gpu = run.cluster.gpu(devices) if isinstance(run.cluster, SiteFacts) else None
    return None if gpu is None else int(gpu.gib * GIB)


def has_gpu(run: Run, devices: Devices | None) -> bool:
    """Whether ranks have a GPU, as far as is known here."""
    return devices is None or devices.count is not None or run.cluster.gpus_per_node is not None


def _elsewhere() -> str:
    """A cluster of other machines."""
    return next(each for each in options("cluster") if each != "local")
