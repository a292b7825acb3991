"""Linear weights in float8 with a scale for each block of 128 x 128, cut anywhere."""

import json
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from src.checkpoint.host_group import HostGroup
from src.distributed.mesh import Mesh
from src.distributed.process.rank_context import RankContext as Joined
from src.hugging_face.archive import Archive
from src.hugging_face.check import SCALE, check
from src.hugging_face.load import examine, load
from src.hugging_face.save import Form, save
from src.hugging_face.write import Files, held
from src.models.hugging_face import config_json, stored
from src.models.stored import rotary_row
from src.train.setup import build_uninitialized
from tests.checkpoint.options import problems
from tests.hugging_face.foreign import config_of, edit, saved
from tests.hugging_face.test_import import imported
from tests.hugging_face.test_import import tensors as named
from tests.hugging_face.test_round_trips import LAYOUTS, WORLDS, contents, digest, largest, network_of
from tests.ranks import RankPool
from tests.train.runs import changed, make_run, section

FORM = Form(dtype="bfloat16", fp8=True, biases=True, shard_bytes=3_000_000)
QUANTISED = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


def write(name: str, layout: str, folder: Path) -> None:
    network = network_of(name, layout)
    config = network.stages[0].config
    save(HostGroup(), folder, held(network.tensors()), config, FORM, {}, largest, torch.device("cpu"))


def multiplied(values: Tensor, scale: Tensor) -> Tensor:
    """The whole matrix, by the plain formula."""
    rows, columns = values.shape
    return torch.stack(
        [torch.stack([scale[r // 128, c // 128] for c in range(columns)]) * values[r].float() for r in range(rows)]
    )


@pytest.mark.parametrize(
    ("name", "layout"), [pytest.param("llama3", "fsdp3", marks=pytest.mark.slow), ("deepseek_v3", "fsdp2_ep2")]
)
def test_every_layout_finds_the_same_scales(ranks: RankPool, tmp_path: Path, name: str, layout: str) -> None:
    """A block may lie in the shards of two ranks."""
    ranks(1, write, name, "single", tmp_path / "single")
    ranks(WORLDS[layout], write, name, layout, tmp_path / layout)
    assert digest(tmp_path / f"{layout}.partial") == digest(tmp_path / "single.partial")


def test_rounding_is_bounded_and_only_linear_weights_are_rounded(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1, write, "deepseek_v3", "single", tmp_path / "x")
    ranks(1, exact, "deepseek_v3", tmp_path / "exact")
    written, exactly = contents(tmp_path / "x.partial"), contents(tmp_path / "exact.partial")
    scaled = {key for key in exactly if f"{key}{SCALE}" in written}
    assert {key for key, tensor in written.items() if tensor.dtype == torch.float8_e4m3fn} == scaled
    plain = {".".join(key.split(".")[-2:]) for key in exactly.keys() - scaled}
    norms = {
        "kv_a_layernorm.weight",
        "q_a_layernorm.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    others = {"embed_tokens.weight", "norm.weight", "lm_head.weight", "gate.weight", "gate.e_score_correction_bias"}
    assert plain == norms | others
    for key in scaled:
        scale, values = written[f"{key}{SCALE}"], written[key].float()
        assert scale.shape == tuple(ceil(size / 128) for size in values.shape)
        whole = scale.repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)[:, : values.shape[1]]
        # Three bits behind the point, and steps of 2^-9 below 2^-6.
        bound = torch.maximum(exactly[key].abs() / 16, whole * 2**-10) * 1.001
        assert bool(((values * whole - exactly[key]).abs() <= bound).all()), key
        assert values.abs().max() == 448


def exact(name: str, folder: Path) -> None:
    network, form = network_of(name, "single"), Form("float32", fp8=False, biases=True, shard_bytes=10**9)
    save(HostGroup(), folder, held(network.tensors()), network.stages[0].config, form, {}, largest, torch.device("cpu"))


def released(folder: Path) -> dict[str, Tensor]:
    """DeepSeek-V3 as released, with sizes that are no multiples of 128; the weights that it means, in float32."""
    saved("deepseek-v3", folder, shard="1GB")
    values = contents(folder)
    generator = torch.Generator().manual_seed(0)
    meant, files = dict(values), dict(values)
    for key, tensor in values.items():
        linear = tensor.dim() == 2 and "layers" in key and not key.endswith("mlp.gate.weight")
        if not linear:
            files[key] = meant[key] = tensor if "bias" in key else tensor.bfloat16()
            continue
        shape = tuple(ceil(size / 128) for size in tensor.shape)
        files[f"{key}{SCALE}"] = torch.rand(shape, generator=generator) + 0.5
        files[key] = tensor.to(torch.float8_e4m3fn)
        meant[key] = multiplied(files[key].float(), files[f"{key}{SCALE}"])
    mtp = {f"model.layers.3.{name}.weight": torch.ones(3, 3) for name in ("eh_proj", "self_attn.q_a_proj")}
    mtp[f"model.layers.3.self_attn.q_a_proj.weight{SCALE}"] = torch.ones(1, 1)
    (folder / "model.safetensors").unlink()
    halves = [dict(list((files | mtp).items())[place::2]) for place in range(2)]
    for place, half in enumerate(halves):
        save_file(half, folder / f"model-{place:05d}-of-00002.safetensors")
    where = {key: f"model-{place:05d}-of-00002.safetensors" for place, half in enumerate(halves) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    edit(folder / "config.json", num_nextn_predict_layers=1, **QUANTISED)
    return meant


def test_a_released_form_is_read_whole(tmp_path: Path) -> None:
    meant = released(tmp_path)
    model = imported(tmp_path, config_of(tmp_path))
    found = named(model)
    for layer in (1, 2):
        for ours, theirs in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
            expected = [meant[f"model.layers.{layer}.mlp.experts.{expert}.{theirs}.weight"] for expert in range(12)]
            assert torch.equal(found[f"layers.{layer}.moe.experts.{ours}"], torch.stack(expected))
    kv = "kv_a_proj_with_mqa"
    assert torch.equal(found["layers.0.attention.wkv_a.weight"], meant[f"model.layers.0.self_attn.{kv}.weight"])
    told = "3 keys are not read: multi-token prediction; model.mtp.depths=1 reads it"
    assert examine(tmp_path, config_of(tmp_path)) == [told]


def odd(folder: Path) -> None:
    """A llama whose every matrix is odd, in float8."""
    saved("llama-wide-heads", folder, shard="1GB")
    values = contents(folder)
    for key in [key for key in values if "proj" in key]:
        shape = tuple(ceil(size / 128) for size in values[key].shape)
        scale = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
        values |= {key: values[key].to(torch.float8_e4m3fn), f"{key}{SCALE}": scale}
    save_file(values, folder / "model.safetensors")
    edit(folder / "config.json", **QUANTISED)


def test_shards_that_begin_inside_of_a_block(ranks: RankPool, tmp_path: Path) -> None:
    """200 rows over three ranks, also of matrices whose rows have another order here."""
    odd(tmp_path)
    for layout in ("fsdp3", "tp2_fsdp2"):
        for wrong in ranks(WORLDS[layout], compare, tmp_path, layout):
            assert wrong == []


def compare(folder: Path, layout: str) -> list[str]:
    """Names of shards that differ from cuts of the whole."""
    config = config_of(folder)
    degrees = changed(section("parallel", "single"), **LAYOUTS[layout])
    joined = Joined.join("cpu", degrees.world, timeout_seconds=60.0)
    network = build_uninitialized(make_run(model=config, parallel=degrees), joined, Mesh(degrees, "cpu"))
    load(folder, network.tensors(), config)
    whole, files = named(imported(folder, config)), contents(folder)
    wrong = [key for key, tensor in network.tensors().items() if not torch.equal(tensor.full_tensor(), whole[key])]  # type: ignore[attr-defined]
    for layer in range(3):
        key = f"model.layers.{layer}.self_attn.q_proj.weight"
        there = multiplied(files[key].float(), files[f"{key}{SCALE}"])
        rows = [rotary_row(row, len(there), 8) for row in range(len(there))]
        wrong += [key] if not torch.equal(whole[f"layers.{layer}.attention.wq.weight"], there[rows]) else []
    return wrong


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("scale", "dtype float8_e4m3fn found without its model.layers.0.mlp.up_proj.weight_scale_inv"),
        ("shape", "weight_scale_inv: float32 [1, 1] found, float32 or float8_e8m0fnu [2, 1] expected"),
        ("config", "dtype float8_e4m3fn found, but config.json has no quantization_config"),
        ("norm", "model.norm.weight: dtype float8_e4m3fn found, float32 or bfloat16 or float16 expected"),
        ("method", 'quant_method="awq"'),
    ],
)
def test_what_misses_its_scale_is_refused(tmp_path: Path, change: str, said: str) -> None:
    odd(tmp_path)
    config, values, key = config_of(tmp_path), contents(tmp_path), "model.layers.0.mlp.up_proj.weight"
    changes: dict[str, Any] = {
        "shape": {f"{key}{SCALE}": torch.ones(1, 1)},
        "norm": {"model.norm.weight": values["model.norm.weight"].to(torch.float8_e4m3fn)},
    }
    values |= changes.get(change, {})
    if change == "scale":
        del values[f"{key}{SCALE}"]
    save_file(values, tmp_path / "model.safetensors")
    if change == "config":
        edit(tmp_path / "config.json", quantization_config=None)
    if change == "method":
        edit(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
    told = problems(examine, tmp_path, config)
    assert said in told[0], told


def test_an_index_of_the_671b_shape(tmp_path: Path) -> None:
    """61 layers of 256 experts: 90,000 keys with their scales, of tiny matrices, in many files."""
    whole = section("model", "deepseek_v3_671b")
    tiny = dict.fromkeys(
        ("dim", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"), 8
    )
    moe = changed(whole.moe, hidden_dim=8)
    config = changed(whole, **tiny, n_heads=2, vocab_size=16, ffn_dim=8, moe=moe)
    files = Files.plan(tmp_path, stored(config), "bfloat16", fp8=True, shard_bytes=50_000)
    files.make()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(files.index()))
    (tmp_path / "config.json").write_text(json.dumps(config_json(config) | QUANTISED))
    archive = Archive.open(tmp_path)
    experts = 58 * 256 * 3
    assert 2 * experts < len(archive.entries) < 2 * experts + 61 * 30
    assert len(files.headers) > 50
    assert check(archive, config) == []
    assert config_of(tmp_path) == config
