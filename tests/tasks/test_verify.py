"""The proof that a layout trains like one device: it passes, or names the culprit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

import launch
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.init_weights import initialise
from src.distributed.mesh import Mesh
from src.distributed.process.rank_context import RankContext as Process
from src.errors import PlanError
from src.models.moe.moe import MoE
from src.models.moe.moe import balance as right
from src.planning.plan import one_device_problems, plan
from src.run import Run
from src.runs.folder import attempts
from src.tasks.verify.certificate import (
    SMALL,
    TOLERANCES,
    Certificate,
    Gradient,
    LayerRouting,
    Trace,
    compare,
)
from src.tasks.verify.config import Verify
from src.tasks.verify.rank import certify, rows
from src.train.step.stepper import Stepper
from tests.distributed.layouts import rows as batch_of
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool
from tests.train.runs import Here, changed, make_run, section

HOME = Path(__file__).resolve().parents[2]
TASK = Verify(steps=2, seq_len=32, global_batch=8, micro_batch=1, z_loss=0.0, router_z_loss=0.0)
TINY = (
    *("task=verify", "task.steps=1", "task.seq_len=32", "task.global_batch=2", "cluster.gpus=0"),
    *("model.dim=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=4", "model.vocab_size=64"),
    *("model.multiple_of=16", "schedule.warmup_steps=0", "schedule.decay_ratio=0"),
)


def run_of(layout: str, model: dict[str, Any] | None = None, **choices: Any) -> Run:
    config = tiny_llama(**(model or {}))
    return replace(make_run(model=config, parallel=layout, **choices), task=TASK)


@contextmanager
def averaged() -> Iterator[None]:
    """FSDP's own habit: the mean over ranks."""
    names = ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms")
    with patch.multiple(FSDPModule, **{name: lambda *_: None for name in names}):
        yield


@contextmanager
def unreduced() -> Iterator[None]:
    """A parameter that tensor ranks share keeps the gradient of this rank's part of the sequence."""
    with patch.object(FSDPParam, "_get_grad_inner_tensor", lambda _, grad: getattr(grad, "_local_tensor", grad)):
        yield


@contextmanager
def own_mean() -> Iterator[None]:
    """Each rank divides by its own count of labels: a mean of means."""

    def count(stepper: Stepper, mine: torch.Tensor) -> torch.Tensor:
        return mine * torch.tensor([stepper.mesh.data_ranks, 0, 0])

    with patch.object(Stepper, "_totals", count):
        yield


@contextmanager
def double_norm() -> Iterator[None]:
    squares = Gradients.squares
    with patch.object(Gradients, "squares", lambda gradients: 4 * squares(gradients)):
        yield


GPUS = torch.cuda.device_count() or 4  # without any the tests are left out
ON_GPUS = [
    layout
    for layout in ("single", "fsdp4", "tp2_fsdp2", "tp4", "cp2_fsdp2", "pp2_fsdp2", "hsdp2x2")
    if section("parallel", layout).world <= GPUS
]


@contextmanager
def own_counts() -> Iterator[None]:
    """Each rank balances by the tokens that it saw itself."""
    with patch.object(Mesh, "sum_over_tokens", lambda _mesh, counts: counts):
        yield


@contextmanager
def away_from_balance() -> Iterator[None]:
    """Experts with many tokens are made easier to choose, in the layout and on the single device."""

    def balance(layers: list[MoE], summed: Any, applied: torch.Tensor) -> None:
        right(layers, summed, -applied)

    with patch("src.models.decoder.balance", balance):
        yield


BREAKS = {
    "averaged": averaged,
    "unreduced": unreduced,
    "own_mean": own_mean,
    "own_counts": own_counts,
    "away_from_balance": away_from_balance,
}


def certified(run: Run, broken: str | None = None) -> Certificate:
    """On one rank of the gloo world."""
    with BREAKS[broken]() if broken else nullcontext():
        ranks = Process.join("cpu", run.parallel.world, timeout_seconds=60)
        assert isinstance(run.task, Verify)
        return certify(run.task, run, ranks, {})


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "fsdp2_ep2"])
def test_z_losses_are_those_of_one_device(ranks: RankPool, layout: str) -> None:
    """Of logits over a cut vocabulary, and of routers whose tokens all tensor ranks route, or each its own."""
    task = changed(TASK, steps=1, z_loss=0.1, router_z_loss=0.1)
    run = replace(make_run(model=tiny_deepseek(n_layers=2), parallel=layout), task=task)
    plain = ranks(2, certified, replace(run, task=changed(TASK, steps=1)))[0]
    for certificate in ranks(2, certified, run):
        assert certificate.failed == []
        norms = {each.name: each.expected for each in certificate.differences if each.kind == "gradient"}
        without = {each.name: each.expected for each in plain.differences if each.kind == "gradient"}
        for name in ("output.weight", "layers.1.moe.router.gate.weight"):
            assert norms[name] > 1.05 * without[name]


@pytest.mark.parametrize(
    ("layout", "model", "choices"),
    [
        pytest.param("single", {}, {}, id="single"),
        pytest.param("tp2_fsdp2", {}, {}, id="tp2_fsdp2", marks=pytest.mark.slow),
        pytest.param("hsdp2x2", {"tie_word_embeddings": True}, {"recompute": "full"}, id="hsdp2x2-tied-recompute"),
    ],
)
def test_a_right_layout_passes(ranks: RankPool, layout: str, model: dict[str, Any], choices: dict[str, Any]) -> None:
    results = ranks(section("parallel", layout).world, certified, run_of(layout, model, **choices))
    for certificate in results:
        assert certificate.failed == []
        assert certificate.to_dict() == results[0].to_dict()
    parameters = {each.name for each in results[0].differences if each.kind == "gradient"}
    assert parameters == {weight.name for weight in tiny_llama(**model).weights()}
    # Far inside the tolerances, but not the same numbers twice: the two ways really differ.
    assert results[0].worst("gradient", "direction") < 1e-5
    assert layout == "single" or results[0].worst("gradient", "direction") > 0


@pytest.mark.slow
def test_bfloat16_passes_its_own_tolerances(ranks: RankPool) -> None:
    certificate = ranks(4, certified, run_of("tp2_fsdp2", precision=section("precision", "bf16")))[0]
    assert certificate.failed == []
    assert 1e-4 < certificate.worst("gradient", "direction") < TOLERANCES["bfloat16"].gradient


@pytest.mark.parametrize(("layout", "broken"), [("fsdp2", "averaged"), ("tp2", "unreduced")])
def test_a_wrong_sum_is_beyond_the_tolerances_of_bfloat16(ranks: RankPool, layout: str, broken: str) -> None:
    certificate = ranks(2, certified, run_of(layout, precision=section("precision", "bf16")), broken)[0]
    assert {"gradient", "direction"} & {each.kind for each in certificate.failed}


def culprits(certificate: Certificate) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for each in certificate.failed:
        found.setdefault(each.kind, set()).add(each.name)
    return found


def test_a_mean_in_place_of_a_sum_is_seen_in_every_parameter(ranks: RankPool) -> None:
    """AdamW does not mind the scale of gradients: losses agree, and only gradients tell."""
    found = culprits(ranks(2, certified, run_of("fsdp2"), "averaged")[0])
    assert found["gradient"] == {weight.name for weight in tiny_llama().weights()}
    assert "loss" not in found


def test_a_missing_reduction_over_tensor_ranks_is_seen_where_it_is(ranks: RankPool) -> None:
    found = culprits(ranks(2, certified, run_of("tp2"), "unreduced")[0])
    norms = {weight.name for weight in tiny_llama().weights() if "norm" in weight.name}
    wrong = found["gradient"] | found["direction"]
    assert wrong - {"tok_embeddings.weight"} == norms  # the table's gradient is reduced there too


def test_a_mean_of_means_is_seen(ranks: RankPool) -> None:
    found = culprits(ranks(2, certified, run_of("fsdp2"), "own_mean")[0])
    assert "step 1" in found["loss"]
    assert len(found["direction"]) > len(tiny_llama().weights()) / 2


EXPERTS = {f"layers.{layer}" for layer in (1, 2)}


def routed(layout: str, **choices: Any) -> Run:
    return replace(run_of(layout, **choices), model=tiny_deepseek())


def test_loads_and_biases_of_experts_are_certified(ranks: RankPool) -> None:
    """Whole numbers and a rule: in fp32 they are the same."""
    certificate = ranks(4, certified, routed("tp2_fsdp2_ep2"))[0]
    assert certificate.failed == []
    for kind in ("load", "bias"):
        found = [each for each in certificate.differences if each.kind == kind]
        assert {each.name for each in found} == EXPERTS
        assert certificate.worst(kind) < 1e-4
        assert any(each.expected for each in found), "something was counted, and learned"
    assert {"load", "bias"} <= certificate.to_dict()["largest_error"].keys()
    assert len(certificate.tables()) == 3


def test_biases_of_one_ranks_tokens_are_seen(ranks: RankPool) -> None:
    """Losses and gradients agree: only the loads tell."""
    found = culprits(ranks(2, certified, routed("fsdp2"), "own_counts")[0])
    assert found == {"load": EXPERTS}


def test_a_wrong_rule_is_seen_though_one_device_has_it_too(ranks: RankPool) -> None:
    found = culprits(ranks(2, certified, routed("fsdp2"), "away_from_balance")[0])
    assert found == {"bias": EXPERTS}


def test_the_furthest_rank_speaks_for_a_layer() -> None:
    """Two experts, rate 0.1, two steps: the first expert has too many tokens twice, once none has."""
    right = LayerRouting(((6, 2), (4, 4)), (-0.1, 0.1), 0.1)

    def failed(*layer: LayerRouting) -> dict[str, float]:
        trace = Trace([1.0], [1.0], {"a": Gradient(1.0, 0.5)}, {"layers.3": layer})
        alone = replace(trace, routing={"layers.3": [right]})
        return {each.kind: each.error for each in compare(trace, alone, TOLERANCES["float32"]) if not each.passed}

    assert failed(right, right) == {}
    moved = replace(right, loads=((5, 3), (4, 4)))
    assert failed(right, moved) == {"load": pytest.approx(1 / 8)}
    assert failed(right, replace(right, loads=((3, 1), (4, 4)))) == {"load": 1.0}  # half of the choices
    assert failed(right, replace(right, bias=(-0.1, 0.0))) == {"bias": pytest.approx(1.0)}
    assert failed(right, replace(right, rate=None, bias=(0.0, 0.0))) == {}
    assert failed(right, replace(right, rate=None)) == {"bias": pytest.approx(0.1)}
    assert failed(right, replace(right, bias=(float("nan"), 0.1))) == {"bias": float("inf")}


def test_rows_are_the_same_whoever_reads_them() -> None:
    run = run_of("fsdp2", {"attention": "flex", "mask": "block_causal"})
    alone = rows(TASK, run, rank=0, ranks=1)
    apart = [rows(TASK, run, rank=rank, ranks=2) for rank in range(2)]
    for index, batch in enumerate(alone):
        other = apart[index % 2][index // 2]
        assert batch.samples == other.samples
        for name in ("tokens", "labels", "positions", "documents"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
    counts = {int((batch.labels != -100).sum()) for batch in alone}
    assert len(counts) > len(alone) / 2, "rows differ in what counts"
    for batch in alone:
        for place, document in enumerate(batch.documents[0].tolist()):
            begins = batch.documents[0].tolist().index(document)
            assert batch.positions[0, place] == place - begins


def gradients(recipe: str | None) -> dict[str, torch.Tensor]:
    """Of a Llama 3 in bf16, with the matrices of its blocks in float8 if there is a recipe."""
    model = tiny_llama(dim=128, n_heads=4, n_kv_heads=1, head_dim=32).build()
    initialise(model, 0)
    model.bfloat16().reset_buffers()
    if recipe is not None:
        float8 = changed(section("precision", "fp8").float8, recipe=recipe, emulate=True)
        float8.convert(model, 1, "cpu")
    batch = batch_of(4, 64, model.config.vocab_size)
    model(batch.tokens, labels=batch.labels).backward()
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("recipe", "rounding"), [("tensorwise", 9.3e-2), ("rowwise", 6.7e-2)])
def test_the_tolerances_of_float8_follow_from_its_rounding(recipe: str, rounding: float) -> None:
    right, rounded = gradients(None), gradients(recipe)
    least = SMALL * sqrt(sum(float(each.norm()) ** 2 for each in right.values()) / len(right))
    scales = {name: max(float(each.norm()), least) for name, each in right.items()}
    worst = max(float((rounded[name] - right[name]).norm()) / scales[name] for name in right)
    assert worst == pytest.approx(rounding, rel=0.1)
    assert 4.5 * sqrt(2) * worst < TOLERANCES["float8"].direction * 1.05
    norms = max(abs(float(rounded[name].norm() - right[name].norm())) / scales[name] for name in right)
    assert norms < 2e-2 < TOLERANCES["float8"].gradient


def test_what_is_not_a_number_fails() -> None:
    right = Trace([1.0], [1.0], {"a": Gradient(1.0, 0.5)})
    wrong = Trace([float("nan")], [1.0], {"a": Gradient(1.0, float("inf"))})
    failed = [each for each in compare(wrong, right, TOLERANCES["float32"]) if not each.passed]
    assert [(each.kind, each.name) for each in failed] == [("loss", "step 1"), ("direction", "a")]
    assert all(each.passed for each in compare(right, right, TOLERANCES["float32"]))


@pytest.fixture
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process as the only rank of an outer launcher."""
    monkeypatch.setattr("sys.argv", ["launch.py", *TINY, f"root={tmp_path}", f"folder={tmp_path / 'run'}"])
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "HYDRA_FULL_ERROR": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    GlobalHydra.instance().clear()
    yield tmp_path / "run"
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_the_command_leaves_a_certificate(one_rank: Path) -> None:
    assert launch.main() == 0
    certificate = json.loads((one_rank / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["torch"] == torch.__version__
    assert len(certificate["config"]) == 8
    assert {each["kind"] for each in certificate["figures"]} == {"loss", "grad_norm", "gradient", "direction"}
    assert attempts(one_rank)[-1].ended == "finished"


def test_the_command_that_fails_leaves_the_proof_and_exit_code_1(
    one_rank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with double_norm():
        assert launch.main() == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1].endswith("beyond their tolerance: grad_norm of step 1 by 1.0e+00")
    assert "Traceback" not in told.err
    assert "WRONG" in told.out
    certificate = json.loads((one_rank / "certificate.json").read_text())
    assert certificate["verdict"] == "failed"
    assert {each["kind"] for each in certificate["figures"] if not each["passed"]} == {"grad_norm"}
    assert attempts(one_rank)[-1].ended == "failed"


def test_a_model_that_no_device_holds_whole_is_refused() -> None:
    run = replace(run_of("fsdp4"), model=section("model", "llama3_8b"), cluster=Here(gpu_memory_gib=80.0))
    with pytest.raises(PlanError) as caught:
        plan(run)
    (line,) = (each for each in caught.value.problems if "one device" in each)
    assert "pass model.n_layers=" in line
    layers = int(line.split("model.n_layers=")[1].split(",")[0])
    for number in (layers, layers + 1):
        smaller = replace(run, model=run.model.model_copy(update={"n_layers": number}))
        assert bool(one_device_problems(smaller, 80 * 2**30)) == (number > layers)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "blocks"])
@pytest.mark.parametrize("layout", ON_GPUS)
def test_bfloat16_on_gpus(layout: str, compile: str, tmp_path: Path) -> None:
    argv = [f"parallel={layout}", f"compile={compile}", f"folder={tmp_path / 'run'}", "precision=bf16"]
    argv += ["task=verify", "model=llama3_8b", "model.n_layers=4", "task.seq_len=1024", "task.global_batch=8"]
    argv += ["schedule.warmup_steps=0", "schedule.decay_ratio=0"]
    ended = subprocess.run([sys.executable, "launch.py", *argv], cwd=HOME, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"
    assert certificate["device"] == torch.cuda.get_device_name(0)
