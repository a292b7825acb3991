"""What a command line says back, and that a mistake starts nothing, writes nothing and does not wait for torch."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra

import launch
from src.config.composition.requests import asked
from src.config.groups import CONF
from src.config.tree import Tree, identity
from src.errors import UserError
from src.launch.start import checked
from src.version import VERSION

HOME = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command runs in an empty folder, outside of any launcher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    for key in ("RUNS", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    GlobalHydra.instance().clear()
    return tmp_path


def composed(*argv: str) -> list[Tree]:
    return asked(list(argv)).trees


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        checked(composed(*argv))
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("modle=llama3_8b", "modle: no such section; did you mean model?"),
        ("optimm.lr=3", "optimm: no such section; did you mean optim?"),
        ("steps=3", "steps: no such section; did you mean task.steps?"),
        ("train.steps=many", "train: no such section; did you mean task.steps?"),
        ("task.steps=many", "task.steps: 'many' is not a whole number"),
        ("model.n_layer=3", "model.n_layer: no such key; did you mean n_layers?"),
        ("optim.lr.x=3", "optim.lr: {'x': 3} is not a number"),
        ("model.rope_scaling={fctor: 8}", "model.rope_scaling.fctor: no such key; did you mean factor?"),
        ("tokenizer=file", "tokenizer.path: missing; pass tokenizer.path=..."),
        ("model.vocab_size=${modle.x}", "model.vocab_size: ${modle.x} cannot be resolved"),
        ("~tracker", "tracker: missing; choose one with tracker=... ("),
        ("model._target_=os.system", "model._target_: os.system is refused; only classes under src. may be named"),
        ("optim.lr=[1", "optim.lr=[1: no legal argument; write key=value, with quotes around unusual text"),
        ("nonsense", "nonsense: no legal argument; write key=value, with quotes around unusual text"),
        ("seed=0,1", "seed=0,1: several values; write -m to sweep over them, or [ ] around them for one list"),
        ("model=llama3_8B", "model=llama3_8B: no such option; did you mean llama3_8b? there are:\n  auto "),
        ("parallel=zero", "parallel=zero: no such option; there are:\n  async_tp2_fsdp4   8 ranks: "),
        ("experiment=dmeo", "experiment=dmeo: no such option; did you mean demo? there are:\n  demo "),
        ("model=null", "model=null: a group needs an option; there are:\n  auto "),
        ("data.max_epochs=${oc.env:NOWHERE}", "data.max_epochs: ${oc.env:NOWHERE} cannot be resolved"),
        ("hydra.mode=SWEEP", "hydra.mode: "),
        ("--config-name=nope", "Cannot find primary config 'nope'"),
        ("compile=true", "compile=true: no such option; did you mean blocks or graph? there are:\n  blocks  Each "),
        ("compile=false", "compile=false: no such option; did you mean off? there are:\n  blocks  Each "),
        ("tokenizer=true", "tokenizer=true: no such option; there are:\n  bpe    Byte-level "),
        ("data=my/", "data=my/: a path is no option; pass data=text data.files=my/"),
        ("data.files=docs", "data.files: no such key of this option; data=text, data=tokens have it"),
        ("cluster.partition=h100", "cluster.partition: no such key of this option; cluster=slurm has it"),
        ("tokenizer=my/tokenizer.json", "tokenizer=my/tokenizer.json: a path is no option; pass tokenizer=file tok"),
        ("model=org/Llama", "model=org/Llama: a path is no option; pass model=auto checkpoint.initial=hf:org/Llama"),
        ("parallel=16", "parallel=16: no such option; did you mean fsdp16? there are:\n"),
        ("+=1", "=1: a value without a key; write key=value"),
        ("hydra.sweeper=1", "hydra.sweeper=1: is a group of keys; set hydra.sweeper.params"),
        ("optim._target_=src.optim.base.Optimizer", "optim._target_: src.optim.base.Optimizer is what others are made"),
        ("optim._target_=src.config.base.Config", "optim._target_: src.config.base.Config is what others are made of"),
        ("optim._target_=src.a b", "optim._target_: 'src.a b' is no name of a class"),
        (f"model.rope_scaling={'{' * 300}", "model.rope_scaling={{{{{{"),
        ("model.max_seq_len=1e20", "model.max_seq_len: 1e+20 is not a whole number"),
        ("model.max_seq_len=1e9", "model.max_seq_len: 1000000000 is not at least 1 and at most 16777216"),
        ("run=x", "run: this task has no such key; pass task=evaluate or task=export or task=generate"),
        ("shard_gb=1", "shard_gb: this task has no such key; pass task=export"),
        ("batch=32", "batch: this task has no such key; pass task=generate"),
    ],
)
def test_a_mistake_on_the_command_line(argv: str, line: str) -> None:
    assert any(each.startswith(line) for each in problems(argv)), problems(argv)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("# @package _global_\noptimm: {lr: 1}", "optimm: no such section; did you mean optim?"),
        ("# @package _global_\nmodel: {n_layer: 3}", "model.n_layer: no such key; did you mean n_layers?"),
        (
            "# @package _global_\nmodel: llama3_8b",
            "model: 'llama3_8b' stands where a group is expected; choose one with",
        ),
        ("model: {n_layers: 3}", "experiment: no such section; begin the file with '# @package _global_'"),
        (
            "# mine\n# @package _global_\nseed: 3",
            "experiment: no such section; begin the file with '# @package _global_'",
        ),
        (
            "# @package _global_\ndefaults: [{override /model: llama3_9b}]",
            "model=llama3_9b: no such option; did you mean",
        ),
        ("# @package _global_\ntask: {steps: 1:30}", "task.steps: '1:30' is not a whole number"),
        ("# @package _global_\ndefaults: {a: b}", "{here}/experiment/mine.yaml: defaults is a list, such as"),
        ("# @package _global_\ndefaults: [mine]", "hydra.searchpath"),
        ("just words", "{here}/experiment/mine.yaml: holds str, not keys with values"),
        ("# @package _global_\nseed: \udcff", "{here}/experiment/mine.yaml: not UTF-8 text (byte 26): "),
        ("# @package _global_\nseed: 1\nseed: 2", "{here}/experiment/mine.yaml, line 3: found duplicate key seed"),
        ("# @package _global_\nseed: [1", "{here}/experiment/mine.yaml, line 2: did not find expected ',' or ']'"),
    ],
)
def test_a_mistake_in_an_experiment_file(somewhere: Path, text: str, line: str) -> None:
    (somewhere / "experiment").mkdir()
    (somewhere / "experiment/mine.yaml").write_bytes(text.encode(errors="surrogateescape"))
    told = problems(f"hydra.searchpath=[file://{somewhere}]", "experiment=mine")
    assert len(told) == 1
    assert told[0].startswith(line.replace("{here}", str(somewhere)))


def test_a_mark_in_front_of_a_file_is_passed_over(somewhere: Path) -> None:
    (somewhere / "experiment").mkdir()
    (somewhere / "experiment/mine.yaml").write_text("# @package _global_\ntask: {steps: 1e3}\n", encoding="utf-8-sig")
    (tree,) = composed(f"hydra.searchpath=[file://{somewhere}]", "experiment=mine")
    assert tree["task"]["steps"] == 1000


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("-m optim.lr=range(1,0)", "optim.lr=range(1,0): holds no value; write a,b,c or range(1,9)"),
        ("-m sweep=optuna", "sweep=optuna draws from ranges; pass one, such as optim.lr=interval(1e-5,1e-2)"),
        ("-m optim.lr=interval(0,1)", "optim.lr=interval(0,1): a grid needs values: write a,b,c or range(1,9)"),
        ("-m seed=range(0,1000000000000)", "-m asks for more than 10000 points; write fewer values, or draw some"),
        ("-m seed=range(0,200) task.steps=range(1,200)", "-m asks for more than 10000 points; write fewer values"),
        ("-m hydra/sweeper=foo seed=1,2", "hydra/sweeper=foo: no such option; there are:\n  basic"),
    ],
)
def test_a_mistake_in_a_sweep(argv: str, line: str) -> None:
    (told,) = problems(*argv.split())
    assert told.startswith(line)


def test_whole_numbers_may_be_written_short() -> None:
    (tree,) = composed("task.steps=1e3", "seed=2e1", "model.rope_theta=1e6", "task.micro_batch=1e0")
    assert (tree["task"]["steps"], tree["seed"], tree["task"]["micro_batch"]) == (1000, 20, 1)
    assert identity(tree) == identity(composed("task.steps=1000", "seed=20", "model.rope_theta=1000000.0",
                                               "task.micro_batch=1")[0])  # fmt: skip
    assert isinstance(tree["model"]["rope_theta"], float)  # which is no count


def test_points_differ_in_what_was_varied_alone() -> None:
    """Points are made from one composition: as if each were alone, also where one sets a key that another has not."""
    given = ("model=llama3_debug,qwen3_debug", "optim.lr=1e-3,1e-4", "data=synthetic", "name=a_${seed}_${optim.lr}")
    for tree, point in zip(composed("-m", *given), asked(["-m", *given]).points, strict=True):
        assert [tree] == composed(*(f"{key}={value}" for key, value in point.overrides.items()))
    assert [tree["seed"] for tree in composed("-m", "seed=1,2", "seed=3")] == [3]
    assert [tree["name"] for tree in composed("-m", "seed=1,2", "name=run_${hydra:job.num}")] == ["run_0", "run_1"]


def test_all_mistakes_of_files_and_command_line_come_at_once(somewhere: Path) -> None:
    (somewhere / "experiment").mkdir()
    (somewhere / "experiment/mine.yaml").write_text("# @package _global_\nmodel: {n_layer: 3}\n")
    told = problems(f"hydra.searchpath=[file://{somewhere}]", "experiment=mine", "modle=x", "optim.lr=many", "seed=-1")
    assert told == [
        "modle: no such section; did you mean model?",
        "seed: -1 is not at least 0 and below 9223372036854775808",
        "model.n_layer: no such key; did you mean n_layers?",
        "optim.lr: 'many' is not a number",
    ]


def test_problems_of_several_points_come_at_once_and_once() -> None:
    assert problems("-m", "optim.lr=1,many,few", "model.dim=wide") == [
        "model.dim: 'wide' is not a whole number",
        "optim.lr: 'many' is not a number",
        "optim.lr: 'few' is not a number",
    ]


def test_what_is_missing_of_every_point_is_told_once_and_by_us_alone(capfd: pytest.CaptureFixture[str]) -> None:
    assert problems("-m", "tokenizer=file", "seed=0,1") == ["tokenizer.path: missing; pass tokenizer.path=..."]
    assert capfd.readouterr() == ("", "")


def test_a_sweep_composes_each_point_and_writes_nothing(somewhere: Path) -> None:
    trees = composed("seed=0,1", "-m", "optim.lr=1e-4,2e-4", "name=lr_${optim.lr}")
    assert [(tree["seed"], tree["optim"]["lr"], tree["name"]) for tree in trees] == [
        (0, 0.0001, "lr_0.0001"),
        (0, 0.0002, "lr_0.0002"),
        (1, 0.0001, "lr_0.0001"),
        (1, 0.0002, "lr_0.0002"),
    ]
    assert len({identity(tree) for tree in trees}) == 4
    assert list(somewhere.iterdir()) == []


def test_an_experiment_may_be_a_sweep() -> None:
    trees = composed("experiment=lr_8b")
    assert [tree["optim"]["lr"] for tree in trees] == [1e-4, 2e-4, 3e-4, 6e-4]


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", "--version"])
    assert launch.main() == 0
    assert capsys.readouterr().out == f"{VERSION}\n"


def test_the_default_command_and_its_identity() -> None:
    (tree,) = composed()
    assert (tree["name"], tree["root"], tree["folder"]) == ("llama3_debug-single", "runs", None)
    (elsewhere,) = composed("root=/elsewhere", "cluster.threads=2", "dry_run=true")
    assert identity(elsewhere) == identity(tree)
    (other,) = composed("seed=1")
    assert identity(other) != identity(tree)


def test_runs_of_another_root_are_asked_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNS", "/scratch/me")
    assert composed()[0]["root"] == "/scratch/me"


def command(*argv: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    script = "import sys, launch; code = launch.main(); print('torch' in sys.modules); sys.exit(code)"
    line = [sys.executable, "-c", script, *argv]
    environment = {"PYTHONPATH": str(HOME), "PATH": "/usr/bin:/bin"}
    return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["modle=x"], ["model=llama3_8B"], ["-m", "task.steps=1,many"]])
def test_a_mistake_ends_with_code_2_without_traceback_torch_or_files(somewhere: Path, argv: list[str]) -> None:
    result = command(*argv, folder=somewhere)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert len([line for line in result.stderr.splitlines() if not line.startswith("  ")]) == 1  # options are below it
    assert list(somewhere.iterdir()) == []


def test_the_first_rank_of_an_outer_launcher_tells_before_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=waited.append))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "argv", ["launch.py", "modle=x"])
        assert launch.main() == 2
    assert waited == [launch.PATIENCE_SECONDS]


TINY = [
    *("task.steps=2", "task.seq_len=32", "task.validate_every=0", "schedule.warmup_steps=1"),
    *("model.n_layers=1", "model.dim=32", "model.n_heads=2", "model.n_kv_heads=2", "model.vocab_size=258"),
    *("data=synthetic", "parallel=ddp2", "cluster.gpus=0"),
]


def torchrun(*argv: str, folder: Path, ranks: int) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-endpoint=localhost:0"]
    return subprocess.run(
        [*line, "--rdzv-backend=c10d", HOME / "launch.py", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_ranks_of_an_outer_launcher_join_and_start_no_others(somewhere: Path) -> None:
    result = torchrun(*TINY, folder=somewhere, ranks=2)
    assert result.returncode == 0, result.stderr
    (run,) = somewhere.glob("runs/llama3_debug-ddp2-*")
    begun, ended = map(json.loads, (run / "attempts.jsonl").read_text().splitlines())
    assert (begun["number"], begun["world"], ended["ended"]) == (1, 2, "finished")
    assert [
        line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line
    ]
    assert json.loads((run / "plan.json").read_text())["world"] == 2


def test_an_outer_launcher_with_another_number_of_ranks_is_refused(somewhere: Path) -> None:
    result = torchrun(*TINY, folder=somewhere, ranks=1)
    assert result.returncode != 0
    assert "WORLD_SIZE=1, but parallel asks for 2 ranks" in result.stderr
    assert list(somewhere.iterdir()) == []


@pytest.mark.parametrize(("model", "tokens"), [("llama3_debug", 16 * 256), ("llama3_405b", 2048 * 8192)])
def test_a_dry_run_shows_the_plan_and_starts_nothing(somewhere: Path, model: str, tokens: int) -> None:
    result = subprocess.run(
        [sys.executable, HOME / "launch.py", "dry_run=json", f"model={model}", "cluster.gpus=0"],
        cwd=somewhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["world"], answer["tokens_per_step"]) == (1, tokens)
    assert answer["origins"]["cluster.gpus"] == "command line"
    large = model == "llama3_405b"
    assert ("warning: recipe llama3_405b is for GPUs, and there is none here" in result.stderr) == large
    assert ("warning: tokenizer: 258 ids under model.vocab_size=128256" in result.stderr) == large
    assert list(somewhere.iterdir()) == []


def test_conf_is_found_from_anywhere() -> None:
    assert (CONF / "config.yaml").is_file()
    assert CONF == HOME / "conf"
