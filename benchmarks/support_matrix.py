"""docs/support_matrix.md: which layout works with which feature, measured by task=verify on CPU ranks.

python -m benchmarks.support_matrix                 measure what is missing or stale, then write the page
python -m benchmarks.support_matrix --again         measure every cell again
python -m benchmarks.support_matrix --only "pp2 |"  only cells whose name contains this
python -m benchmarks.support_matrix --check         measure nothing: are all cells there, none broken, the page theirs?
python -m benchmarks.support_matrix --sample        measure one cell in 97 and compare; each commit has the next sample
python -m benchmarks.support_matrix --sample=7      this one

support_matrix.json beside this file keeps every cell with the commit at which it was measured. A cell is stale when a
source that concerns it means something else since (benchmarks/history.py); what is refused is asked again every time,
for that takes no time. Stopped in between it goes on where it was. The exit code is 1 when a cell is broken or, with
--check or --sample, anything is not as it is written down.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from benchmarks import history
from src.config.build import build
from src.config.composition.resolution import resolve
from src.config.groups import CONF, options
from src.distributed.parallel_dims import ParallelDims
from src.distributed.pipeline.stages import SCHEDULES
from src.distributed.process.rank_context import RankContext as Process
from src.errors import UserError
from src.planning.plan import plan
from src.run import Run
from src.tasks.verify.config import Verify
from src.tasks.verify.rank import certify
from tests.ranks import RankError, RankPool
from tests.train.runs import section

HOME = Path(__file__).resolve().parents[1]
CELLS = Path(__file__).with_suffix(".json")
PAGE = HOME / "docs" / "support_matrix.md"
COMMAND = "python -m benchmarks.support_matrix"
# What decides whether a layout trains like one device.
SOURCES = ("src/distributed/", "src/models/llama3/", "src/models/deepseek_v3/", "src/models/qwen3/", "src/models/moe/",
           "src/models/decoder", "src/models/block", "src/models/cross_entropy", "src/train/setup", "src/train/step",
           "conf/parallel/")  # fmt: skip
FOLDERS = ("src", "conf/parallel")  # a file that moved in or out of the above moved within these
# Which cells a source concerns: those whose name has the text, or one of several (";"). It goes by the last of these
# words in the source's path.
CONCERNS = {
    "context": "cp",
    "pipeline": "pp",
    "tensor": "tp",
    **dict.fromkeys(("float8", "float8_styles"), "float8"),
    "recompute": "recompute",
    "compile": "compile",
    "deepseek_v3": "deepseek",
    "qwen3": "qwen3",
    "plain_tensor": "deepseek;qwen3",
    **dict.fromkeys(("moe", "expert"), "deepseek;qwen3 experts"),
    # They start ranks, look at machines, multiply experts in float8, and name tensors of files, which no cell does.
    **dict.fromkeys(("process", "float8_experts", "hugging_face"), "no cell"),
}
SAMPLES = 97  # 5 cells each, some 50 CPU seconds; a prime, so that a sample has all features and layouts

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
    "tied embeddings": ("model.tie_word_embeddings=true",),
    "bf16": ("precision=bf16",),
    "float8": ("precision=fp8", "precision.float8.emulate=true"),
    "muon": ("optim=muon",),
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
    "muon": ("optim=muon",),
}
# Of a Qwen3, whose cells have this word in their names: its code is that of the other two but for norms of queries and
# keys, so a dense one goes through Llama's layouts, and one with experts through DeepSeek's layouts and schedules.
QWEN3 = "qwen3"
QWEN3_DENSE = ("model=qwen3_debug", "model.n_kv_heads=4", "model.head_dim=16", "model.ffn_dim=128")
QWEN3_ROUTED = ("model=qwen3_moe_debug", "model.n_kv_heads=4", "model.head_dim=16", "model.moe.hidden_dim=64")
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

Cell = dict[str, Any]  # commit, and {loss, gradient} or {refused: [...]} or {broken: ...}


def concern(file: str) -> str:
    """What is in the names of the cells that a source concerns."""
    path = Path(file)
    if path.parts[:2] == ("conf", "parallel"):
        return f"{path.stem} | "
    words = (*path.parent.parts, path.stem)
    return next((CONCERNS[word] for word in reversed(words) if word in CONCERNS), "")


def layouts(*, routed: bool = False) -> list[str]:
    """The presets that fit, the smallest first; those that spread experts for a `routed` model only."""
    sections = {option: section("parallel", option) for option in options("parallel")}
    # parallel=auto chooses one of them.
    presets = {option: each for option, each in sections.items() if type(each) is ParallelDims}
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
    for layout in layouts():
        yield f"{layout} | {QWEN3} plain", (f"parallel={layout}", *QWEN3_DENSE)
    for layout in layouts(routed=True):
        yield f"{layout} | {QWEN3} experts", (f"parallel={layout}", *QWEN3_ROUTED)
    for layout in pipelines(routed=True):
        for schedule in SCHEDULES:
            given = (f"parallel={layout}", *QWEN3_ROUTED, f"parallel.pipeline_schedule={schedule}")
            yield f"{layout} | {QWEN3} experts {schedule}", given


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


def measured(ranks: RankPool, overrides: tuple[str, ...]) -> Cell:
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
    """Cells that are missing, or that a source concerns which means something else now than when they were measured.
    Those of a commit that git does not know are not among them.
    """
    found = []
    for name, _ in wanted():
        try:
            since = history.changed(cells[name]["commit"], FOLDERS) if name in cells else None
        except history.NoHistoryError:
            continue
        if since is None or any(touches(file, name) for file in since):
            found.append(name)
    return found


def touches(file: str, name: str) -> bool:
    """Whether a change of this file may change this cell."""
    if not file.startswith(SOURCES):
        return False
    text = concern(file)
    return name.startswith(text) if file.startswith("conf/parallel/") else any(each in name for each in text.split(";"))


def unknown(cells: dict[str, Cell]) -> set[str]:
    """Commits of cells that git does not know here."""
    found = set()
    for commit in {cell["commit"] for cell in cells.values()}:
        try:
            history.git("cat-file", "-e", f"{commit}^{{commit}}")
        except history.NoHistoryError:
            found.add(commit)
    return found


def sample(number: int) -> list[str]:
    """Names of one in SAMPLES cells."""
    return [name for name, _ in wanted()][number % SAMPLES :: SAMPLES]


def turn() -> int:
    """Whose turn it is: every commit has the next sample; where their number is not known, every day has."""
    try:
        return history.commits() % SAMPLES
    except history.NoHistoryError:
        return date.today().toordinal() % SAMPLES


def disagreement(written: Cell, found: Cell) -> str | None:
    """What a cell that was measured again says against the one that is written down. How far it is from one device is
    judged by the certificate's tolerances, beyond which it is broken: another processor rounds otherwise.
    """
    kinds = [next(kind for kind in ("refused", "broken", "loss") if kind in cell) for cell in (written, found)]
    if "broken" not in kinds and kinds[0] == kinds[1] and written.get("refused") == found.get("refused"):
        return None
    was, now = (
        told(cell, {}) if kind == "loss" else f"{kind}: {cell[kind]}"
        for kind, cell in zip(kinds, (written, found), strict=True)
    )
    return f"now {now}; written down: {was}"


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
    qwen3 = table("layout", layouts(), ["plain"], cells, notes, QWEN3 + " ")
    qwen3_routed = table("layout", routed[0], ["experts"], cells, notes, QWEN3 + " ")
    qwen3_schedules = table("layout", routed[1], list(SCHEDULES), cells, notes, QWEN3 + " experts ")
    reasons = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    parts = (
        INTRODUCTION.strip(),
        f"## Layouts and features\n\n{features}",
        f"## Pipelines and their schedules\n\n{schedules}",
        f"## DeepSeek-V3: layouts and features\n\n{routed_features}",
        f"## DeepSeek-V3: pipelines and their schedules\n\n{routed_schedules}",
        f"## Qwen3: layouts\n\n{qwen3}",
        f"## Qwen3 with experts: layouts\n\n{qwen3_routed}",
        f"## Qwen3 with experts: pipelines and their schedules\n\n{qwen3_schedules}",
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
    """Why the page is not what it should be."""
    cells = read()
    missing = [name for name, _ in wanted() if name not in cells]
    found = [f"{len(missing)} cells were never measured: {', '.join(missing[:3])} ..."] if missing else []
    found += [f"{name} is broken: {cell['broken']}" for name, cell in cells.items() if "broken" in cell]
    if not PAGE.exists() or PAGE.read_text() != page(cells):
        found.append(f"{PAGE.relative_to(HOME)} is not written from {CELLS.relative_to(HOME)}")
    return found


def each_measured(names: set[str]) -> Iterator[tuple[str, Cell]]:
    """Cells with these names, told on stderr as they come."""
    todo = {name: overrides for name, overrides in wanted() if name in names}
    ranks, began = RankPool(), time.monotonic()
    for number, (name, overrides) in enumerate(todo.items(), 1):
        cell = measured(ranks, overrides)
        passed = time.monotonic() - began
        print(f"{number}/{len(todo)} {passed:5.0f} s  {name:45} {told(cell, {})}", file=sys.stderr, flush=True)
        yield name, cell
    ranks.close()


def compare(number: int) -> list[str]:
    """Measure one sample; what is not as it is written down."""
    print(f"sample {number} of {SAMPLES}", file=sys.stderr)
    cells, found = read(), []
    for name, cell in each_measured(set(sample(number))):
        if name not in cells:
            found.append(f"{name} was never measured")
        elif problem := disagreement(cells[name], cell):
            found.append(f"{name}: {problem}")
    return found


def renew(*, again: bool, only: str) -> list[str]:
    """Measure what is missing, stale or refused, or all of it; what is broken. Each cell is written at once."""
    commit = history.head()
    if dirty := [path for path in history.uncommitted(*FOLDERS) if path.startswith(SOURCES)]:
        return [f"commit {', '.join(dirty[:3])} first: a cell carries the commit at which it was measured"]
    cells = read()
    if not again and (lost := unknown(cells)):
        print(
            f"git does not know {', '.join(sorted(lost))} here (a shallow clone?): whether its cells are stale cannot "
            "be told, and they stay; --again measures them",
            file=sys.stderr,
        )
    refused = {name for name, cell in cells.items() if "refused" in cell}
    names = {name for name, _ in wanted()} if again else refused | set(stale(cells))
    for name, cell in each_measured({name for name in names if only in name}):
        if cell != {"refused": cells.get(name, {}).get("refused")}:  # still refused: nothing was measured
            cells[name] = {"commit": commit} | cell
        write(cells)
    write(cells)
    PAGE.write_text(page(read()))
    return [f"{name}: {cell['broken']}" for name, cell in read().items() if "broken" in cell]


def main() -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure every cell again")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--check", action="store_true", help="measure nothing; say what is missing or broken")
    parser.add_argument("--sample", type=int, nargs="?", const=turn(), help="measure one cell in 97 and compare")
    given = parser.parse_args()
    problems = outdated() if given.check else []
    if given.sample is not None:
        problems += compare(given.sample)
    elif not given.check:
        try:
            problems = renew(again=given.again, only=given.only)
        except history.NoHistoryError as error:
            problems = [f"no git history here ({error}): only --check and --sample work without it"]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
