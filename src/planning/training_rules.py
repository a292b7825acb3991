"""Rules about what a training step does besides its update: averages, penalties, norms of layers."""

from src.run import Averages, MeasuresLayers, Penalises, Run


def training_problems(run: Run) -> list[str]:
    """Options of the task that this run's model, layout or compiler cannot have."""
    found = _average_problems(run)
    if isinstance(run.task, MeasuresLayers) and run.task.layer_norms and run.compile.graph:
        found.append("task.layer_norms=true looks into steps, and compile.graph=true replays them; pass compile=blocks")
    if isinstance(run.task, Penalises) and run.task.router_z_loss > 0.0 and not run.model.routed:
        found.append(
            f"task.router_z_loss={run.task.router_z_loss:g} finds no router in this model; pass task.router_z_loss=0"
        )
    return found


def _average_problems(run: Run) -> list[str]:
    if not isinstance(run.task, Averages) or run.task.ema_decay is None:
        return []
    found = []
    if run.fault_tolerance.copies > 1:
        found.append("task.ema_decay: replica groups keep no average of their weights; pass task.ema_decay=null")
    if run.task.ema_offload and run.compile.graph:
        found.append(
            "task.ema_offload=true has the host work in each step, and compile.graph=true replays steps without it; "
            "pass task.ema_offload=false, or compile=blocks"
        )
    return found
