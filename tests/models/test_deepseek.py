"""DeepSeek-V3 and V2 against an independent implementation: transformers, fp32 on the CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from src.models.deepseek_v3.config import DeepseekV3Config
from src.models.parametrization.init import Constant, Normal
from src.models.rope import inverse_frequencies, scale_yarn
from tests.models import shapes
from tests.models.shapes import STRETCHED, tiny_deepseek
from tests.train.runs import section

SIGMOID: dict[str, Any] = {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.5}
GROUPS: dict[str, Any] = {"num_expert_groups": 4, "num_limited_groups": 2}
LINEAR = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
ATTENTION = {
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
}


def randomised(config: DeepseekV3Config) -> nn.Module:
    """With biases that move choices, too."""
    model = shapes.randomised(config)
    for moe in model.mixtures():
        nn.init.normal_(moe.expert_bias, std=0.1 if config.moe.score_func == "sigmoid" else 0.0)
    return model


def renamed(ours: dict[str, Tensor], config: DeepseekV3Config) -> dict[str, Tensor]:
    """Weights under transformers' names."""
    weights = {"model.embed_tokens.weight": ours["tok_embeddings.weight"], "model.norm.weight": ours["norm.weight"]}
    weights["lm_head.weight"] = ours["output.weight"]
    for layer in range(config.n_layers):
        here, there = f"layers.{layer}", f"model.layers.{layer}"
        weights[f"{there}.input_layernorm.weight"] = ours[f"{here}.attention_norm.weight"]
        weights[f"{there}.post_attention_layernorm.weight"] = ours[f"{here}.ffn_norm.weight"]
        for name, theirs in ATTENTION.items():
            if f"{here}.attention.{name}.weight" in ours:
                weights[f"{there}.self_attn.{theirs}.weight"] = ours[f"{here}.attention.{name}.weight"]
        dense = layer < config.n_dense_layers
        for name, theirs in LINEAR.items():
            source, target = ("feed_forward", "mlp") if dense else ("moe.shared_experts", "mlp.shared_experts")
            weights[f"{there}.{target}.{theirs}.weight"] = ours[f"{here}.{source}.{name}.weight"]
        if not dense:
            experts = {name: ours[f"{here}.moe.experts.{name}"] for name in LINEAR}
            weights[f"{there}.mlp.gate.weight"] = ours[f"{here}.moe.router.gate.weight"]
            weights[f"{there}.mlp.gate.e_score_correction_bias"] = ours[f"{here}.moe.expert_bias"]
            weights[f"{there}.mlp.experts.gate_up_proj"] = torch.cat([experts["w1"], experts["w3"]], dim=1)
            weights[f"{there}.mlp.experts.down_proj"] = experts["w2"]
    return weights


def as_transformers(model: nn.Module, config: DeepseekV3Config, version: str) -> nn.Module:
    """transformers' DeepSeek of that version ("V2", "V3") with the same weights."""
    transformers = pytest.importorskip("transformers")
    moe, yarn = config.moe, config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale,
            "original_max_position_embeddings": yarn.original,
        }
    of_version: dict[str, Any] = {"norm_topk_prob": moe.route_norm, "num_mtp_layers": 0}
    if version == "V2":
        of_version = {"topk_method": "greedy" if moe.num_expert_groups == 1 else "group_limited_greedy"}
    shape = getattr(transformers, f"Deepseek{version}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        moe_intermediate_size=moe.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        n_shared_experts=moe.num_shared_experts,
        n_routed_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        routed_scaling_factor=moe.route_scale,
        n_group=moe.num_expert_groups,
        topk_group=moe.num_limited_groups,
        first_k_dense_replace=config.n_dense_layers,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        **of_version,
    )
    theirs = getattr(transformers, f"Deepseek{version}ForCausalLM")(shape)
    weights = renamed(model.state_dict(), config)
    if version == "V2":
        weights = {name: weight for name, weight in weights.items() if not name.endswith("correction_bias")}
    theirs.load_state_dict(weights)
    return theirs.eval()


def check(config: DeepseekV3Config, version: str) -> None:
    model = randomised(config)
    tokens = torch.randint(config.vocab_size, (2, 100))
    with torch.no_grad():
        ours, theirs = model(tokens), as_transformers(model, config, version)(tokens).logits
    assert theirs.abs().max() > 1, "the comparison needs logits that say something"
    assert (ours - theirs).abs().max() < 1e-4  # fp32, sums in another order


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="one-matrix-queries"),
        pytest.param({"q_lora_rank": 40}, id="low-rank-queries"),
        pytest.param({"moe": SIGMOID | GROUPS}, id="groups"),
        pytest.param({"n_dense_layers": 0}, id="no-dense-layer"),
        pytest.param({"n_dense_layers": 2}, id="two-dense-layers"),
        pytest.param({"rope_scaling": STRETCHED}, id="yarn"),
        pytest.param({"v_head_dim": 24, "q_lora_rank": 40, "rope_scaling": STRETCHED}, id="wide-values"),
    ],
)
def test_logits_equal_transformers(changes: dict[str, Any]) -> None:
    check(tiny_deepseek(**({"moe": SIGMOID} | changes)), "V3")


@pytest.mark.parametrize(
    "moe",
    [
        pytest.param({"route_scale": 1.0}, id="lite"),
        pytest.param({"route_scale": 16.0, "group_score": "max"} | GROUPS, id="groups"),
    ],
)
def test_logits_equal_transformers_of_version_2(moe: dict[str, Any]) -> None:
    check(tiny_deepseek(moe=moe, rope_scaling=STRETCHED), "V2")


def test_how_a_group_is_judged_is_seen() -> None:
    """The tolerance above tells V2's routing from V3's."""
    maximum, sums = (tiny_deepseek(moe=GROUPS | {"group_score": how}) for how in ("max", "top2sum"))
    tokens = torch.randint(maximum.vocab_size, (2, 100))
    with torch.no_grad():
        assert (randomised(maximum)(tokens) - randomised(sums)(tokens)).abs().max() > 1e-2


def test_yarn_ranges() -> None:
    """Width 64, theta 1e4, 4096 tokens stretched 40 times: pairs 0-10 stay, 23-31 are 40 times slower."""
    plain = inverse_frequencies(64, 10000.0)
    stretched = scale_yarn(plain, theta=10000.0, factor=40.0, original=4096, beta_fast=32.0, beta_slow=1.0)
    ratio = stretched / plain
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    expected = 1 - (torch.arange(11.0, 23.0) - 10) / 13 * (1 - 1 / 40)
    torch.testing.assert_close(ratio[11:23], expected)


@pytest.mark.parametrize(("mscale", "scale"), [(1.0, 0.1352338), (0.707, 0.1147214), (0.70, 0.1142520)])
def test_softmax_scales(mscale: float, scale: float) -> None:
    released: DeepseekV3Config = section("model", "deepseek_v3_16b")
    assert released.rope_scaling is not None
    yarn = released.rope_scaling.model_copy(update={"mscale": mscale})
    assert released.model_copy(update={"rope_scaling": yarn}).softmax_scale == pytest.approx(scale, abs=5e-8)
    assert released.model_copy(update={"rope_scaling": None}).softmax_scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize(
    ("preset", "seq_len", "parameters", "active", "routed", "flops"),
    [
        ("debug", 2048, 33_014_016, 28_098_816, 7_864_320, 542_934_528),
        ("16b", 4096, 15_706_484_224, 2_661_150_208, 14_394_851_328, 18_105_996_288),
        ("236b", 4096, 235_741_434_880, 21_375_800_320, 222_717_542_400, 185_507_051_520),
        ("671b", 4096, 671_026_404_352, 37_552_282_624, 653_908_770_816, 281_158_232_064),
    ],
)
def test_published_counts(preset: str, seq_len: int, parameters: int, active: int, routed: int, flops: int) -> None:
    config: DeepseekV3Config = section("model", f"deepseek_v3_{preset}")
    counts = config.counts(seq_len)
    assert (counts.parameters, counts.active, counts.flops_per_token) == (parameters, active, flops)
    experts = sum(weight.elements for weight in config.weights() if ".experts." in weight.name)
    assert experts == routed
    assert counts.parameters - counts.active == routed - routed * config.moe.top_k // config.moe.num_experts
    assert config.norm_eps == 1e-6


@pytest.mark.parametrize(
    ("preset", "dense"),
    [("debug", 23_173_376), ("16b", 858_385_920), ("236b", 10_191_590_400), ("671b", 14_456_871_936)],
)
def test_the_dense_part(preset: str, dense: int) -> None:
    config: DeepseekV3Config = section("model", f"deepseek_v3_{preset}")
    assert sum(weight.elements for weight in config.weights() if ".moe." not in weight.name) == dense


@pytest.mark.parametrize("preset", ["debug", "16b", "236b", "671b"])
def test_the_built_model_has_these_weights(preset: str) -> None:
    config: DeepseekV3Config = section("model", f"deepseek_v3_{preset}")
    with torch.device("meta"):
        model = config.build()
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built
    kept = set(model.state_dict()) - set(built)
    assert kept == {f"layers.{layer}.moe.expert_bias" for layer in range(config.n_dense_layers, config.n_layers)}


def test_initializers_name_every_parameter_and_scale_with_depth() -> None:
    config = tiny_deepseek(q_lora_rank=40)
    model = config.build()
    plan = model.initializers()
    assert set(plan) == {name for name, _ in model.named_parameters()}
    small = Normal(0.02 / 6**0.5)  # of layer 2
    for name in ("attention.wo.weight", "moe.experts.w2", "moe.experts.w3", "moe.router.gate.weight"):
        assert plan[f"layers.2.{name}"] == small
    assert plan["layers.2.moe.shared_experts.w2.weight"] == small
    for name in ("attention.wq_a.weight", "attention.wkv_b.weight", "moe.experts.w1", "moe.shared_experts.w1.weight"):
        assert plan[f"layers.2.{name}"] == Normal(0.02)
    assert plan["layers.0.feed_forward.w3.weight"] == Normal(0.02 / 2**0.5)
    assert plan["layers.1.attention.kv_norm.weight"] == plan["layers.1.attention.q_norm.weight"] == Constant(1.0)
    assert plan["output.weight"] == Normal(64**-0.5, cut=3.0)


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim", "8 would do"),
        ({"n_dense_layers": 4}, "n_dense_layers", "at most 3"),
        ({"dim": 68}, "dim", "64 or 72 would do"),
        ({"mask": "block_causal"}, "mask", "attention=flex does it"),
        ({"fixed_block": 16}, "fixed_block", "attention=flex does it"),
        ({"moe": {"unbalanced_layers": (0, 2)}}, "moe", "unbalanced_layers=[0]: layers with experts are 1 to 2"),
    ],
)
def test_impossible_shapes_are_refused_by_key(changes: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as caught:
        tiny_deepseek(**changes)
    (error,) = caught.value.errors()  # type: ignore[attr-defined]
    assert error["loc"] == (key,)
    assert said in error["msg"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert": 3}, "parallel.expert=3 does not divide model.moe.num_experts=8 (1, 2, 4 or 8 do)"),
        ({"tensor": 3}, "parallel.tensor=3 does not divide model.n_heads=4 (1, 2 or 4 do)"),
        (
            {"tensor": 4, "expert_tensor": 4},
            "parallel.expert_tensor=4 cuts model.moe.hidden_dim=16 into parts that are",
        ),
    ],
)
def test_what_a_rank_cannot_hold_is_refused_by_name(changes: dict[str, int], said: str) -> None:
    problems = tiny_deepseek().problems(section("parallel", "tp2").model_copy(update=changes))
    assert problems[0].startswith(said)
    assert tiny_deepseek().problems(section("parallel", "tp2_fsdp2_ep2")) == []
