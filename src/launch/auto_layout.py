"""parallel=auto and precision=auto on the launcher: a run's config gets the layout, micro-batch, recomputation and
precision that were chosen.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from src.config.stages import entries
from src.config.tree import Tree, read_section
from src.errors import ConfigError, PlanError
from src.launch.kept_layout import beside, check_name, keep
from src.storage.streams import to_stderr

if TYPE_CHECKING:
    from src.planning.auto_layout import Decision
    from src.run import Run

AUTO = "src.planning.auto_layout.AutoLayout"
LAYOUT = "src.distributed.parallel_dims.ParallelDims"
OPEN = "src.planning.precision_choice.AutoPrecision"
KEPT = ("storage", "compute", "reduce")  # dtypes that stay where they are given


class Option(NamedTuple):
    """What precision=auto may choose, as a section of the config, and the run with it."""

    section: Tree
    run: "Run"


def decided(tree: Tree, typed: Mapping[str, str]) -> Tree:
    """`tree`, with a layout in the place of parallel=auto and a precision in that of precision=auto; the best that were
    found are shown on stderr. PlanError, ConfigError.
    """
    layout, precision = (tree.get(group) for group in ("parallel", "precision"))
    layout_is_open = isinstance(layout, dict) and layout.get("_target_") == AUTO
    options, refused = dict[str, Option](), dict[str, str]()
    if isinstance(precision, dict) and precision.get("_target_") == OPEN:
        if (begun := _begun(tree)) is not None:
            tree = tree | {"precision": begun}
        else:
            options, refused = _options(tree, precision)
    if layout_is_open:
        return _with_layout(tree, typed, options, refused)
    return _with_precision(tree, options, refused) if options else tree


def _with_layout(tree: Tree, typed: Mapping[str, str], options: Mapping[str, Option], refused: dict[str, str]) -> Tree:
    from src.config.build import build
    from src.planning.auto_layout import decide
    from src.run import Run

    section = tree["parallel"]
    run = next(iter(options.values())).run if options else Run.from_sections(build(tree))
    name, measured = section.get("write"), section.get("place") is not None
    if name is not None:
        check_name(str(name), measured=measured)
    made = decide(run, typed, run.cluster.devices(), {name: each.run.precision for name, each in options.items()})
    chosen = made.chosen.load
    layout = {"_target_": LAYOUT, **made.degrees.model_dump(mode="json")}
    recompute = tree["recompute"]
    if not (entries(tree) and recompute.get("mode") == "auto"):  # each stage has memory enough for another one
        recompute = {**recompute, **chosen.recompute.model_dump()}
    if made.place == 1:  # the table is that of every place
        _show(made, "each is measured" if measured else "the first is taken")
    option = made.chosen.precision
    if option is not None:
        _say(option, made.chosen.step.seconds, made.others, refused | dict(made.refused))
    if name is not None and not measured:
        speed = f"{made.speed(made.chosen):,.0f} tokens/s/GPU predicted"
        evidence = [f"Chosen by parallel=auto for {made.gpus} x {made.gpu}: {speed}."]
        keep(str(name), made.degrees, evidence, beside(chosen.micro_batch, chosen.recompute, option))
    changed = {"parallel": layout, "recompute": recompute}
    changed |= {} if option is None else {"precision": options[option].section}
    return tree | changed | {"task": tree["task"] | {"micro_batch": chosen.micro_batch}}


def _with_precision(tree: Tree, options: Mapping[str, Option], refused: dict[str, str]) -> Tree:
    """For a layout that is given: of each option the whole plan."""
    from src.planning.precision_choice import weight

    seconds: dict[str, float] = {}
    for name, option in options.items():
        try:
            seconds[name] = _step_seconds(option.run)
        except PlanError as error:
            refused[name] = error.problems[0]
    if not seconds:  # the plan that follows tells all that is wrong with the first
        return tree | {"precision": next(iter(options.values())).section}
    places = list(options)
    best = min(seconds, key=lambda name: weight(places.index(name)) * seconds[name])
    _say(best, seconds.pop(best), seconds, refused)
    return tree | {"precision": options[best].section}


def _step_seconds(run: "Run") -> float:
    """Of a step, or of a mean one of all stages. PlanError where it cannot run, and where its time is not known."""
    from src.planning.staged.plans import plan_run

    made = plan_run(run, run.cluster.devices())
    if made.time is None:
        raise PlanError("its time is not known")
    return 3600.0 * made.time.hours / made.steps


def _options(tree: Tree, section: Tree) -> tuple[dict[str, Option], dict[str, str]]:
    """What precision=auto may choose, by option, and why not the rest. PlanError where no time can be predicted."""
    from src.config.build import build
    from src.config.presets import section_of
    from src.planning.precision_choice import AutoPrecision
    from src.run import Run

    whole = Run.from_sections(build(tree))
    _known(whole)
    auto = whole.precision
    assert isinstance(auto, AutoPrecision)
    usual = section_of("precision", "auto")
    given = {key: section[key] for key in KEPT if section[key] != usual[key]}
    checkpoint = tree["checkpoint"]
    if checkpoint.get("every") == "auto":  # decided after this; a plan refuses it
        checkpoint = checkpoint | {"every": 1}
    found, refused = dict[str, Option](), dict[str, str]()
    for name in auto.among:
        asked = section_of("precision", name) | given
        try:
            run = Run.from_sections(build(tree | {"precision": asked, "checkpoint": checkpoint}))
        except ConfigError as error:
            refused[name] = error.problems[0]
            continue
        found[name] = Option(asked, run)
    if not found:
        raise PlanError([f"precision=auto: {name} cannot be: {line}" for name, line in refused.items()])
    return found, refused


def _known(run: "Run") -> None:
    """PlanError where nothing is known of this run's time."""
    from src.planning.time.devices import GPUS
    from src.planning.time.site import SiteFacts
    from src.run import Infers

    otherwise = "a precision, such as precision=bf16"
    if not run.task.steps or (isinstance(run.task, Infers) and run.task.forward_only):
        raise PlanError(f"precision=auto is for trainings, whose time can be predicted; pass {otherwise}")
    if run.fault_tolerance.on:
        raise PlanError(f"precision=auto: steps of replica groups have no predicted time; pass {otherwise}")
    if not isinstance(run.cluster, SiteFacts) or run.cluster.gpu(run.cluster.devices()) is None:
        models = ", ".join(sorted(GPUS))
        raise PlanError(f"precision=auto: the device is not known; pass cluster.gpu_model ({models}), or {otherwise}")


def _begun(tree: Tree) -> Tree | None:
    """The precision of the run in `folder`, which goes on with what was chosen when it began."""
    config = None if tree.get("folder") is None else Path(str(tree["folder"])).expanduser() / "config.yaml"
    if config is None or not config.is_file():
        return None
    to_stderr([f"precision=auto: as {tree['folder']} was begun"])
    found: Tree = dict(read_section(config, "precision"))
    return found


def _say(chosen: str, seconds: float, others: Mapping[str, float], refused: Mapping[str, str]) -> None:
    """What was decided, and why: seconds of a step with each option on the layout that is taken."""
    from src.planning.precision_choice import MARGIN

    beside = ", ".join(f"{each:.3g} s with {name}" for name, each in others.items())
    lines = [f"{chosen}, {seconds:.3g} s a step predicted" + (f"; the same layout takes {beside}" if beside else "")]
    if any(each < seconds for each in others.values()):
        lines[0] += f"; less than {MARGIN:.0%} is no reason to change numbers"
    lines += [f"{name} cannot be: {line}" for name, line in refused.items()]
    to_stderr(f"precision=auto: {line}" for line in lines)


def _show(made: "Decision", then: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from src.planning.precision_choice import MARGIN

    title = f"parallel=auto: the fastest layouts of {made.gpus} x {made.gpu}, predicted; {then}"
    if made.chosen.precision is not None:
        title += f"; all but the first of precision.among count {MARGIN:.0%} more"
    table = Table(title=title, title_justify="left")
    for name in ("layout", "s a step", "tokens/s/GPU", "GiB", "most of the rest"):
        table.add_column(name, justify="left" if name in ("layout", "most of the rest") else "right")
    for found in made.found:
        step = found.step
        share = step.parts[step.limit] / step.seconds
        table.add_row(
            found.text,
            f"{step.seconds:.3g}",
            f"{made.speed(found):,.0f}",
            f"{found.peak / 2**30:.1f}",
            f"{step.limit} {share:.0%}",
        )
    Console(stderr=True, markup=False, emoji=False).print(table)
