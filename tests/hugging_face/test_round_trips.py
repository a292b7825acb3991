"""Native weights to Hugging Face's layout and back, on every layout: the same bits in the files and in the shards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.checkpoint.host_group import HostGroup
from src.distributed.init_weights import initialise, seed_of
from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages
from src.distributed.process.rank_context import RankContext as Joined
from src.hugging_face.archive import INDEX, Archive
from src.hugging_face.load import load
from src.hugging_face.read import Reader
from src.hugging_face.save import Form, publish, save
from src.hugging_face.write import held
from src.models.hugging_face import stored
from src.train.setup import build_uninitialized
from tests.hugging_face.foreign import config_of, saved
from tests.ranks import RankPool
from tests.train.runs import changed, make_run, section

# Degrees; a third begins anywhere in a head, and in a block of 128.
LAYOUTS: dict[str, dict[str, int]] = {
    "single": {},
    "fsdp3": {"shard": 3},
    "tp2_fsdp2": {"tensor": 2, "shard": 2},
    "hsdp2x2": {"replicate": 2, "shard": 2},
    "pp2_fsdp2": {"pipeline": 2, "shard": 2},
    "fsdp2_ep2": {"shard": 2, "expert": 2},
    "fsdp4_ep2": {"shard": 4, "expert": 2},
    "tp2_fsdp2_ep2": {"tensor": 2, "shard": 2, "expert": 2, "expert_tensor": 2},
}
WORLDS = {
    "single": 1,
    "fsdp3": 3,
    "tp2_fsdp2": 4,
    "hsdp2x2": 4,
    "pp2_fsdp2": 4,
    "fsdp2_ep2": 2,
    "fsdp4_ep2": 4,
    "tp2_fsdp2_ep2": 4,
}
SMALL = {"n_layers": 2, "vocab_size": 500}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama3_debug", {**SMALL, "n_kv_heads": 4}),
    "llama3-tied": ("llama3_debug", {**SMALL, "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe_debug", {**SMALL, "head_dim": 48}),
    "deepseek_v3": ("deepseek_v3_debug", {**SMALL, "q_lora_rank": 72, "dim": 136, "ffn_dim": 200}),
}
ON = {
    "llama3": ("single", "fsdp3", "tp2_fsdp2", "hsdp2x2", "pp2_fsdp2"),
    "llama3-tied": ("single", "tp2_fsdp2"),
    "qwen3_moe": ("single", "fsdp2_ep2", "pp2_fsdp2", "tp2_fsdp2_ep2"),
    "deepseek_v3": ("single", "hsdp2x2", "pp2_fsdp2", "fsdp2_ep2", "fsdp4_ep2", "tp2_fsdp2", "tp2_fsdp2_ep2"),
}
FORM = Form(dtype="float32", fp8=False, biases=True, shard_bytes=2_000_000)


def model_of(name: str) -> Any:
    option, changes = MODELS[name]
    return changed(section("model", option), **changes)


def network_of(name: str, layout: str) -> ModelStages:
    """With weights by their names' seeds, the same in every layout, and biases that are not zero."""
    degrees = changed(section("parallel", "single"), **LAYOUTS[layout])
    run = make_run(model=model_of(name), parallel=degrees)
    joined = Joined.join("cpu", degrees.world, timeout_seconds=60.0)
    network = build_uninitialized(run, joined, Mesh(degrees, "cpu"))
    for part in network.stages:
        initialise(part, 0)
    for key, tensor in network.tensors().items():
        if key.endswith("expert_bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed_of(1, key))))
    return network


def largest(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def there_and_back(name: str, layout: str, folder: Path, form: Form) -> tuple[list[str], int, int]:
    """Names of what came back otherwise; bytes that this rank read, and those of all it holds."""
    network = network_of(name, layout)
    before = {key: local(tensor).clone() for key, tensor in network.tensors().items()}
    parts, config = held(network.tensors()), network.stages[0].config
    team = HostGroup()
    draft = save(team, folder, parts, config, form, {"config.json": b"{}"}, largest, torch.device("cpu"))
    team.on_rank_zero(lambda: publish(draft, folder))
    with torch.no_grad():
        for tensor in network.tensors().values():
            local(tensor).fill_(float("nan"))
    reader = Reader(Archive.open(folder), piece_bytes=10_000)
    reader.fill(network.tensors(), stored(config))
    wrong = [key for key, tensor in network.tensors().items() if not torch.equal(local(tensor), before[key])]
    return wrong, reader.bytes_read, sum(tensor.nbytes for tensor in before.values())


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_writes_the_same_files_and_reads_its_own_bytes(ranks: RankPool, tmp_path: Path, name: str) -> None:
    written = {}
    for layout in ON[name]:
        results = ranks(WORLDS[layout], there_and_back, name, layout, tmp_path / layout, FORM)
        assert [wrong for wrong, _, _ in results] == [[]] * WORLDS[layout], layout
        assert [read for _, read, _ in results] == [held for _, _, held in results], layout
        written[layout] = digest(tmp_path / layout)
    assert len(written["single"]) > 3, "several files"
    assert all(files == written["single"] for files in written.values())


def test_the_index_tells_all_bytes(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1, there_and_back, "deepseek_v3", "single", tmp_path / "x", FORM)
    archive = Archive.open(tmp_path / "x")
    index, tensors = json.loads((tmp_path / "x" / INDEX).read_text()), contents(tmp_path / "x")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values()) == archive.bytes
    assert index["weight_map"].keys() == tensors.keys()
    for file in (tmp_path / "x").glob("*.safetensors"):
        inside = [tensor.nbytes for tensor in load_file(file).values()]
        assert len(inside) == 1 or file.stat().st_size <= FORM.shard_bytes
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "llama-wide-heads", "deepseek-v3", "deepseek-v2", "qwen3-tied", "qwen3-moe"]
)
def test_what_transformers_wrote_comes_back_with_equal_keys_and_bits(
    name: str, tmp_path: Path, ranks: RankPool
) -> None:
    saved(name, tmp_path / "theirs")
    ranks(2, rewrite, tmp_path, name)
    ours, theirs = (contents(tmp_path / folder) for folder in ("ours.partial", "theirs"))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def rewrite(folder: Path, name: str) -> None:
    config = config_of(folder / "theirs")
    degrees = changed(section("parallel", "single"), shard=2)
    joined = Joined.join("cpu", 2, timeout_seconds=60.0)
    network = build_uninitialized(make_run(model=config, parallel=degrees), joined, Mesh(degrees, "cpu"))
    load(folder / "theirs", network.tensors(), config)
    form = Form("float32", fp8=False, biases=name == "deepseek-v3", shard_bytes=10**9)
    parts = held(network.tensors())
    save(HostGroup(), folder / "ours", parts, config, form, {}, largest, torch.device("cpu"))


def contents(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
