"""Expert load (tokens per routed expert) of all MoE layers of a model."""

import torch
import torch.distributed as dist

from src.distributed.collectives import mesh_max
from src.distributed.model_stages import ModelStages
from src.metrics.expert_load import ExpertLoad, LayerLoad
from src.models.moe.moe import MoE


def expert_load(network: ModelStages, tokens: int) -> ExpertLoad | None:
    """Collective. Of the last optimizer step, over `tokens` tokens of all ranks; None where no token chooses experts.

    Waits for the device. The step summed the counts over ranks already; here only a pipeline's stages are joined.
    """
    mixture = network.stages[0].config.mixture
    if mixture is None:
        return None
    layers = _layers(network)
    if network.mesh.degrees.pipeline > 1:
        group = network.mesh.pipeline.get_group()
        stages: list[dict[int, LayerLoad]] = [{}] * network.mesh.degrees.pipeline
        dist.all_gather_object(stages, layers, group=group)
        layers = {number: layer for stage in stages for number, layer in stage.items()}
    if not any(any(layer.rows) for layer in layers.values()):
        return None  # no step was made since the start
    return ExpertLoad(layers, tokens * mixture.top_k, mixture.force_load_balance)


def _layers(network: ModelStages) -> dict[int, LayerLoad]:
    """Those of this rank."""
    named = [pair for part in network.stages for pair in part.numbered_blocks().items()]
    mixtures = {number: moe for number, block in named if isinstance(moe := getattr(block, "moe", None), MoE)}
    if not mixtures:
        return {}
    rows = torch.stack([moe.load for moe in mixtures.values()]).tolist()
    norms = torch.stack([moe.expert_bias for moe in mixtures.values()]).norm(dim=-1).tolist()
    times = _times(network, list(mixtures.values()))
    return {number: LayerLoad(*layer) for number, *layer in zip(mixtures, rows, norms, times, strict=True)}


def _times(network: ModelStages, mixtures: list[MoE]) -> list[tuple[float, float] | None]:
    """Milliseconds of dispatch and combine where tokens travel, those of the slowest rank."""
    taken = [moe.stopwatch.milliseconds() for moe in mixtures if moe.stopwatch is not None]
    if not taken:
        return [None] * len(mixtures)
    slowest = mesh_max(torch.tensor(taken, device=network.device), network.mesh.fsdp)
    return [(dispatch, combine) for dispatch, combine in slowest.tolist()]
