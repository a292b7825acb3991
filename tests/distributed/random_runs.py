"""Random runs of awkward numbers: family, layout, batch arithmetic, recompute, precision and masks follow from a seed.

Sizes are tiny (some 10,000 parameters), so that what they cost is the start of the layout itself.
"""

from dataclasses import replace
from itertools import pairwise
from math import prod
from random import Random
from typing import Any

from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline.stages import SCHEDULES, modules
from src.distributed.precision.config import Precision
from src.distributed.recompute import Recompute
from src.models.base import ModelConfig
from src.run import Run
from src.tasks.verify.config import Verify
from tests.distributed.layouts import degrees
from tests.train.runs import changed, make_run, section

WORLDS = (1, *[2] * 12, *[3] * 2, *[4] * 3, 6, 8)  # fewer of those that cost more
AXES = ("pipeline", "replicate", "shard", "context", "tensor")
FAMILIES = ("llama3_debug", "deepseek_v3_debug", "qwen3_debug", "qwen3_moe_debug")
PRECISIONS = (*["fp32"] * 6, "bf16", "bf16", "fp8", "fp8_rowwise", "fp8_rowwise_gw_hp", "fp8_gather")
FLOAT8_MULTIPLE = 16


def random_run(seed: int) -> Run:
    """Mostly legal: sizes are drawn as multiples of what cuts them, most of the time."""
    draw = Random(seed)
    precision, axes = _precision(draw), _axes(draw)
    multiple = 1 if precision.float8 is None else FLOAT8_MULTIPLE
    model, documents = _masked(draw, _model(draw, axes, multiple))
    model = _predicting(Random(f"{seed} predicts"), model)
    layout = _layout(draw, axes, model)
    run = make_run(
        model=model,
        parallel=layout,
        precision=precision,
        recompute=_recompute(draw, model.n_layers),
        data=changed(section("data", "synthetic"), document_masks=documents),
    )
    return replace(run, task=_task(draw, layout, multiple), seed=seed)


def words(run: Run) -> str:
    """What differs from a default, for whoever looks for the reason."""
    plain = degrees("single").model_dump()
    layout = {key: value for key, value in run.parallel.model_dump().items() if value != plain[key]}
    return f"{run.model!r} {layout} {run.precision!r} recompute {run.recompute} {run.task!r}"


def _axes(draw: Random) -> dict[str, int]:
    world, axes = draw.choice(WORLDS), dict.fromkeys(AXES, 1)
    for factor in {1: (), 2: (2,), 3: (3,), 4: (2, 2), 6: (2, 3), 8: (2, 2, 2)}[world]:
        axes[draw.choice(AXES)] *= factor
    assert prod(axes.values()) == world
    return axes


def _layout(draw: Random, axes: dict[str, int], model: ModelConfig) -> ParallelDims:
    chosen: dict[str, Any] = dict(axes) | {
        "reshard": draw.choice(("default", "always", "never")),
        "prefetch": draw.choice((1, 1, 3)),
        "cpu_offload": draw.random() < 0.1,
    }
    if axes["context"] > 1:
        chosen["rotate"] = draw.choice(("allgather", "alltoall")) if model.attention == "sdpa" else "allgather"
    if axes["pipeline"] > 1:
        chosen |= _pipeline(draw, axes["pipeline"], model.n_layers)
    else:
        chosen["sync_each_micro_batch"] = draw.random() < 0.3
    if model.routed:
        chosen["expert_tensor"] = draw.choice((1, axes["tensor"]))
        ranks = axes["shard"] * axes["context"] * axes["tensor"] // chosen["expert_tensor"]
        chosen["expert"] = draw.choice([degree for degree in range(1, ranks + 1) if ranks % degree == 0])
    return degrees("single", **chosen)


def _pipeline(draw: Random, ranks: int, n_layers: int) -> dict[str, Any]:
    schedule = draw.choice(list(SCHEDULES))
    chosen: dict[str, Any] = {"pipeline_schedule": schedule}
    count = ranks * (2 if SCHEDULES[schedule].several else 1)
    names = modules(n_layers)
    if draw.random() < 0.5 and count < len(names):
        cuts = [0, *sorted(draw.sample(range(1, len(names) - 1), count - 1)), len(names)]
        chosen["stages"] = [list(names[start:end]) for start, end in pairwise(cuts)]
    else:
        chosen |= {"first_stage_less": draw.randint(0, 1), "last_stage_less": draw.randint(0, 1)}
    return chosen


def _model(draw: Random, axes: dict[str, int], multiple: int) -> ModelConfig:
    """`multiple`: of the sides of matrices."""
    name, tensor = draw.choice(FAMILIES), axes["tensor"]
    stages = 2 * axes["pipeline"]  # the most that a schedule asks for; embedding and head may have two for themselves
    n_layers = draw.randint(1, 3) if stages == 2 else stages - 2 + draw.choice((0, 0, 1, 2))

    def size(least: int, most: int, of: int = 1) -> int:
        first = -(-least // of)
        return of * draw.randint(first, max(first, most // of))

    wide, aligned = tensor * multiple, 8 if multiple == 1 else multiple
    vocabulary = size(40, 130, tensor) + (draw.random() < 0.05)
    heads = size(1, 4, tensor)
    own: dict[str, Any] = {"n_layers": n_layers, "vocab_size": vocabulary, "max_seq_len": 1024, "n_heads": heads}
    if name == "deepseek_v3_debug":
        own |= {"dim": size(16, 48, aligned), "ffn_dim": size(10, 40, wide), "n_dense_layers": draw.randint(0, 1)}
        own |= {"q_lora_rank": draw.choice((None, size(5, 20, multiple))), "kv_lora_rank": size(5, 24, multiple)}
        own |= {"qk_nope_head_dim": size(3, 12), "qk_rope_head_dim": size(2, 8, 2), "v_head_dim": size(3, 12)}
        own["moe"] = _mixture(draw, section("model", name).moe, tensor, shared=draw.randint(0, 2))
        return changed(section("model", name), **own)
    shares = [share for share in range(1, heads // tensor + 1) if heads // tensor % share == 0]
    own |= {"n_kv_heads": tensor * draw.choice(shares), "head_dim": size(2, 12, max(2, multiple))}
    if name == "qwen3_moe_debug":
        own |= {"dim": size(16, 48, aligned), "moe": _mixture(draw, section("model", name).moe, tensor, shared=0)}
        return changed(section("model", name), **own)
    own |= {"dim": size(17, 50, multiple), "tie_word_embeddings": draw.random() < 0.2}
    own["ffn_dim" if name == "qwen3_debug" else "multiple_of"] = size(3, 40, wide)
    return changed(section("model", name), **own)


def _mixture(draw: Random, mixture: Any, tensor: int, shared: int) -> Any:
    experts = draw.randint(1, 9)
    return changed(
        mixture,
        num_experts=experts,
        top_k=draw.randint(1, experts),
        num_shared_experts=shared,
        hidden_dim=8 * tensor * draw.randint(1, 2),
        num_expert_groups=1,
        num_limited_groups=1,
        score_func=draw.choice(("softmax", "sigmoid")),
        route_norm=draw.random() < 0.5,
        score_before_experts=draw.random() < 0.3,
        load_balance_coeff=draw.choice((None, 0.01)),
        unbalanced_layers=(),
    )


def _predicting(draw: Random, model: ModelConfig) -> ModelConfig:
    """Further tokens, of a family that can."""
    if (mtp := getattr(model, "mtp", None)) is None:
        return model
    return changed(model, mtp=changed(mtp, depths=draw.choice((0, 0, 1, 2)), weight=draw.choice((0.3, 1.0))))


def _masked(draw: Random, model: ModelConfig) -> tuple[ModelConfig, bool]:
    """Also whether documents must be known."""
    if draw.random() < 0.6:
        return model, False
    documents = draw.random() < 0.6
    mask = "block_causal" if documents else "causal"
    return changed(model, attention="flex", mask=mask, fixed_block=draw.choice((None, 3, 7))), documents


def _task(draw: Random, layout: ParallelDims, multiple: int) -> Verify:
    """`multiple`: of the tokens of a forward."""
    parts = layout.tensor * (2 * layout.context if layout.context > 1 else 1)
    micro_batch = draw.choice((1, 1, 2, 3))
    seq_len = parts * draw.randint(1, max(1, 40 // parts))
    if multiple > 1:
        seq_len = max(parts * multiple // 2, multiple)
    count = draw.randint(1, 3) if layout.pipeline == 1 else layout.pipeline * draw.randint(1, 2) + draw.randint(0, 1)
    return Verify(
        steps=2,
        seq_len=seq_len,
        global_batch=micro_batch * count * layout.data_ranks,
        micro_batch=micro_batch,
        z_loss=0.0,
        router_z_loss=0.0,
    )


def _recompute(draw: Random, n_layers: int) -> Recompute:
    mode: Any = draw.choice(("none", "none", "full", "every", "selective"))
    return Recompute(mode=mode, every=draw.randint(1, n_layers) if mode == "every" else None, budget=None)


def _precision(draw: Random) -> Precision:
    chosen: Precision = section("precision", draw.choice(PRECISIONS))
    if chosen.float8 is None:
        return chosen
    return changed(chosen, float8=changed(chosen.float8, emulate=True))
