"""docs/config.md and docs/metrics.md are made of the code: who reads a key is found in it."""

import ast
import re
from pathlib import Path

from docs.key_costs import COSTS
from docs.readers import Code, read_by
from docs.reference import PAGES
from src.config.groups import EXPERIMENT, GROUPS, RECIPE
from src.config.reference.keys import Key, keys, kinds, top_keys

DOCS = Path(__file__).parents[1] / "docs"
# Keys that are read through a mapping or a list of names: `tree["task"]["run"]`, `getattr(self, kind)`.
NAMED_AT_RUN_TIME = {
    *("task.run", "task.runs", "task.element", "sweep.name", "parallel.write", "precision.among"),
    *(f"cluster.{name}" for name in ("account", "constraint", "qos")),
    *(f"optim.{name}" for name in ("embedding", "head", "norms", "router")),
}


def every() -> list[Key]:
    groups = [group for group in GROUPS if group not in (RECIPE, EXPERIMENT)]
    return [*top_keys(), *(key for group in groups for names in kinds(group).values() for key in keys(group, names[0]))]


def test_the_pages_that_are_made_of_the_code_are_up_to_date() -> None:
    """Else: python -m docs.reference --write"""
    for name, page in PAGES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == page(), name


def test_every_key_is_read_by_something() -> None:
    unread = {key.name for key in every() if not read_by(key.owner, key.name.rpartition(".")[2])}
    assert {name for name in unread - NAMED_AT_RUN_TIME if not name.startswith("model.")} == set()
    assert read_by("src.tasks.pretrain.config.Pretrain", "log_every") == ["src.train"]
    assert read_by("src.metrics.alerts.config.Alerts", "stall_factor") == ["src.metrics.alerts"]
    assert "src.train" in read_by("src.tasks.pretrain.config.Pretrain", "z_loss"), "by a protocol"
    assert read_by("src.config.build.Top", "folder") == ["src.launch"]


def test_a_key_that_nobody_reads_is_seen() -> None:
    """`steps` by a local name, `loss` by a protocol behind isinstance, `lr` by a field; of `name` only the text."""
    source = """
class Options:
    steps: int
    loss: float
    name: str
class Loses(Protocol):
    @property
    def loss(self) -> float: ...
class Rate:
    lr: float
class Loop:
    def __init__(self, rate: "Rate") -> None:
        self._rate = rate
    def run(self, options: Options | None) -> None:
        taken = self._rate.lr
        chosen = other = options
        print(chosen.steps, "name", other.wrong)
        if isinstance(other, Loses):
            print(other.loss)
"""
    code = Code({"src.one:loop": ast.parse(source)})
    read = {name for name, packages in code.reads.items() if packages == {"src.one"}}
    assert {("Options", "steps"), ("Loses", "loss"), ("Rate", "lr")} <= read
    assert not {("Options", "name"), ("Loses", "steps")} & read
    assert code.satisfies("Options", "Loses")
    assert not code.satisfies("Rate", "Loses")


def test_what_a_key_costs_is_of_a_key_and_leads_somewhere() -> None:
    assert COSTS.keys() <= {key.name for key in every()}
    for text in COSTS.values():
        for page, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", text):
            headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, f"{page}#{anchor}"
