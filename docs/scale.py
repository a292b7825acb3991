"""docs/scale.md and its pictures, of what src/planning predicts; no GPU, one core, minutes.

python -m docs.scale                 the tables
python -m docs.scale --write         the tables into docs/scale.md, the pictures into docs/pictures

Every figure is a prediction (docs/predicted_time.md says how right those are), of the fastest layout that
src/planning/layout_search.py finds.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

from docs.scale_pictures import Line, Panel, draw
from src.config.build import build
from src.config.composition.requests import asked
from src.distributed.parallel_dims import ParallelDims
from src.planning.layout_search import Found, Space, best, legal
from src.planning.memory import GIB
from src.planning.plan import load_of
from src.planning.time.collectives import Fabric
from src.planning.time.devices import GPUS
from src.planning.time.step import WASTE, Question
from src.run import Run

HOME = Path(__file__).resolve().parents[1]
PAGE, PICTURES = HOME / "docs" / "scale.md", HOME / "docs" / "pictures"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"

CARD = 400e9 / 8  # bytes/s of a 400 Gb/s card
SIZES = (8, 32, 128, 512, 2048, 8192, 16384)  # GPUs
SITES = ("H100", "H200")
PAYS = 0.95  # of the fastest layout's speed: with less a kind of layout does not pay
TOKENS_EACH = 16_384  # of a step on one GPU, in weak scaling


@dataclass(frozen=True)
class Model:
    """A model with a batch as its authors train it."""

    name: str
    preset: str
    seq_len: int
    global_batch: int  # sequences


MODELS = (
    Model("8B", "llama3_8b", 8192, 512),
    Model("70B", "llama3_70b", 8192, 2048),
    Model("405B", "llama3_405b", 8192, 2048),
    Model("16B", "deepseek_v3_16b", 4096, 4608),
    Model("671B", "deepseek_v3_671b", 4096, 15360),
)


@dataclass(frozen=True)
class Case:
    """A model on so many GPUs of a site."""

    model: Model
    gpu: str
    gpus: int
    global_batch: int

    @property
    def question(self) -> Question:
        gpu = GPUS[self.gpu]
        load = load_of(_run(self.model, self.global_batch))
        return Question(load, gpu, Fabric(gpu.nvlink * gpu.shares.nvlink, CARD * gpu.shares.network))

    @property
    def space(self) -> Space:
        return Space(self.gpus, {}, None, None, self.global_batch)

    def speed(self, found: Found) -> float:
        """Tokens per second of one GPU."""
        return self.global_batch * self.model.seq_len / found.step.seconds / self.gpus

    def mfu(self, found: Found) -> float:
        """0 to 1, attention counted in full."""
        flops = found.load.model.counts(self.model.seq_len).flops_per_token
        return self.speed(found) * flops / GPUS[self.gpu].bf16

    def best(self, among: Callable[[ParallelDims], bool] = lambda _: True) -> Found | None:
        found = best(self.question, self.space, int(GPUS[self.gpu].gib * GIB), 1, among)
        return found[0] if found else None


@cache
def _run(model: Model, global_batch: int) -> Run:
    argv = ["task=bench", "compile=blocks", "precision=bf16", f"model={model.preset}", f"task.seq_len={model.seq_len}"]
    (tree,) = asked([*argv, f"task.global_batch={global_batch}"]).trees
    return Run.from_sections(build(tree))


@cache
def fastest(case: Case) -> Found | None:
    """None: nothing fits, or the batch has no parts for so many GPUs."""
    if case not in _with_kinds():
        return case.best()
    found = [each for name in EVERY_KIND if (each := fastest_of(case, name)) is not None]
    return min(found, key=lambda each: each.step.seconds, default=None)


@cache
def _with_kinds() -> frozenset[Case]:
    """Cases of which the fastest layout of each kind is wanted, too: no need to search twice."""
    return frozenset(strong(model, "H100", gpus) for model in MODELS for gpus in SIZES)


def strong(model: Model, gpu: str, gpus: int) -> Case:
    """One batch, on however many."""
    return Case(model, gpu, gpus, model.global_batch)


def weak(model: Model, gpu: str, gpus: int) -> Case:
    """As many tokens on each GPU."""
    return Case(model, gpu, gpus, TOKENS_EACH * gpus // model.seq_len)


SCALINGS = {"Strong scaling: one batch": strong, "Weak scaling: 16,384 tokens a GPU": weak}


def row(case: Case) -> str:
    """Of a table."""
    head = f"| {case.model.name} | {case.gpu} | {case.gpus:,} |"
    if (found := fastest(case)) is None:
        return f"{head} | | | nothing fits |"
    step = found.step
    share = step.parts[step.limit] / step.seconds
    return (
        f"{head} {case.speed(found):,.0f} | {case.mfu(found):.1%} | {step.seconds:.3g} | {found.text} | "
        f"{step.limit} {share:.0%} |"
    )


HEADINGS = (
    "| model | device | GPUs | tokens/s/GPU | MFU | s a step | fastest layout | most of the rest |",
    "|---|---|---:|---:|---:|---:|---|---|",
)


def _scalings() -> Iterator[str]:
    for title, scaling in SCALINGS.items():
        yield from (f"### {title}", "", *HEADINGS)
        yield from (row(scaling(model, gpu, gpus)) for model in MODELS for gpu in SITES for gpus in SIZES)
        yield ""


CUTS = ("tensor", "pipeline", "context")
EVERY_KIND = ("FSDP", *(" + ".join(cut) for count in (1, 2, 3) for cut in combinations(CUTS, count)))
KINDS = ("FSDP", "tensor", "pipeline", "context", "tensor + pipeline", "tensor + context")


def kind(degrees: ParallelDims) -> str:
    """What a layout cuts beside the batch; experts may be spread in each."""
    cut = [axis for axis in CUTS if getattr(degrees, axis) > 1]
    return " + ".join(cut) or "FSDP"


@cache
def fastest_of(case: Case, name: str) -> Found | None:
    return case.best(lambda degrees: kind(degrees) == name)


def lost(case: Case, name: str) -> str:
    """Why a kind of layout does not pay: what its step has more of than the fastest one, or why there is none."""
    found, first = fastest_of(case, name), fastest(case)
    if first is None:
        return "nothing fits"
    if found is None:
        if not any(kind(load.degrees) == name for load in legal(case.question.load, case.space)):
            return "the batch has too few sequences"
        return "memory"
    more = {part: found.step.parts[part] - first.step.parts[part] for part in found.step.parts}
    most = max(more, key=lambda part: more[part])
    slower = found.step.seconds / first.step.seconds - 1.0
    word = most if most in WASTE else f"{most}, in smaller pieces"
    return f"{word}: {100 * more[most] / first.step.seconds:.0f} % of the step; {100 * slower:.0f} % slower in all"


def paying(model: Model, name: str) -> str:
    """A row: from and up to how many H100 a kind of layout is within PAYS of the fastest, and what ends it."""
    pays = []
    for gpus in SIZES:
        case = strong(model, "H100", gpus)
        found, first = fastest_of(case, name), fastest(case)
        if found is not None and first is not None and first.step.seconds >= PAYS * found.step.seconds:
            pays.append(gpus)
    if not pays:
        return f"| {model.name} | {name} | nowhere | {lost(strong(model, 'H100', 2048), name)} (at 2,048) |"
    end = max(pays)
    after = next((gpus for gpus in SIZES if gpus > end), None)
    why = "" if after is None else f"{lost(strong(model, 'H100', after), name)} (at {after:,})"
    span = f"{end:,}" if len(pays) == 1 else f"{min(pays):,} to {end:,}"
    return f"| {model.name} | {name} | {span} | {why} |"


def _paying() -> Iterator[str]:
    yield from ("### Where each kind of layout stops paying", "")
    yield f"H100, strong scaling; it pays where it is within {1 - PAYS:.0%} of the fastest."
    yield from ("", "| model | beside the batch it cuts | pays on GPUs | and then |", "|---|---|---:|---|")
    yield from (paying(model, name) for model in MODELS for name in KINDS)
    yield ""


# Replica groups: sites that train apart and meet over a link of their own.
GPUS_OF_A_SITE, NUMBER_OF_SITES = 256, 4
LINKS = (1.0, 3.0, 10.0, 30.0, 100.0)  # Gb/s of a site, each way
ROUND_TRIP = 0.05  # seconds between sites, of each of the two parts of an exchange; stated


@dataclass(frozen=True)
class Method:
    """How sites agree; keys are those of fault_tolerance=diloco."""

    name: str
    sync_steps: int
    fragments: int
    delay_steps: int
    exchange: str


METHODS = (
    Method("gradients in every step", 1, 1, 0, "float32"),
    Method("DiLoCo, sync_steps=20", 20, 1, 0, "float32"),
    Method("DiLoCo, sync_steps=100 exchange=int8", 100, 1, 0, "int8"),
    Method("streaming, sync_steps=100 fragments=10 delay_steps=9 exchange=int8", 100, 10, 9, "int8"),
)


def sent(parameters: int, method: Method) -> int:
    """Bytes that leave a site for one exchange of one fragment: each rank its own shards, as in
    src/fault_tolerance/mean.py.
    """
    from src.fault_tolerance.mean import sent_bytes

    each = -(-parameters // (GPUS_OF_A_SITE * method.fragments))
    return GPUS_OF_A_SITE * sent_bytes(each, NUMBER_OF_SITES, method.exchange)  # type: ignore[arg-type]


def stall(parameters: int, method: Method, step_seconds: float, gigabits: float) -> float:
    """Seconds that a step waits for the link, on the average: what of an exchange its delay does not hide."""
    wire = 8 * sent(parameters, method) / (gigabits * 1e9) + 2 * ROUND_TRIP
    interval = method.sync_steps // method.fragments
    return max(0.0, wire - method.delay_steps * step_seconds) / interval


def site_case(model: Model) -> Case:
    """One site's share of the batch; its layout keeps one copy of the weights, so that each is sent once."""
    return Case(model, "H100", GPUS_OF_A_SITE, model.global_batch // NUMBER_OF_SITES)


@cache
def of_a_site(model: Model) -> Found | None:
    return site_case(model).best(lambda degrees: degrees.replicate == 1)


def group_row(model: Model, method: Method, found: Found) -> str:
    """Of the table of replica groups."""
    parameters, seconds = found.load.model.counts(model.seq_len).parameters, found.step.seconds
    tokens = model.global_batch * model.seq_len
    size = sent(parameters, method) * method.fragments / method.sync_steps
    cells = []
    for gigabits in LINKS:
        waited = stall(parameters, method, seconds, gigabits)
        cells.append(f"{tokens / (seconds + waited) / 1e6:.3g} M, {waited / (seconds + waited):.0%}")
    return f"| {model.name} | {method.name} | {size / 1e9:.3g} | {' | '.join(cells)} |"


def _groups() -> Iterator[str]:
    yield from (f"### {NUMBER_OF_SITES} sites of {GPUS_OF_A_SITE} H100, a link of their own between them", "")
    yield "Tokens/s of all sites, and the share of time that they wait for the link, by Gb/s of a site."
    yield ""
    yield f"| model | method | GB sent by a site, a step | {' | '.join(f'{each:g} Gb/s' for each in LINKS)} |"
    yield f"|---|---|---:|{'---:|' * len(LINKS)}"
    for model in MODELS:
        if (found := of_a_site(model)) is None:
            yield f"| {model.name} | {METHODS[0].name} | does not fit a site |{' |' * len(LINKS)}"
            continue
        yield from (group_row(model, method, found) for method in METHODS)
    yield ""


def tables() -> str:
    """Markdown between the two marks of the page."""
    return "\n".join([*_scalings(), *_paying(), *_groups()])


def page(text: str) -> str:
    """`text` of docs/scale.md with new tables."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{tables()}\n{END}{after}"


def pictures() -> None:
    """MFU over the number of GPUs, by model and by kind of layout; tokens/s over the speed of links."""
    for name, (title, scaling) in zip(("strong", "weak"), SCALINGS.items(), strict=True):
        panels = [Panel(gpu, [_mfu(model, gpu, scaling) for model in MODELS]) for gpu in SITES]
        draw(PICTURES / f"scale_{name}.svg", panels, "GPUs", "MFU, %", title)
    panels = [Panel(model.name, [line for name in KINDS if (line := _kind_line(model, name)).x]) for model in MODELS]
    draw(PICTURES / "scale_layouts.svg", panels, "H100", "MFU, %")
    panels = [Panel(model.name, [_link_line(found, each) for each in METHODS]) for model in MODELS
              if (found := of_a_site(model)) is not None]  # fmt: skip
    draw(PICTURES / "scale_groups.svg", panels, "Gb/s of a site", "% of the speed without a link")


def _mfu(model: Model, gpu: str, scaling: Callable[[Model, str, int], Case]) -> Line:
    cases = [scaling(model, gpu, gpus) for gpus in SIZES]
    found = [(case.gpus, 100 * case.mfu(each)) for case in cases if (each := fastest(case)) is not None]
    return Line(model.name, *_columns(found))


def _kind_line(model: Model, name: str) -> Line:
    cases = [strong(model, "H100", gpus) for gpus in SIZES]
    found = [(case.gpus, 100 * case.mfu(each)) for case in cases if (each := fastest_of(case, name)) is not None]
    return Line(name, *_columns(found))


def _link_line(found: Found, method: Method) -> Line:
    parameters, seconds = found.load.model.counts(found.load.seq_len).parameters, found.step.seconds
    shares = [100 * seconds / (seconds + stall(parameters, method, seconds, each)) for each in LINKS]
    return Line(method.name, LINKS, tuple(shares))


def _columns(found: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in found), tuple(y for _, y in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/scale.md and docs/pictures")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text()))
        pictures()
    else:
        print(tables())


if __name__ == "__main__":
    main()
