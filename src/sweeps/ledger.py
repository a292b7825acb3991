"""A sweep's folder: what was asked, and what was done about it. `python -m src.sweeps --help` for the commands.

sweep.json         arguments, where they were typed, what is searched
ledger.jsonl       one line per event: a point, a submission, a refusal, a cancellation; only ever appended to
points/<hash>.yaml the config of each point, as resolved
table.csv report.html
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from src.cluster.backend import JobScheduler
from src.cluster.batch_system import scheduler_of
from src.config import tree as trees
from src.errors import DiskFullError, FolderError
from src.runs.folder import place
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import Lines
from src.storage.space import room
from src.sweeps.status import RunStatus, Submission, job_states, status_of

SWEEP = "sweep.json"
EVENTS = "ledger.jsonl"


@dataclass(frozen=True)
class SweepPoint:
    """One run of the sweep; its identity is its config's."""

    number: int  # from 1, in the order of asking
    identity: str
    folder: Path
    overrides: Mapping[str, str]
    submitted: float | None = None  # the last time, in seconds since 1970
    refused: str | None = None  # why it could not be started, if that was the last word
    cancelled: bool = False
    proposal: Mapping[str, Any] | None = None  # what a search drew, by key


class Ledger:
    """Safe against a kill at any moment: the file is all there is, and each look at it reads what is new in it."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self._events = Lines(self.path / EVENTS)
        self._facts: dict[str, dict[str, Any]] = {}  # of each point, by its identity, as far as the file was read
        self._read = 0  # bytes

    @classmethod
    def make(cls, path: Path, argv: Sequence[str], space: Mapping[str, str]) -> Self:
        """The folder of this sweep, new or found again."""
        ledger = cls(path)
        try:
            with room(path):
                (ledger.path / "points").mkdir(parents=True, exist_ok=True)
        except DiskFullError:
            raise
        except OSError as error:
            raise FolderError(f"{path}: cannot be made ({error.strerror}); pass another root=...") from error
        if not (ledger.path / SWEEP).exists():
            about = {"argv": [*argv], "space": dict(space), "home": str(Path.cwd())}
            atomic_write(ledger.path / SWEEP, json.dumps(about, indent=2) + "\n")
        return ledger

    @classmethod
    def open(cls, path: Path) -> Self:
        """FolderError where no sweep is."""
        if not (path / SWEEP).exists():
            raise FolderError(f"{path}: no sweep folder; they are at <root>/sweeps/<name>-<hash>")
        return cls(path)

    @property
    def argv(self) -> list[str]:
        """What the sweep was asked with."""
        return [*self._about()["argv"]]

    @property
    def home(self) -> Path:
        """The folder from which the command's relative paths count."""
        return Path(self._about()["home"])

    @property
    def space(self) -> dict[str, str]:
        """What is searched; empty where the points were given."""
        return dict(self._about()["space"])

    def add(
        self,
        tree: trees.Tree,
        overrides: Mapping[str, str],
        proposal: Mapping[str, Any] | None = None,
    ) -> SweepPoint:
        """A point already there is left as it is."""
        identity = trees.identity(tree)
        given = tree["folder"]
        folder = place(Path(tree["root"]), tree["name"], identity, None if given is None else Path(given))
        known = self._known()
        trees.write(self.path / "points" / f"{identity}.yaml", tree)  # the newest root, cluster and tracker
        if identity in known:
            return SweepPoint(identity=identity, **known[identity])
        point = SweepPoint(len(known) + 1, identity, folder, dict(overrides), proposal=proposal)
        self._note(
            "point", point, number=point.number, folder=str(folder), overrides=dict(overrides), proposal=proposal
        )
        return point

    def submitted(self, point: SweepPoint) -> None:
        """It is handed over now."""
        self._note("submitted", point)

    def resumed(self, point: SweepPoint) -> None:
        """It shall go on after all."""
        if point.cancelled:
            self._note("resumed", point)

    def refused(self, point: SweepPoint, why: str) -> None:
        """It could not be handed over."""
        self._note("refused", point, why=why)

    def cancelled(self, point: SweepPoint) -> None:
        """It shall not go on."""
        self._note("cancelled", point)

    def tree(self, point: SweepPoint) -> trees.Tree:
        """The config of a point."""
        return trees.read(self.path / "points" / f"{point.identity}.yaml")

    def points(self) -> list[SweepPoint]:
        """In the order of asking."""
        found = [SweepPoint(identity=key, **fact) for key, fact in self._known().items()]
        return sorted(found, key=lambda point: point.number)

    def _known(self) -> dict[str, dict[str, Any]]:
        """With what any process has added since the last look."""
        lines, self._read = self._events.since(self._read)
        for line in lines:
            fact = self._facts.setdefault(line["identity"], {"submitted": None, "refused": None, "cancelled": False})
            if line["event"] == "point":
                fact |= {key: line[key] for key in ("number", "overrides", "proposal")}
                fact["folder"] = Path(line["folder"])
            elif line["event"] == "submitted":
                fact |= {"submitted": line["time"], "refused": None}
            elif line["event"] == "refused":
                fact["refused"] = line["why"]
            elif line["event"] in ("cancelled", "resumed"):
                fact["cancelled"] = line["event"] == "cancelled"
        return self._facts

    def standings(self) -> list[tuple[SweepPoint, RunStatus]]:
        """Every point with how it stands now; each scheduler is asked once.

        Keys that only others name, as after `extend`, are read from the point's config.
        """
        points = self.points()
        keys = list(dict.fromkeys(key for point in points for key in point.overrides))
        points = [self._completed(point, keys) for point in points]
        handed = [self._submission(point) for point in points]
        jobs = job_states(handed)
        return [(point, status_of(each, jobs.get(point.folder))) for point, each in zip(points, handed, strict=True)]

    def scheduler(self, point: SweepPoint) -> JobScheduler:
        """Of the cluster that the point was last asked for."""
        return scheduler_of(self.tree(point))

    def swept(self) -> list[str]:
        """The keys in which points differ, in the order of the command line."""
        return trees.swept([point.overrides for point in self.points()])

    def _submission(self, point: SweepPoint) -> Submission:
        return Submission(point.folder, self.scheduler(point), point.submitted, point.refused, point.cancelled)

    def _completed(self, point: SweepPoint, keys: Sequence[str]) -> SweepPoint:
        absent = [key for key in keys if key not in point.overrides]
        if not absent:
            return point
        tree = self.tree(point)
        values = {key: value for key in absent if not isinstance(value := _at(tree, key), Mapping)}
        return replace(point, overrides={**point.overrides, **{key: str(value) for key, value in values.items()}})

    def _about(self) -> dict[str, Any]:
        return dict(json.loads((self.path / SWEEP).read_text()))

    def _note(self, event: str, point: SweepPoint, **facts: object) -> None:
        self._events.append({"event": event, "time": round(time.time(), 3), "identity": point.identity, **facts})


def _at(tree: trees.Tree, key: str) -> Any:
    """The value at a dotted path; nothing where there is none."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    return value


if __name__ == "__main__":
    print("src.sweeps.ledger is no command; pass the sweep folder to python -m src.sweeps status", file=sys.stderr)
    sys.exit(2)
