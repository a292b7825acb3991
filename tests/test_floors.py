"""The floors and fences of docs/architecture.md, and the sizes of files and functions, read from the syntax trees."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

HOME = Path(__file__).parents[1]
FILES = sorted([*HOME.glob("src/**/*.py"), HOME / "launch.py"])
TESTS = sorted(HOME.glob("tests/**/*.py"))
LONGEST_FUNCTION = 60
LONGEST_FILE = 400
LONGEST_TEST_FILE = 500
NO_NOUNS = {"utils", "util", "common", "helpers", "helper", "misc", "tools"}

# What src.distributed may know of models: the contract and what all share, never a family.
CONTRACTS = tuple(
    f"src.models.{name}"
    for name in ("attention.flash_attention", "block", "cross_entropy", "decoder", "kernels", "moe")
)

# Library -> the places that may name it.
FENCES = {
    "hydra": ("src.config", "launch"),
    "omegaconf": ("src.config", "launch"),
    "submitit": ("src.cluster.slurm",),
    **dict.fromkeys(("wandb", "wandb_workspaces", "tensorboard", "torch.utils.tensorboard"), ("src.metrics",)),
    **dict.fromkeys(("trackio", "mlflow"), ("src.metrics",)),
    "torchft": ("src.fault_tolerance",),
    **dict.fromkeys(("fsspec", "s3fs"), ("src.storage",)),
    "torch.distributed": (
        "src.distributed",
        "src.checkpoint",
        "src.hugging_face",
        "src.metrics",
        "src.fault_tolerance",
        "src.train",
        "src.tasks",
        "src.launch.rehearse",
    ),
    "torch.distributed.elastic": ("src.cluster",),  # writes a rank's error; no collective
    "os.environ": (
        "src.distributed.process.rank_context",
        "src.models.kernels.disk",
        "src.metrics.trackers.wandb_address",
        "src.metrics.alerts.send",
        "src.cluster",
        "src.launch",
        "src.sweeps",
        "src.runs.commands",
        "src.runs.node_copy",
        "launch",
    ),
    "os.getenv": (),
}

# Who may write or rename a file without src.storage, and why.
WRITERS = {
    "src.checkpoint.folder": "renames folders",
    "src.checkpoint.store": "renames folders",
    "src.checkpoint.writer": "is torch's writer into a draft folder",
    "src.hugging_face.save": "writes into a draft folder, which gets its name as a whole",
    "src.hugging_face.write": "writes tensors into a draft folder",
    "src.runs.node_copy": "writes into a draft folder, which gets its name as a whole",
    "src.runs.commands.clean": "renames folders",
    "src.runs.commands.extend": "renames folders",
    "src.runs.frozen_code": "writes into a draft folder, which gets its name as a whole",
    "src.data.shards": "streams more than fits into memory, then renames",
    "src.data.packing.rows": "streams more than fits into memory, then renames",
    "src.cluster.rank_log": "appends what a process says",
    "src.cluster.replicas.lighthouse": "appends what a process says",
    "src.cluster.local.side_by_side": "appends what a process says",
}

# SLURM's commands and variables, which only its room names, not even in a comment; elsewhere a comment may say SLURM.
SLURM_ROOM = "src.cluster.slurm"
SLURM_COMMANDS = re.compile(r"\b(?:squeue|sbatch|scontrol|scancel|sacct|sinfo|srun|slurmstepd)\b|SLURM_\w+")
# Who may name it in code all the same, and why.
NAMES_SLURM = {
    "src.cluster.batch_system": "chooses the batch system of this machine",
    "src.config.synonyms": "answers who types another project's key",
    "src.config.upgrades": "knows the names of older versions",
    "src.runs.records": "slurm.jsonl is what run folders hold since version 0.1",
}


def name(file: Path) -> str:
    """src/config/tree.py -> src.config.tree"""
    return ".".join(file.relative_to(HOME).with_suffix("").parts).removesuffix(".__init__")


def within(module: str, places: tuple[str, ...] | str) -> bool:
    return any(
        module == place or module.startswith(f"{place}.")
        for place in ((places,) if isinstance(places, str) else places)
    )


@cache
def floors() -> dict[str, int]:
    """Room -> floor, out of the table that people read."""
    table = (HOME / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", table, re.MULTILINE)
    rooms = {room: int(floor) for floor, cell in rows for room in re.findall(r"`([\w./]+)`", cell)}
    return {room.removesuffix("/").removesuffix(".py").replace("/", "."): floor for room, floor in rooms.items()}


def room(module: str) -> str | None:
    return next((each for each in floors() if within(module, each)), None)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def named(file: Path, *, types: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports or reaches; `types`: also what only a type checker sees."""
    tree = parsed(file)
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    hidden = set() if types else {inner for block in blocks for each in block.body for inner in ast.walk(each)}
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and root(node) in ("torch", "os"):
            yield node.lineno, ast.unparse(node)


def root(node: ast.expr) -> str | None:
    """The first word of a dotted name."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def upward(module: str, imported: str) -> bool:
    """Whether an import goes up, sideways or past the two files that config classes are made of."""
    here, there = room(module), room(imported)
    if there is None or here == there:
        return False
    assert here is not None
    if (here, there) == ("src.storage", "src.errors"):
        return False
    if floors()[there] < floors()[here]:
        if (here, there) == ("src.distributed", "src.models"):
            return not within(imported, CONTRACTS)  # any family will do
        return False
    return not within(imported, ("src.config.base", "src.config.bounds"))


def fenced(imported: str, module: str) -> bool:
    """Whether the nearest fence around a name keeps the module out."""
    libraries = [library for library in FENCES if within(imported, library)]
    return bool(libraries) and not within(module, FENCES[max(libraries, key=len)])


def writes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, code) of every call that writes a file whole, renames one or opens one for writing or appending."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, method = ast.unparse(node.func), ast.unparse(node.func).rpartition(".")[2]
        modes = {
            each.value for each in [*node.args, *(key.value for key in node.keywords)] if isinstance(each, ast.Constant)
        }
        opens = method == "open" and any(re.fullmatch("[awx][bt+]*", str(mode)) for mode in modes)
        flags = called == "os.open" and "O_APPEND" in ast.unparse(node)
        moves = called in ("os.replace", "os.rename") or (
            # One argument: of a path. A string's has two, a dataclass's and a date's have keywords.
            method in ("replace", "rename") and "." in called and len(node.args) == 1 and not node.keywords
        )
        if opens or flags or moves or method in ("write_text", "write_bytes"):
            yield node.lineno, ast.unparse(node)


def words(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every name, attribute, keyword, imported module and string but docstrings."""
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield line, node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield line, text


def test_slurm_is_known_in_its_room_only() -> None:
    outside = [file for file in FILES if not within(name(file), SLURM_ROOM)]
    named = [
        (name(file), line, text) for file in outside for line, text in words(parsed(file)) if "slurm" in text.lower()
    ]
    assert [each for each in named if each[0] not in NAMES_SLURM] == []
    assert {module for module, _, _ in named} == set(NAMES_SLURM)  # no exception that nobody needs
    texts = {name(file): file.read_text(encoding="utf-8") for file in outside}
    commands = {
        module: SLURM_COMMANDS.findall(text) for module, text in texts.items() if module != "src.config.synonyms"
    }
    assert {module: found for module, found in commands.items() if found} == {}
    forbidden = "import a.slurm\nos.environ['SLURM_JOB_ID']\nSlurmClient.b\nc(slurm=1)\nclass D:\n    'On SLURM.'\n"
    assert len([text for _, text in words(ast.parse(forbidden)) if "slurm" in text.lower()]) == 4
    assert SLURM_COMMANDS.findall("# squeue knows $SLURM_JOB_ID, resbatch does not") == ["squeue", "SLURM_JOB_ID"]


def test_every_rank_has_one_entry() -> None:
    """Whoever makes a rank's process calls src.cluster.rank.run_rank, and nobody else builds a run or starts a task."""
    imports = [(name(file), each) for file in FILES for _, each in named(file, types=False)]
    callers = {module for module, each in imports if each == "src.cluster.rank.run_rank"}
    assert callers == {"src.cluster.slurm.payload", "src.launch.start"}
    calls = [
        (name(file), ast.unparse(node.func))
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call)
    ]
    assert {module for module, called in calls if called.endswith("task.run")} == {"src.cluster.rank"}


def test_the_plan_is_computed_by_the_launcher_alone() -> None:
    """Ranks read plan.json: of src.planning they know its class and what fills in recompute=auto; clusters, a site."""
    planners = ("src.planning", "src.launch", "launch")
    modules = {name(file) for file in FILES}
    others = [file for file in FILES if not within(name(file), planners)]
    known = {each for file in others for _, each in named(file, types=True) if within(each, "src.planning")}
    assert known - modules == {
        "src.planning.plan.Plan",
        "src.planning.recompute_choice.resolve_auto_recompute",
        "src.planning.time.site.NO_FACTS",
        "src.planning.time.site.SiteFacts",
    }
    made = [name(file) for file in FILES for node in ast.walk(parsed(file)) if _calls(node, "Plan")]
    assert made == ["src.planning.plan"]


def _calls(node: ast.AST, called: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == called


def test_every_file_has_its_floor() -> None:
    assert {room(name(file)) for file in FILES if name(file) != "src"} <= set(floors())
    assert all(floors()[each] in range(13) for each in floors())
    assert floors()["src.errors"] == 0
    assert floors()["launch"] == 12


def test_imports_go_downward() -> None:
    imports = [(file, line, each) for file in FILES for line, each in named(file, types=False)]
    assert [f"{name(file)}:{line} {each}" for file, line, each in imports if upward(name(file), each)] == []
    assert [f"{name(file)}:{line} {each}" for file, line, each in imports if each.startswith(".")] == []


def test_fences() -> None:
    names = [(file, line, each) for file in FILES for line, each in named(file, types=True)]
    assert [f"{name(file)}:{line} {each}" for file, line, each in names if fenced(each, name(file))] == []


def test_files_are_written_by_storage() -> None:
    found = {(name(file), line, code) for file in FILES for line, code in writes(parsed(file))}
    outside = {each for each in found if not within(each[0], "src.storage")}
    assert sorted(each for each in outside if each[0] not in WRITERS) == []
    assert {module for module, _, _ in outside} == set(WRITERS)  # no exception that nobody needs
    forbidden = (
        "open(a, 'ab')\nb.open(mode='w')\nos.open(c, os.O_APPEND)\nos.replace(d, e)\nf.rename(g)\nh.replace(i)\n"
    )
    assert len(list(writes(ast.parse(forbidden + "j.write_text(k)")))) == 7
    assert list(writes(ast.parse("a.replace('b', 'c')\nopen(d)\ne.open('rb')\nreplace(f, g=1)"))) == []


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other, but for a config class and the one module beside it that it builds."""

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        ahead = [*imports[module]]
        while ahead:
            if (each := ahead.pop()) not in seen:
                seen.add(each)
                ahead += imports[each]
        return seen

    reach = {module: reached(module) for module in imports}
    found = {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in imports
        if module in reach[module]
    }
    return sorted([*circle] for circle in found if not _builds(circle))


def _builds(circle: tuple[str, ...]) -> bool:
    """Whether it is a config class (config.py, or base.py with that of all families) and what it builds beside it."""
    places = [module.rpartition(".") for module in circle]
    return (
        len(circle) == 2
        and places[0][0] == places[1][0]
        and not {"config", "base"}.isdisjoint(place[2] for place in places)
    )


def test_no_circles_of_imports() -> None:
    """Imports in functions and for the type checker count, too."""
    modules = {name(file) for file in FILES}
    imports = {name(file): {each for _, each in named(file, types=True)} & modules - {name(file)} for file in FILES}
    assert len(imports["src.launch.start"]) > 5
    assert circles(imports) == []


def test_sizes_and_names() -> None:
    assert [name(file) for file in [*FILES, *TESTS] if NO_NOUNS & set(name(file).split("."))] == []
    files = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in [*FILES, *TESTS]}
    most = {file: LONGEST_TEST_FILE if file in TESTS else LONGEST_FILE for file in files}
    assert {name(file): lines for file, lines in files.items() if lines > most[file]} == {}
    lengths = {
        f"{name(file)}.{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for file in files
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {each: lines for each, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def test_the_rules_catch_what_they_forbid(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(
        "import os, wandb\nfrom torch import distributed\nfrom . import x\n"
        "os.environ['A']\nif TYPE_CHECKING:\n    import hydra\n"
    )
    found = {each for _, each in named(file, types=False)}
    assert {each for _, each in named(file, types=True)} - found == {"hydra"}
    assert {"wandb", "torch.distributed", "os.environ", "."} <= found
    assert upward("src.data.batches", "src.planning.plan")
    assert upward("src.data.batches", "src.optim.adamw")
    assert upward("src.optim.adamw", "src.config.build")
    assert upward("src.distributed.mesh", "src.models.base")
    assert fenced("torch.distributed.tensor", "src.models.llama3.model")
    assert fenced("omegaconf", "src.planning.plan")
    assert not fenced("torch.distributed.elastic.multiprocessing", "src.cluster.local.supervisor")
    assert circles({"a.x": {"b.y"}, "b.y": {"c"}, "c": {"a.x"}, "d": {"a.x"}}) == [["a.x", "b.y", "c"]]
    assert circles({"a.x": {"a.y"}, "a.y": {"a.x"}}) == [["a.x", "a.y"]]
    assert circles({"a.config": {"b.y"}, "b.y": {"a.config"}}) == [["a.config", "b.y"]]
    assert circles({"a.config": {"a.y"}, "a.y": {"a.config"}}) == []
    assert not upward("src.optim.adamw", "src.config.base")
    assert not upward("src.planning.plan", "src.models.base")


def test_no_folder_is_too_long_to_take_in() -> None:
    folders = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > 12} == {}


def test_a_class_name_has_one_meaning() -> None:
    """A stranger who searches for a name finds one class, also where it is private."""
    places: dict[str, list[str]] = {}
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name(file))
    assert {each: files for each, files in places.items() if len(files) > 1} == {}
