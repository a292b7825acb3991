"""Send what was logged offline: `python -m src.metrics.trackers.sync <run or sweep folder> ...`; again: only the rest.

The points come from metrics.jsonl, not from wandb's own offline files: each of those counts its steps from 0, and a
server that has seen a later step drops them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.config.tree import read
from src.errors import FolderError, UserError
from src.metrics.trackers.weights_and_biases import OFFLINE_FILE, WandbSink, WeightsAndBiases
from src.storage.atomic_write import atomic_write
from src.storage.json_lines import METRICS_FILE, Lines
from src.storage.streams import to_stderr

SENT_FILE = "wandb_sent.json"
FINISH_SECONDS = 600.0  # a person waits, no GPU does
NOT_VALUES = ("step", "time", "event")


def sync(folder: Path) -> int:
    """Send the points of offline attempts that were not sent before; how many. FolderError for a run without wandb."""
    options = _options(folder)
    waiting = offline(folder)
    sent = _sent(folder)
    fresh = [(number, line) for number, line in waiting if number >= sent]
    if not fresh:
        return 0
    sink = WandbSink(options, folder, read(folder / "config.yaml"), FINISH_SECONDS)
    _connect(sink, folder)
    for _, line in fresh:
        if line.get("event") == "image":
            if Path(line["path"]).exists():
                sink.image(line["step"], line["name"], Path(line["path"]))
        else:
            sink.record(line["step"], {key: value for key, value in line.items() if key not in NOT_VALUES})
    sink.finish(_succeeded(folder))
    # Last: a kill before this line sends points twice, and loses none.
    atomic_write(folder / SENT_FILE, json.dumps({"lines": fresh[-1][0] + 1}) + "\n")
    return len(fresh)


def _connect(sink: WandbSink, folder: Path) -> None:
    import wandb

    try:
        sink.open_online()
    except (wandb.Error, TimeoutError) as error:
        raise FolderError(f"{folder}: nothing sent, wandb says: {error}") from error


def offline(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The points that no server saw, with their line numbers: those of attempts that a wandb sink opened offline."""
    begun = [line["time"] for line in Lines(folder / OFFLINE_FILE).read()]
    lines = list(enumerate(Lines(folder / METRICS_FILE).read()))
    starts = {line["attempt"]: line["time"] for _, line in lines if line.get("event") == "start"}
    # A sink opens after its attempt's first line.
    attempts = {max((n for n, started in starts.items() if started <= time), default=1) for time in begun}
    points = [(number, line) for number, line in lines if line.get("event") in (None, "image")]
    return [(number, line) for number, line in points if line["attempt"] in attempts]


def _options(folder: Path) -> WeightsAndBiases:
    """The run's own, but online."""
    tracker = read(folder / "config.yaml").get("tracker") or {}
    wandb = tracker.get("wandb")
    if wandb is None:
        raise FolderError(f"{folder}: tracker.wandb is null, this run was not logged to wandb")
    options = {key: value for key, value in wandb.items() if key != "_target_"}
    return WeightsAndBiases(**options | {"mode": "online"})


def _sent(folder: Path) -> int:
    """Lines of metrics.jsonl that need no second look."""
    file = folder / SENT_FILE
    return int(json.loads(file.read_text())["lines"]) if file.exists() else 0


def _succeeded(folder: Path) -> bool:
    last = Lines(folder / METRICS_FILE).last() or {}
    return last.get("status") != "failed"


def runs(folder: Path) -> Iterator[Path]:
    """The folder itself, or the runs of a sweep."""
    if (folder / "config.yaml").exists():
        yield folder
    elif (folder / "ledger.jsonl").exists():
        points = [Path(line["folder"]) for line in Lines(folder / "ledger.jsonl").read() if line["event"] == "point"]
        yield from (each for each in points if (each / METRICS_FILE).exists())
    else:
        raise FolderError(f"{folder}: neither a run folder nor a sweep folder")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 when a folder could not be sent; the others are."""
    parser = argparse.ArgumentParser(prog="python -m src.metrics.trackers.sync", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    code = 0
    for given in parser.parse_args(arguments).folders:
        try:
            for folder in runs(given):
                count = sync(folder)
                print(f"{folder}: {count} points sent" if count else f"{folder}: nothing to send")
        except UserError as error:
            to_stderr(error.problems)
            code = error.exit_code
    return code


if __name__ == "__main__":
    sys.exit(main())
