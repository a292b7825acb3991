"""The memory estimate: its arithmetic, and its parts against real tensors."""

import json
from typing import Any

import pytest
import torch

from src.distributed.mesh import Mesh
from src.distributed.tensor.tensor_parallel import split_tensor
from src.errors import PlanError
from src.models.accounting import Slice
from src.planning.advice import memory_savings
from src.planning.memory import GIB, Load, Memory, estimate
from src.planning.plan import load_of, plan
from tests.distributed.layouts import degrees, parallel_model
from tests.models.shapes import tiny_llama
from tests.ranks import RankPool
from tests.train.runs import Gpus, Here, changed, make_run, section

EIGHT = {"seq_len": 8192, "micro_batch": 1, "global_batch": 4}
PARAMETERS = 8_030_261_248


def load(parallel: Any = "single", task: dict[str, int] = EIGHT, **choices: Any) -> Load:
    presets = {"model": "llama3_8b", "precision": "bf16", "compile": "blocks"}
    return load_of(make_run(task, parallel=parallel, **(presets | choices)))


def memory(parallel: Any = "single", task: dict[str, int] = EIGHT, **choices: Any) -> Memory:
    return estimate(load(parallel, task, **choices))


def test_sharding_divides_what_rests() -> None:
    single, shared = memory("single"), memory("fsdp4")
    assert single.parameters == 4 * PARAMETERS
    assert single.optimizer == 8 * PARAMETERS
    for part in ("parameters", "optimizer"):
        assert getattr(single, part) == 4 * getattr(shared, part)
    assert shared.gradients == shared.parameters  # one micro-batch: reduced at once
    assert single.activations == shared.activations


def test_copies_share_nothing() -> None:
    assert memory("ddp4").parameters == memory("single").parameters
    assert memory("hsdp2x4", EIGHT | {"global_batch": 8}).parameters == memory("fsdp4").parameters


def test_tensor_parallelism_divides_matrices_and_words() -> None:
    single, split = memory("single"), memory("tp2")
    norms = 65 * 4096
    assert split.parameters == 4 * ((PARAMETERS - norms) // 2 + norms)
    gathered = 32 * 2 * 4096 * 8192 * 2  # bytes: the norms' outputs are whole on each rank
    assert split.activations == (single.activations - gathered) / 2 + gathered


def test_bytes_of_each_dtype() -> None:
    full = memory("fsdp4", precision="bf16_full", optim="adamw_bf16")
    assert full.parameters == 2 * PARAMETERS / 4
    assert full.optimizer == 4 * PARAMETERS / 4
    wide = memory("fsdp4", precision="fp32")
    assert wide.gathered == 2 * memory("fsdp4").gathered
    statistics = 32 * (32 + 2) * 8192 * 4  # log sum exp and 1/rms are fp32 in both
    assert wide.activations - statistics == 2 * (memory("fsdp4").activations - statistics)


def test_gradients_between_synchronisations_are_whole() -> None:
    twice = EIGHT | {"global_batch": 8}
    assert load("fsdp4", twice).micro_batches == 2
    assert memory("fsdp4", twice).gradients == 4 * PARAMETERS
    assert memory("fsdp4", twice, precision="bf16_reduce16").gradients == 2 * PARAMETERS
    synchronised = changed(section("parallel", "fsdp4"), sync_each_micro_batch=True)
    assert memory(synchronised, twice).gradients == PARAMETERS
    assert memory(synchronised, twice).peak == pytest.approx(memory("fsdp4").peak + 1.02 * PARAMETERS)


def test_never_resharding_holds_the_whole_model() -> None:
    never = changed(section("parallel", "fsdp4"), reshard="never")
    assert memory(never).gathered == 2 * PARAMETERS
    block = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336 + 2)
    head = 128256 * 4096 + 4096
    assert memory("fsdp4").gathered == 2 * (2 * block + head)


def test_full_recompute_keeps_inputs_and_one_block() -> None:
    kept, again = memory("fsdp4"), memory("fsdp4", recompute="full")
    assert again.activations == 32 * 4096 * 8192 * 2
    assert again.working == (kept.activations - again.activations) // 32 + kept.working


def test_activations_grow_with_tokens_alone() -> None:
    one, two = memory("fsdp4"), memory("fsdp4", EIGHT | {"micro_batch": 2, "global_batch": 8})
    assert two.activations == 2 * one.activations
    assert (two.parameters, two.gathered) == (one.parameters, one.gathered)


def test_peak_is_the_worst_moment() -> None:
    found = memory("fsdp4")
    assert found.at_loss == (found.parameters + found.optimizer + found.gathered + found.activations + found.loss)
    assert found.at_update == found.parameters + found.optimizer + found.gradients
    assert found.allocated == max(found.at_loss, found.at_backward, found.at_update)
    assert found.peak == found.allocated + found.fragmentation + found.runtime


def test_the_peers_measured_peak_is_explained() -> None:
    """The reference stack measured 71.2 GiB for this work with whole logits: bf16, fp32, and the gradient of each."""
    found = memory("fsdp4")
    logits = 8192 * 128256 * (2 + 4 + 4 + 2)
    theirs = found.allocated - found.loss + logits
    assert theirs / GIB == pytest.approx(71.2, rel=0.05)


def test_what_does_not_fit_says_what_would() -> None:
    run = make_run(
        EIGHT | {"micro_batch": 2, "global_batch": 16},
        cluster=Here(gpu_memory_gib=79.6),
        model="llama3_8b",
        parallel="fsdp4",
        precision="bf16",
        compile="blocks",
    )
    with pytest.raises(PlanError) as caught:
        plan(run)
    (problem,) = caught.value.problems
    needed = estimate(load_of(run)).peak / GIB
    assert problem.startswith(
        f"does not fit: {needed:.1f} GiB a GPU, there are 79.6 GiB. Largest: activations 68.1 GiB"
    )
    assert "recompute=full frees" in problem
    # Each knob told to be enough is enough, and no other is.
    for words, other in memory_savings(load_of(run)):
        enough = estimate(other).peak <= 79.6 * GIB
        told = [part for part in problem.split(". ")[-1].split("; ") if part.startswith(words)]
        assert all(part.endswith("and fits") == enough for part in told)
        assert told or not enough


def test_one_knob_that_is_turned_twice_fits_alone() -> None:
    task = {"seq_len": 8192, "micro_batch": 1, "global_batch": 512}
    with pytest.raises(PlanError, match=r"; parallel\.tensor=4 fits$"):
        plan(make_run(task, Here(gpu_memory_gib=40.0), model="llama3_8b", parallel=changed(section("parallel", "fsdp8"),
                      reshard="never"), precision="bf16", compile="blocks"))  # fmt: skip


def test_knobs_are_turned_together_when_one_is_not_enough() -> None:
    task = {"seq_len": 8192, "micro_batch": 1, "global_batch": 64}
    choices = {"model": "llama3_405b", "precision": "bf16", "cluster": Here(gpu_memory_gib=79.6)}
    with pytest.raises(PlanError) as caught:
        plan(make_run(task, parallel="fsdp8", **choices))
    (problem,) = caught.value.problems
    assert "and fits" not in problem
    offer = problem.split("together ")[1].removesuffix(" fit").split()
    keys = dict(words.removeprefix("parallel.").split("=") for words in offer if words.startswith("parallel."))
    layout = {key: json.loads(value) for key, value in keys.items()}
    groups = dict(words.split("=") for words in offer if not words.startswith("parallel."))
    parallel = changed(section("parallel", "fsdp8"), **layout)
    assert plan(make_run(task, parallel=parallel, **(choices | groups))).fits is True


def test_the_device_sets_the_limit_unless_the_config_does() -> None:
    run = make_run(EIGHT, model="llama3_8b", parallel="fsdp4", precision="bf16", compile="blocks")
    assert plan(run, devices=Gpus(4, 139.8)).fits is True
    with pytest.raises(PlanError, match=r"there are 40\.0 GiB"):
        plan(run, devices=Gpus(4, 40.0))
    roomy = make_run(
        EIGHT,
        cluster=Here(gpu_memory_gib=140.0),
        model="llama3_8b",
        parallel="fsdp4",
        precision="bf16",
        compile="blocks",
    )
    assert plan(roomy, devices=Gpus(4, 40.0)).fits is True


@pytest.mark.parametrize("layout", ["fsdp2", "hsdp2x2", "tp2", "tp2_fsdp2"])
@pytest.mark.parametrize("tied", [False, True])
def test_shares_are_those_of_real_ranks(ranks: RankPool, layout: str, tied: bool) -> None:
    config = tiny_llama(tie_word_embeddings=tied, multiple_of=4, vocab_size=90)
    world = degrees(layout)
    held = ranks(world.world, _held_elements, config, layout)
    found = plan(make_run({"seq_len": 64, "global_batch": 16}, model=config, parallel=world))
    assert max(held) == found.parameters_per_gpu


def _held_elements(config: Any, layout: str) -> int:
    model, _ = parallel_model(config, degrees(layout))
    unique = {id(parameter): parameter for parameter in model.parameters()}
    return sum(_local(parameter).numel() for parameter in unique.values())


def _local(parameter: Any) -> Any:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def test_a_split_block_keeps_its_share(ranks: RankPool) -> None:
    """Under tensor parallelism with sequence parallelism, cut into forward and backward as inductor does it."""
    config = tiny_llama()
    cut = Slice(tokens=2 * 96, tensor=2, element_bytes=2, compiled=True)
    assert ranks(2, _kept_by_split_block, config) == [config.saved_by_block(cut).whole] * 2


def _kept_by_split_block(config: Any) -> int:
    mesh = Mesh(degrees("tp2"), "cpu")
    model = config.build()
    model.layers.to(torch.bfloat16)
    split_tensor(model, mesh.tensor)
    block = model.layers["0"]
    x = torch.randn(
        2, 96 // 2, config.dim, dtype=torch.bfloat16, requires_grad=True
    )  # this rank's half of the sequence
    known = {_local(tensor).untyped_storage().data_ptr() for tensor in (*block.parameters(), model.rotary)}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = _local(tensor).untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result, _ = forward(x, model.rotary, None)
    assert result.shape == x.shape
    return sum(size for pointer, size in kept.items() if pointer not in known)


def test_the_fullest_rank_of_a_pipeline() -> None:
    """Llama 3 8B on two ranks of 16 layers: the first keeps two micro-batches of each, the second one and the head."""
    sixteen = EIGHT | {"global_batch": 16}
    whole, halves = memory("single", sixteen), memory("pp2", sixteen)
    block = whole.activations // 32
    hidden = 8192 * 4096 * 2  # bytes
    assert halves.activations == 2 * 16 * block + 16 * hidden  # and a buffer for each gradient that comes back
    assert halves.loss == 0
    assert halves.parameters == 4 * (128256 * 4096 + 16 * 218_112_000)
    gpipe = changed(section("parallel", "pp2"), pipeline_schedule="GPipe")
    # All sixteen wait, and on the rank of the head each with its gradient of the head and of the head's input.
    heads = 15 * ((128256 * 4096 + 4096) * 2 + 2 * hidden)
    assert memory(gpipe, sixteen).activations == 16 * 16 * block + 16 * hidden + heads


def test_a_knob_leaves_enough_micro_batches() -> None:
    turned = dict(memory_savings(load("pp2", EIGHT | {"global_batch": 2})))
    assert "parallel.shard=2" not in turned  # it would leave one micro-batch for two stages
    assert "parallel.sync_each_micro_batch=true" not in turned
    assert turned["parallel.reshard=always"].degrees.reshard == "always"
