"""`stages=[...]` on the launcher: what is recorded, planned, shown and refused."""

import io
import sys
from itertools import accumulate
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console

from src.config.composition.overrides import overrides
from src.config.composition.requests import asked
from src.config.stages import stage_at, stage_trees
from src.config.tree import Tree, identity
from src.errors import UserError
from src.launch.as_it_was import completed
from src.launch.start import checked
from src.optim.schedule import Schedule, in_stages
from src.planning.plan import Plan
from src.planning.table import render
from src.tasks.pretrain.stages import StageData, reading

SIZES = ("task.seq_len=64", "task.global_batch=8", "cluster.gpus=0", "dry_run=true")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    GlobalHydra.instance().clear()


def tree(*argv: str) -> Tree:
    (found,) = asked([*SIZES, *argv], completed).trees
    return found


def planned(*argv: str) -> Plan:
    ((_, _, plan),) = checked([tree(*argv)])
    return plan


def told(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        checked(asked([*SIZES, *argv], completed).trees)
    return "\n".join(caught.value.problems)


def test_the_first_stage_is_the_config_and_each_other_says_what_changes() -> None:
    found = tree("stages=[{until:20,seq_len:32},{until:50,global_batch:16,lr:1e-4},{schedule:decay,data:synthetic}]")
    assert (found["task"]["seq_len"], found["task"]["steps"]) == (32, 100)
    first, second, third = found["task"]["stages"]
    assert first == {"until": 20}
    assert second == {"until": 50, "task.global_batch": 16, "optim.lr": 1e-4}
    assert (third["until"], third["schedule"]["decay_ratio"]) == (None, None)
    assert third["data"]["_target_"] == "src.data.config.Synthetic"
    assert identity(found) == identity(tree("task.seq_len=32", "stages=[{until:20},{until:50,global_batch:16,lr:1e-4},"
                                            "{schedule:decay,data:synthetic}]"))  # fmt: skip


def test_who_decided_a_value_is_said_of_stages_too() -> None:
    (point,) = asked([*SIZES, "stages=[{until:20,lr:1e-4},{until:50,seq_len:32}]"], completed).points
    keys = ("task.steps", "optim.lr", "task.stages", "task.seq_len", "task.log_every")
    said = ["stages", "stages", "command line", "command line", "default"]
    assert [str(point.origins.of(key)) for key in keys] == said
    site = ("cluster=slurm", "cluster.gpu_model=H100", "cluster.mtbf_hours_per_gpu=5e4", "model=llama3_1b")
    often = ("checkpoint.every=auto", "dry_run=true", "stages=[{until:2000},{lr:1e-4}]", "task.steps=4000")
    (point,) = asked([*site, *often, "parallel=fsdp8"], completed).points
    assert isinstance(point.tree["checkpoint"]["every"], int)
    assert str(point.origins.of("checkpoint.every")) == "command line"


def test_each_stage_has_what_those_before_it_have_changed() -> None:
    stages = stage_trees(tree("stages=[{until:20,seq_len:32},{until:50,lr:1e-4},{global_batch:4}]"))
    sizes = [(each["task"]["steps"], each["task"]["seq_len"], each["task"]["global_batch"]) for each in stages]
    assert sizes == [(20, 32, 8), (30, 32, 8), (50, 32, 4)]
    assert [each["optim"]["lr"] for each in stages][1:] == [1e-4, 1e-4]
    assert all(each["task"]["stages"] is None for each in stages)


@pytest.mark.parametrize(("step", "length"), [(0, 16), (20, 16), (21, 32), (100, 32)])
def test_a_checkpoint_is_of_the_stage_that_took_its_step(step: int, length: int) -> None:
    found = tree("stages=[{until:20,seq_len:16},{seq_len:32}]")
    assert stage_at(found, step)["task"]["seq_len"] == length


def test_a_run_without_stages_is_what_it_was() -> None:
    plain = tree()
    assert plain["task"]["stages"] is None
    assert identity(tree("stages=[{until:30,seq_len:32}]")) == identity(tree("task.steps=30", "task.seq_len=32"))
    del plain["task"]["stages"]
    assert identity(plain) == identity(tree())


def ends(found: Tree) -> list[int]:
    return [*(each["until"] for each in found["task"]["stages"][:-1]), found["task"]["steps"]]


def test_an_end_in_tokens_is_that_of_the_nearest_step() -> None:
    found = tree("stages=[{until_tokens:1e4,seq_len:32},{until_tokens:40000,seq_len:64}]")
    assert ends(found) == [39, 39 + 59]  # 10,000 / 256 = 39.06; (40,000 - 39 * 256) / 512 = 58.6


def test_a_ramp_is_as_many_stages_as_values() -> None:
    found = tree("stages=[{until:40,global_batch:[2,4,6,8]},{lr:1e-4}]")
    assert ends(found) == [10, 20, 30, 40, 100]
    assert [each.get("task.global_batch") for each in found["task"]["stages"]] == [None, 4, 6, 8, None]
    by_tokens = tree("stages=[{until_tokens:30720,seq_len:[16,32,64],global_batch:[8,8,4]},{until:200,global_batch:8}]")
    assert ends(by_tokens) == [80, 120, 160, 200]  # 10,240 tokens each, in steps of 128 and 256 tokens


LINE = Schedule(shape="linear", warmup_steps=0, decay_ratio=None, min_factor=0.0, total_steps=None)


def test_a_decay_goes_by_tokens_and_ends_with_the_last_stage() -> None:
    steps, sizes = [4, 4, 2], [100, 200, 400]
    stages = in_stages([LINE] * 3, [True, False, False], steps, sizes)
    place, factors = 0, []
    for number, (count, size) in enumerate(zip(steps, sizes, strict=True)):
        begun = sum(steps[:number])
        for step in range(begun, begun + count):
            factors.append((stages[number].multiplier(step, 0), 1 - place / 2000))
            place += size
    assert place == 2000
    assert [one for one, _ in factors] == pytest.approx([other for _, other in factors])
    assert stages[2].place(10, 0) == (20.0, 20.0)


@pytest.mark.parametrize("schedule", [LINE, LINE.model_copy(update={"warmup_steps": 3, "decay_ratio": 0.3}),
                                      LINE.model_copy(update={"shape": "cosine", "warmup_steps": 2})])  # fmt: skip
def test_stages_of_one_size_have_the_bits_of_a_plain_run(schedule: Schedule) -> None:
    stages = in_stages([schedule] * 2, [True, False], [7, 13], [768, 768])
    found = [stages[step >= 7].multiplier(step, 0) for step in range(20)]
    assert found == [schedule.multiplier(step, 20) for step in range(20)]


def test_who_names_a_schedule_begins_it() -> None:
    stages = in_stages([LINE] * 3, [True, False, True], [5, 5, 4], [10, 10, 20])
    assert [stages[2].multiplier(step, 0) for step in range(10, 14)] == [LINE.multiplier(step, 4) for step in range(4)]
    assert stages[1].multiplier(9, 0) == LINE.multiplier(9, 10)


def test_a_source_goes_on_behind_what_earlier_orders_have_read() -> None:
    def reads(parts: dict[str, float], samples: int, seq_len: int = 8) -> StageData:
        return StageData(str(parts), tuple(parts.values()), tuple(parts), seq_len, samples)

    web, mixed = {"web": 1.0}, {"web": 0.5, "code": 0.5}
    stages = [reads(web, 10), reads(web, 6), reads(mixed, 8), reads(web, 4, seq_len=16), reads(web, 4), reads(mixed, 2)]
    places = reading(stages)
    assert [each.goes_on for each in places] == [False, True, False, False, False, False]
    assert [each.read_before for each in places] == [(0,), (0,), (16, 0), (0,), (20,), (24, 4)]


def test_the_plan_has_every_stage_and_their_sums() -> None:
    plan = planned("stages=[{until:20,seq_len:32},{until:50,global_batch:16},{schedule:decay}]")
    first, second, third = plan.training_stages
    assert [each.steps for each in plan.training_stages] == [20, 50, 100]
    assert [each.tokens for each in plan.training_stages] == [20 * 256, 30 * 512, 50 * 512]
    assert (plan.steps, plan.tokens, plan.schedule_end) == (
        100,
        sum(each.tokens for each in (first, second, third)),
        100,
    )
    assert plan.memory == max((each.memory for each in plan.training_stages), key=lambda each: each.peak)
    assert (second.sequences_per_step, plan.last_lr) == (16, third.last_lr)
    assert third.last_lr < second.last_lr
    assert Plan.from_dict(plan.to_dict()) == plan
    assert "training_stages" not in planned().to_dict()


def test_hours_are_those_of_all_stages() -> None:
    gpus = ("cluster=slurm", "cluster.gpu_model=H200", "model=llama3_1b", "parallel=fsdp8", "precision=bf16")
    found = asked([*gpus, "dry_run=true", "stages=[{until:20},{seq_len:128}]"], completed).trees
    ((_, _, plan),) = checked(found)
    assert plan.time is not None
    times = [each.time for each in plan.training_stages]
    assert plan.time.hours == pytest.approx(sum(each.hours for each in times if each is not None))
    longest = max((each for each in times if each is not None), key=lambda each: each.hours)
    assert plan.time.step == longest.step


def test_a_layout_is_chosen_for_the_longest_stage() -> None:
    """Which fits in the memory of the device that is named, as the others do."""
    words = ("cluster=slurm", "cluster.gpu_model=H100", "model=llama3_8b", "parallel=auto", "parallel.gpus=16",
             "precision=bf16", "data=synthetic", "task.steps=1000", "task.global_batch=32")  # fmt: skip
    first, point = (
        asked([*words, each], completed).points[0]
        for each in ("task.seq_len=8192", "stages=[{until:10,seq_len:1024},{seq_len:8192}]")
    )
    alone, staged = first.tree, point.tree
    named = {key: str(origin) for key, _, origin in point.origins.listed(staged)}
    assert (named["parallel.shard"], named["task.seq_len"]) == ("parallel=auto", "stages")
    assert "parallel._target_" not in named
    assert staged["parallel"] == alone["parallel"]
    assert staged["task"]["micro_batch"] == alone["task"]["micro_batch"]
    ((_, _, plan),) = checked([staged])
    assert plan.memory_limit == int(79.2 * 2**30)
    assert all(each.fits for each in plan.training_stages)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("stages=[{seq_len:32},{lr:1}]",), "stage 1: does not say where it ends; pass until: <optimizer step>, or"),
        (("stages=[{until:30},{until:20},{}]",), "stage 2: until=20 is no more than the 30 after which it begins"),
        (("stages=[{until:200},{lr:1e-3}]",), "stage 2: begins after step 200, and task.steps=100; pass at least 201"),
        (("stages=[{until:9,until_tokens:9},{}]",), "stage 1: until and until_tokens are both given; leave one out"),
        (("stages=[{until:half},{}]",), "stage 1: until='half' is not a whole number of at least 1"),
        (("stages=[{until:9},{seq_len:[8,16],global_batch:[1,2,3]}]",), "stage 2: ramps of one stage have"),
        (("stages=[{until:9},{model.dim:64}]",), "stage 2: model.dim: a stage changes only data, schedule, parallel,"),
        (("stages=[{until:9},{sequence_len:64}]",), "did you mean seq_len?"),
        (("stages=[{until:9},{seq_len:-1}]",), "stage 2: task.seq_len: -1 is not at least 1 and at most 16777216"),
        (("stages=[{until:9},{data:textt}]",), "stage 2: data='textt': no such option; did you mean text?"),
        (("stages=[{until:9},{data:text}]",), "stage 2: data.files: missing; pass it in this stage"),
        (("stages=[{until:9},{data.fils:x}]",), "stage 2: data.fils: no such key"),
        (("stages=[{until:9},{seq_len:100000}]",), "stage 2: task.seq_len=100000 is beyond model.max_seq_len=8192"),
        (("stages=[{until:9},{parallel:fsdp2}]",), "stage 2: parallel asks for 2 ranks, and stage 1 for 1; "),
        (("stages=[{until:9},{parallel:auto}]",), "stage 2: parallel=auto: is no option that a stage can have"),
        (("stages=[{until:9},{}]", "checkpoint=none"), "checkpoint.every=null: a stage hands over to the next one"),
        (("stages=[{until:9},{}]", "schedule.total_steps=50"), "schedule.total_steps=50: with stages a schedule ends"),
        (("stages=[{until:9},{until:90}]", "task.steps=80"), "task.steps=80: the last stage ends after step 90; leave"),
        (("stages=[{until:9},{}]", "task=bench"), "stages: this task has no such key; pass task=pretrain"),
        (("stages=[1,2]",), "task.stages.0: 1 is not a group of keys"),
        (("stages=[]",), "task.stages: "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_by_the_launcher(argv: tuple[str, ...], words: str) -> None:
    assert words in told(*argv)


def test_the_config_can_be_typed_again() -> None:
    """As `python -m src.runs fork` does it."""
    found = tree("stages=[{until:20,seq_len:32},{until:50,compile:off,lr:1e-4},{schedule:decay,data:synthetic}]")
    again = asked([f"{key}={text}" for key, text in overrides(found).items()], completed).trees[0]
    assert identity(again | {"name": found["name"]}) == identity(found)


@pytest.mark.parametrize(
    ("experiment", "gpu", "gib", "lengths"),
    [("long_context_8b", "H100", 80, (8192, 32768, 131072)), ("long_context_16b", "H200", 140, (4096, 32768, 131072))],
)
def test_the_presets_for_long_contexts_fit(experiment: str, gpu: str, gib: int, lengths: tuple[int, ...]) -> None:
    site = ("cluster=slurm", "cluster.gpus_per_node=8", f"cluster.gpu_model={gpu}", f"cluster.gpu_memory_gib={gib}")
    (found,) = asked([f"experiment={experiment}", *site, "dry_run=true"], completed).trees
    ((_, run, plan),) = checked([found])
    assert tuple(stage.task.seq_len for stage in run.stages) == lengths
    assert [stage.parallel.context for stage in run.stages] == [1, 4, 16]
    assert len({each.tokens_per_step for each in plan.training_stages}) == 1
    assert all(each.fits and each.time is not None for each in plan.training_stages)
    assert "131,072" in shown(plan)


@pytest.mark.parametrize(
    ("experiment", "model", "sizes", "tokens"),
    [
        ("stages_405b", "llama3_405b", [(4096, 1024), (8192, 1024), (8192, 2048)], [2.52e8, 2.87e12, 1.56e13]),
        (
            "stages_671b",
            "deepseek_v3_671b",
            [(4096, 1024 * rows) for rows in [*range(3, 16), 15]],
            [4.69e11, 1.48e13],
        ),
    ],
)
def test_the_presets_with_growing_batches_have_the_published_ones(
    experiment: str, model: str, sizes: list[tuple[int, int]], tokens: list[float]
) -> None:
    """And in all else the values of the model's recipe."""
    found = asked([f"experiment={experiment}", "dry_run=true"], completed).trees[0]
    plain = asked([f"model={model}", "dry_run=true"], completed).trees[0]
    stages = stage_trees(found)
    assert sum(each["task"]["steps"] for each in stages) == found["task"]["steps"]
    assert [(each["task"]["seq_len"], each["task"]["global_batch"]) for each in stages] == sizes
    steps = [each["task"]["steps"] for each in stages]
    reached = [*accumulate(count * length * rows for count, (length, rows) in zip(steps, sizes, strict=True))]
    last = sizes[-1][0] * sizes[-1][1]  # tokens of a step: ends are those of the nearest one
    assert [min(reached, key=lambda each: abs(each - wanted)) for wanted in tokens] == pytest.approx(tokens, abs=last)
    for section in ("model", "optim", "precision", "recompute", "compile"):
        assert stages[-1][section] == plain[section]
    assert stages[-1]["schedule"] | {"warmup_steps": 0} == plain["schedule"] | {"warmup_steps": 0}


def shown(plan: Plan) -> str:
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(render(plan))
    return screen.export_text()
