"""docs/support_matrix.md: which layout works with which feature, measured by task=verify on CPU ranks.

python -m benchmarks.support_matrix                 fill in what is missing or out of date, then write the page
python -m benchmarks.support_matrix --again         measure every cell again
python -m benchmarks.support_matrix --only "pp2 |"  only cells whose name contains this
python -m benchmarks.support_matrix --check         measure nothing; say what is out of date (exit code 1)

Stopped in between it goes on where it was: support_matrix.json beside this file keeps every cell with a hash of what
it depends on, comments and layout of the code left out. A cell that is broken makes the exit code 1.
"""

import argparse
import ast
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from src.config.build import build
from src.config.groups import CONF, options
from src.config.tree import resolve
from src.distributed.pipeline.stages import SCHEDULES
from src.distributed.process.rank_context import Ranks as Process
from src.errors import UserError
from src.planning.plan import plan
from src.run import Run
from src.tasks.verify.config import Verify
from src.tasks.verify.rank import certify
from tests.ranks import RankError, Ranks
from tests.train.runs import section

HOME = Path(__file__).resolve().parents[1]
CELLS = Path(__file__).with_suffix(".json")
PAGE = HOME / "docs" / "support_matrix.md"
COMMAND = "python -m benchmarks.support_matrix"
# What decides whether a layout trains like one device, and which cells it concerns: those whose name has the text.
SOURCES = ("src/distributed/*.py", "src/models/llama3/*.py", "src/models/decoder.py", "src/models/cross_entropy.py",
           "src/train/setup.py", "src/train/step.py", "src/models/deepseek_v3/*.py",
           *(f"src/models/{name}.py" for name in ("moe", "experts", "router")))  # fmt: skip
CONCERNS = {
    **dict.fromkeys(("context.py", "exchange.py"), "cp"),
    **dict.fromkeys(("pipeline.py", "stages.py"), "pp"),
    **dict.fromkeys(("tensor.py", "symmetric.py"), "tp"),
    **dict.fromkeys(("float8.py", "float8_tensor.py"), "float8"),
    "recompute.py": "recompute",
    "compiling.py": "compile",
    **dict.fromkeys(("expert.py", "travel.py", "plain_tensor.py"), "deepseek"),
    # They start ranks, look at machines, multiply experts in float8, and name tensors of files, which no cell does.
    **dict.fromkeys(("process.py", "preflight.py", "recorder.py", "float8_experts.py", "hugging_face.py"), "no cell"),
}

MOST_RANKS, MOST_RANKS_ROUTED = 8, 4  # every way to spread experts fits four
# 4 layers for two stages on each of two ranks, 4 key heads for tp4, 64 tokens for two pieces on each of 2 x 2 ranks.
SMALL = (
    *("task=verify", "task.steps=2", "task.seq_len=64", "task.global_batch=8", "task.micro_batch=1", "cluster.gpus=0"),
    *("model.dim=64", "model.n_layers=4", "model.n_heads=8", "model.vocab_size=256", "model.max_seq_len=64"),
    *("schedule.warmup_steps=0", "schedule.decay_ratio=0"),
)
DENSE = ("model.n_kv_heads=4", "model.multiple_of=64")
ROUTED = (
    *("model=deepseek_v3_debug", "model.ffn_dim=128", "model.kv_lora_rank=64", "model.qk_nope_head_dim=16"),
    *("model.qk_rope_head_dim=16", "model.v_head_dim=16", "model.moe.hidden_dim=64"),
)
FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "recompute=full": ("recompute=full",),
    "recompute=selective": ("recompute=selective",),
    "compile=blocks": ("compile=blocks",),
    "document masks": ("model.attention=flex", "model.mask=block_causal", "data.document_masks=true"),
    "tied embeddings": ("model.tied_embeddings=true",),
    "bf16": ("precision=bf16",),
    "float8": ("precision=fp8", "precision.float8.emulate=true"),
}
# Of a DeepSeek-V3; its cells have this word in their names.
FAMILY = "deepseek"
ROUTED_FEATURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "experts cut": ("parallel.expert_tensor=${parallel.tensor}",),
    "recompute=full": ("recompute=full",),
    "recompute=selective": ("recompute=selective",),
    "compile=blocks": ("compile=blocks", "precision=bf16"),
    "bf16": ("precision=bf16",),
}
INTRODUCTION = f"""# What works with what

Every cell is a run of `task=verify` on CPU ranks: the layout and a single device take the same steps from the same
weights on the same data, and are compared. `ok` comes with the largest relative difference of losses and norms / of any
parameter's gradient in the first step; src/tasks/verify/certificate.py has the tolerances. `refused` is the answer
before anything starts, in the plan's own words, which are numbered below. fp32 where the column does not say otherwise.
Compiled blocks are captured whole and run without generated kernels; float8 is emulated; document masks are the
predicate of FlexAttention as a dense mask. `experts cut`: every routed expert is cut over the tensor ranks, who divide
tokens otherwise.

Written by `{COMMAND}`; do not edit.
"""

Cell = dict[str, Any]  # sources, and {loss, gradient} or {refused: [...]} or {broken: ...}


def fingerprint(name: str) -> str:
    """8 hex digits of what a cell depends on."""
    digest = hashlib.sha256()
    for file, content in sources().items():
        if concern(file) in name:
            digest.update(f"{file}\n{content}\n".encode())
    layout = (CONF / "parallel" / f"{name.partition(' | ')[0]}.yaml").read_text()
    return hashlib.sha256(f"{digest.hexdigest()} {yaml.safe_load(layout)}".encode()).hexdigest()[:8]


def concern(file: str) -> str:
    """What is in the names of the cells that a file concerns."""
    name = Path(file).name
    routed = "deepseek_v3" in file or name in ("moe.py", "experts.py", "router.py")
    return CONCERNS.get(name, FAMILY if routed else "")


@cache
def sources() -> dict[str, str]:
    """Every file of SOURCES as its syntax tree without docstrings."""
    files = sorted(file for pattern in SOURCES for file in HOME.glob(pattern))
    return {str(file.relative_to(HOME)): meaning(file.read_text()) for file in files}


def meaning(code: str) -> str:
    """The same text for the same program, however it is written down."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)


def layouts(*, routed: bool = False) -> list[str]:
    """The presets that fit, the smallest first; those that spread experts for a `routed` model only."""
    presets = {option: section("parallel", option) for option in options("parallel")}
    most = MOST_RANKS_ROUTED if routed else MOST_RANKS
    fitting = [name for name, each in presets.items() if each.world <= most and (routed or each.expert == 1)]
    return sorted(fitting, key=lambda option: (presets[option].world, option))


def pipelines(*, routed: bool = False) -> list[str]:
    return [layout for layout in layouts(routed=routed) if section("parallel", layout).pipeline > 1]


def wanted() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every cell: its name and its command line."""
    for layout in layouts():
        for feature, overrides in FEATURES.items():
            yield f"{layout} | {feature}", (f"parallel={layout}", *DENSE, *overrides)
    for layout in pipelines():
        for schedule in SCHEDULES:
            yield f"{layout} | {schedule}", (f"parallel={layout}", *DENSE, f"parallel.pipeline_schedule={schedule}")
    for layout in layouts(routed=True):
        for feature, overrides in ROUTED_FEATURES.items():
            yield f"{layout} | {FAMILY} {feature}", (f"parallel={layout}", *ROUTED, *overrides)
    for layout in pipelines(routed=True):
        for schedule in SCHEDULES:
            given = (f"parallel={layout}", *ROUTED, f"parallel.pipeline_schedule={schedule}")
            yield f"{layout} | {FAMILY} {schedule}", given


def composed(*overrides: str) -> Run:
    """The run of this command line; UserError when it is refused."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("config", [*SMALL, *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        run = Run.from_sections(build(resolve(cfg)))
    plan(run, None, run.cluster.devices())
    return run


def certified(run: Run) -> Cell:
    """On one rank of the gloo world."""
    assert isinstance(run.task, Verify)
    torch._dynamo.reset()  # graphs of the cell before hold the names of process groups that are gone
    # Kernels for the CPU take minutes to make and prove nothing about a layout; capturing a block whole does.
    with patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        certificate = certify(run.task, run, Process.join("cpu", run.parallel.world, timeout_seconds=600), {})
    if certificate.failed:
        return {"broken": certificate.problem()}
    return {
        "loss": certificate.worst("loss", "grad_norm"),
        "gradient": certificate.worst("gradient", "direction"),
    }


def measured(ranks: Ranks, overrides: tuple[str, ...]) -> Cell:
    """What became of one command line."""
    try:
        run = composed(*overrides)
    except UserError as error:
        return {"refused": list(error.problems)}
    try:
        cell: Cell = ranks(run.parallel.world, certified, run)[0]
    except RankError as error:
        return {"broken": str(error).strip().splitlines()[-1]}
    return cell


def stale(cells: dict[str, Cell]) -> list[str]:
    """Cells that are missing or were measured with other sources."""
    return [name for name, _ in wanted() if cells.get(name, {}).get("sources") != fingerprint(name)]


def read() -> dict[str, Cell]:
    """The cells that are known."""
    return json.loads(CELLS.read_text()) if CELLS.exists() else {}


def write(cells: dict[str, Cell]) -> None:
    """In the order of the page; cells that nobody wants any more are dropped."""
    kept = {name: cells[name] for name, _ in wanted() if name in cells}
    CELLS.write_text(json.dumps(kept, indent=1) + "\n")


def page(cells: dict[str, Cell]) -> str:
    """The whole text of docs/support_matrix.md."""
    notes: dict[str, int] = {}
    features = table("layout", layouts(), list(FEATURES), cells, notes)
    schedules = table("layout", pipelines(), list(SCHEDULES), cells, notes)
    routed = layouts(routed=True), pipelines(routed=True)
    routed_features = table("layout", routed[0], list(ROUTED_FEATURES), cells, notes, FAMILY + " ")
    routed_schedules = table("layout", routed[1], list(SCHEDULES), cells, notes, FAMILY + " ")
    reasons = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    parts = (
        INTRODUCTION.strip(),
        f"## Layouts and features\n\n{features}",
        f"## Pipelines and their schedules\n\n{schedules}",
        f"## DeepSeek-V3: layouts and features\n\n{routed_features}",
        f"## DeepSeek-V3: pipelines and their schedules\n\n{routed_schedules}",
        f"## Reasons\n\n{reasons}",
    )
    return "\n\n".join(parts) + "\n"


def table(
    corner: str, rows: list[str], columns: list[str], cells: dict[str, Cell], notes: dict[str, int], family: str = ""
) -> str:
    """In Markdown; `notes` collects the reasons, numbered."""
    lines = [f"| {' | '.join([corner, *columns])} |", f"|{'---|' * (1 + len(columns))}"]
    for row in rows:
        texts = [told(cells.get(f"{row} | {family}{column}"), notes) for column in columns]
        lines.append(f"| {' | '.join([row, *texts])} |")
    return "\n".join(lines)


def told(cell: Cell | None, notes: dict[str, int]) -> str:
    """One cell."""
    if cell is None:
        return "not measured"
    if "refused" in cell:
        return f"refused ({', '.join(str(notes.setdefault(each, len(notes) + 1)) for each in cell['refused'])})"
    if "broken" in cell:
        return f"**broken** ({notes.setdefault(cell['broken'], len(notes) + 1)})"
    return f"ok {cell['loss']:.0e} / {cell['gradient']:.0e}"


def outdated() -> list[str]:
    """Why the page is not what it would be now."""
    cells = read()
    found = []
    if old := stale(cells):
        found.append(
            f"{len(old)} of {len(list(wanted()))} cells were measured with other sources, or never: {old[0]} ..."
        )
    if not PAGE.exists() or PAGE.read_text() != page(cells):
        found.append(f"{PAGE.relative_to(HOME)} is not written from {CELLS.relative_to(HOME)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure every cell again")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    given = parser.parse_args()
    if given.check:
        problems = outdated()
        print(*problems, *([f"run {COMMAND}"] if problems else []), sep="\n", file=sys.stderr)
        return 1 if problems else 0
    cells = read()
    old = set(cells if given.again else ()) | set(stale(cells))
    todo = {name: overrides for name, overrides in wanted() if name in old and given.only in name}
    ranks, began = Ranks(), time.monotonic()
    for number, (name, overrides) in enumerate(todo.items(), 1):
        cells[name] = {"sources": fingerprint(name)} | measured(ranks, overrides)
        passed = time.monotonic() - began
        print(f"{number}/{len(todo)} {passed:5.0f} s  {name:45} {told(cells[name], {})}", file=sys.stderr, flush=True)
        write(cells)
    ranks.close()
    write(cells)
    PAGE.write_text(page(read()))
    broken = [f"{name}: {cell['broken']}" for name, cell in read().items() if "broken" in cell]
    print(*broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
