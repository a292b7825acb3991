"""What every family promises, held against every preset of it. A new family needs no test here: its line is enough."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from src.config.groups import options
from src.distributed.mesh import Mesh
from src.distributed.parallelize import parallelize
from src.distributed.process.rank_context import RankContext as Process
from src.errors import CheckpointError, PlanError
from src.models.accounting import Slice
from src.models.attention.cores import CausalAttention
from src.models.base import ModelConfig
from src.models.families import FAMILIES, Family, of_config
from src.models.hugging_face import config_json, export_problems, section, stored
from src.models.llama3.config import Llama3Config
from src.planning.plan import plan
from src.tasks.verify.config import Verify
from src.tasks.verify.rank import certify
from tests.distributed.layouts import FP32, PLAIN, degrees, recomputed
from tests.distributed.test_recompute import PARTITIONER
from tests.models.shapes import TINY
from tests.models.test_accounting import kept_bytes
from tests.ranks import RankPool
from tests.train.runs import changed, make_run
from tests.train.runs import section as preset

MODELS = Path(__file__).parents[2] / "src" / "models"
PRESETS = [option for option in options("model") if option != "auto"]
DEBUG = [option for option in PRESETS if option.endswith("_debug")]
SMALL = {"dim": 64, "n_layers": 2, "vocab_size": 96, "max_seq_len": 64}
TASK = Verify(steps=2, seq_len=32, global_batch=4, micro_batch=1, z_loss=0.0, router_z_loss=0.0)
LAYOUTS = ("tp2", "fsdp2", "pp2", "cp2")
ROUTED_LAYOUTS = (*LAYOUTS, "fsdp2_ep2", "tp2_ep2")


def small(option: str) -> Any:
    return changed(preset("model", option), **SMALL)


def layouts(config: ModelConfig) -> tuple[str, ...]:
    return ROUTED_LAYOUTS if config.routed else LAYOUTS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_line_names_what_there_is(family: Family) -> None:
    module, _, name = family.target.rpartition(".")
    config = getattr(import_module(module), name)
    assert config.family == family.name
    mine = [option for option in PRESETS if isinstance(preset("model", option), config)]
    assert mine == [option for option in PRESETS if option.startswith(f"{family.name}_")]
    assert f"{family.name}_debug" in mine
    assert ((MODELS / family.name / "hugging_face.py").is_file()) == (family.hugging_face() is not None)


def test_every_folder_with_a_model_has_its_line() -> None:
    assert {family.name for family in FAMILIES} == {file.parent.name for file in MODELS.glob("*/model.py")}
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(set(kinds)) == len(kinds)


@pytest.mark.parametrize("option", PRESETS)
def test_what_is_counted_is_what_is_built(option: str) -> None:
    config: ModelConfig = preset("model", option)
    with torch.device("meta"):
        model = config.build()
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {weight.name: weight.shape for weight in config.weights()} == built
    assert set(model.initializers()) == set(built)
    assert config.without_role() == []
    assert plan(make_run(model=config)).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.counts(64).active <= config.counts(64).parameters
    assert config.routed == bool(model.mixtures())


def whole(option: str) -> Any:
    """With what a preset may leave out."""
    config = changed(preset("model", option), n_layers=4)
    return changed(config, mtp=changed(config.mtp, depths=1)) if hasattr(config, "mtp") else config


@pytest.mark.parametrize("option", PRESETS)
def test_every_role_is_of_a_module_that_some_preset_has(option: str) -> None:
    family, names = of_config(preset("model", option)), set[str]()
    assert family is not None
    for other in PRESETS:
        if other.startswith(f"{family.name}_"):
            with torch.device("meta"):
                model = whole(other).build()
            names |= {
                ".".join("*" if part.isdecimal() else part for part in name.split("."))
                for name, _ in model.named_modules()
            }
    assert set(preset("model", option).roles) <= names


class FusedNorm(torch.autograd.Function):
    """Keeps what a GPU's kernel keeps: the input and 1/rms of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight


class FusedAttention(torch.autograd.Function):
    """Keeps what a GPU's kernel keeps, whatever the widths: queries, keys, values, result and log sum exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, result, torch.zeros(q.shape[:-1]))
        return result.transpose(1, 2)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight, norm.eps))
    monkeypatch.setattr(CausalAttention, "forward", lambda _core, q, k, v, *_: FusedAttention.apply(q, k, v))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("option", DEBUG)
def test_a_block_keeps_what_is_planned(option: str) -> None:
    """The mean over its blocks, since that is what `saved_by_block` says of a model with blocks of two kinds."""
    config = small(option)
    model, x = config.build().bfloat16(), torch.randn(2, 64, config.dim, dtype=torch.bfloat16, requires_grad=True)
    model.reset_buffers()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    kept = [kept_bytes(block, x, model.rotary, block) for block in model.blocks()]
    cut = Slice(tokens=2 * 64, tensor=1, element_bytes=2, compiled=False)
    assert config.saved_by_block(cut).whole == pytest.approx(sum(kept) / len(kept), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("option", DEBUG)
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_compiled_block_keeps_what_is_planned(option: str, mode: str) -> None:
    """Cut into forward and backward as inductor does it; widths of one size, where the CPU has a kernel too."""
    config = small(option)
    config = changed(config, v_head_dim=config.qk_head_dim) if hasattr(config, "v_head_dim") else config
    model, x = config.build(), torch.randn(2, 64, config.dim, dtype=torch.bfloat16, requires_grad=True)
    recomputed(mode).apply_within(model)
    kept = []
    for block in model.bfloat16().blocks():
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        torch._dynamo.reset()
        forward = torch.compile(block.forward, fullgraph=True, backend=PARTITIONER)
        kept.append(kept_bytes(block, x, model.rotary, forward))
    saved = config.saved_by_block(Slice(tokens=2 * 64, tensor=1, element_bytes=2, compiled=True))
    planned = saved.selective if mode == "selective" else saved.whole
    assert planned == pytest.approx(sum(kept) / len(kept), rel=0.05)


def parts(options: list[str]) -> Iterator[tuple[str, str, str, int, int]]:
    """On a rank of two: preset, layout and parameter with other elements here than planned, and both numbers."""
    for option in options:
        config = small(option)
        for layout in (each for each in layouts(config) if each != "pp2"):
            mesh = Mesh(degrees(layout), "cpu")
            with torch.device("meta"):
                model = config.build()
            parallelize(model, mesh, FP32, recomputed("none"), PLAIN)
            planned = {weight.name: weight.local_elements(mesh.degrees) for weight in config.weights()}
            for name, parameter in model.named_parameters():
                here = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
                if here != planned[name]:
                    yield option, layout, name, here, planned[name]


def differences(options: list[str]) -> list[tuple[str, str, str, int, int]]:
    return list(parts(options))


def test_a_rank_holds_the_elements_that_are_planned(ranks: RankPool) -> None:
    assert ranks(2, differences, DEBUG) == [[], []]


def verified(config: ModelConfig, names: tuple[str, ...]) -> dict[str, str]:
    """On a rank of two: what is wrong with each of these layouts of a model."""
    ranks, found = Process.join("cpu", 2, timeout_seconds=60), dict[str, str]()
    for layout in names:
        run = replace(make_run(model=config, parallel=degrees(layout)), task=TASK)
        plan(run)
        certificate = certify(TASK, run, ranks, {})
        found |= {layout: certificate.problem()} if certificate.failed else {}
    return found


@pytest.mark.parametrize(
    "option", [pytest.param(each, marks=pytest.mark.slow if preset("model", each).routed else ()) for each in DEBUG]
)
def test_every_axis_trains_like_one_device(ranks: RankPool, option: str) -> None:
    config = small(option)
    assert ranks(2, verified, config, layouts(config)) == [{}, {}]


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in DEBUG if preset("model", option).routed])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 4), (1, 1)], ids=["every-expert", "one-expert"])
def test_where_every_token_meets_every_expert(ranks: RankPool, option: str, num_experts: int, top_k: int) -> None:
    """It is a mixture nevertheless: its experts have a grid of their own. One expert's router has one row for all."""
    config = small(option)
    config = changed(config, moe=changed(config.moe, num_experts=num_experts, top_k=top_k))
    assert config.routed
    names = ("tp2", "cp2") if num_experts == 1 else ("tp2", "tp2_ep2")
    spread = [plan(make_run({"seq_len": 64}, model=config, parallel=degrees(name))).expert_axes for name in names]
    assert spread == ([{"expert_shard": 2}, {}] if num_experts == 1 else [{"expert_shard": 2}, {"expert": 2}])
    assert ranks(2, verified, config, names) == [{}, {}]
    with pytest.raises(PlanError, match="grouped products of experts"):
        plan(make_run({"seq_len": 64}, model=config, compile="blocks"))


@pytest.mark.parametrize("option", PRESETS)
def test_config_json_says_the_same_model(option: str) -> None:
    config = preset("model", option)
    family = of_config(config)
    assert family is not None
    if not family.model_types:
        return
    keys, unread = section(config_json(config), "config.json")
    assert unread == []
    assert keys.pop("_target_") == family.target
    if isinstance(keys.get("moe"), dict):
        keys["moe"] = changed(config.moe, **keys["moe"])
    if "mtp" in keys:
        keys["mtp"] = changed(config.mtp, **keys["mtp"])
    assert changed(config, **keys).weights() == config.weights()
    shapes = {each.name: each.shape for each in stored(config)}
    assert {weight.name: weight.shape for weight in config.weights()}.items() <= shapes.items()


class Mine(Llama3Config):
    """A model of somebody's own package, with a module that nobody thought of and no line among the families."""

    family: ClassVar[str] = "mine"
    roles = {name: role for name, role in Llama3Config.roles.items() if not name.endswith("w3")}  # noqa: RUF012


def test_a_module_without_a_role_is_refused_before_a_rank_starts() -> None:
    with pytest.raises(PlanError) as caught:
        plan(make_run({"seq_len": 64}, model=Mine(**TINY), parallel="tp2"))
    (told,) = caught.value.problems
    assert told.startswith("parallel.tensor=2 finds no role for layers.0.feed_forward.w3")
    assert "Mine.roles" in told
    assert plan(make_run({"seq_len": 64}, model=Mine(**TINY), parallel="fsdp2")).world == 2


def test_a_family_without_a_form_there_is_told_so() -> None:
    config = Mine(**TINY)
    (told,) = export_problems(config)
    assert told.startswith("model.family=mine has no form in Hugging Face checkpoints")
    for asked in (config_json, stored):
        with pytest.raises(CheckpointError, match=r"model\.family=mine"):
            asked(config)
