"""What a start on a shared disk, steps, validation, metrics, a stop, a resume and a crash cost a world of ranks."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from src.checkpoint import folder as files
from src.checkpoint.folder import CheckpointFile, Marker
from src.checkpoint.store import Store
from src.cluster import rank as ranks
from src.cluster.slurm.payload import await_release
from src.data.batches import DIGEST_CHUNK, Batches
from src.distributed import collectives
from src.distributed.process.rank_context import LauncherEnv
from src.metrics.console import Console
from src.metrics.trackers.config import Log
from src.runs import node_copy
from src.runs.folder import RunFolder
from src.runs.frozen_code import Code, Git
from src.runs.records import ATTEMPTS_FILE
from src.train.report import Report
from src.train.resume import recounted
from src.train.stability.stragglers import StragglerWatch
from src.train.step.stepper import Stepper
from src.train.validate import summed_loss
from tests.data.corpora import batches, corpus, synthetic
from tests.distributed.layouts import degrees, parallel_network, rows
from tests.models.shapes import tiny_llama
from tests.scale.fakes import counted_files
from tests.scale.measures import PER_NODE, fake_world
from tests.train.test_step import adamw

MOST_MODULES = 4096  # beyond that the test takes longer, and finds nothing else
PLAYED = 2  # nodes: each one does what the second does
STOP_SECONDS = 10.0
CPU = torch.device("cpu")


@contextmanager
def as_rank(number: int, world: int) -> Iterator[None]:
    facts = LauncherEnv(number, world, number % PER_NODE, PER_NODE)
    with patch.object(LauncherEnv, "read", lambda: facts):
        yield


def code_of(modules: int) -> Code:
    return Code({f"src/m{number}.py": b"a = 1\n" for number in range(modules)}, Git(None, None, None, "", ""))


def run_of(error: Exception | None) -> Any:
    def live(*_: Any) -> bool:
        if error is not None:
            raise error
        return True

    return SimpleNamespace(task=SimpleNamespace(run=live))


@contextmanager
def played_task(error: Exception | None) -> Iterator[None]:
    """Ranks end when their task begins, well or with this error; bytecode is nobody's business here."""
    with (
        patch("src.config.build.build", lambda _: {}),
        patch("src.run.Run.from_sections", lambda _: run_of(error)),
        patch("src.runs.frozen_code.compiled", lambda _: {}),
    ):
        yield


@cache
def start(world: int) -> tuple[int, Counter[str]]:
    """Files of the shared disk that a node's ranks open before their task begins, and all calls of rank 0's node. The
    code has as many modules as there are ranks.
    """
    opened: list[Counter[str]] = []
    with tempfile.TemporaryDirectory() as shared, played_task(None):
        tree = {"name": "a"}
        folder = RunFolder.open(
            tree, {}, root=Path(shared), name="a", identity="0", code=code_of(min(world, MOST_MODULES))
        )
        with folder:
            snapshot = folder.path / "code" / folder.code
            for node in range(min(PLAYED, world // PER_NODE)):
                with tempfile.TemporaryDirectory() as own, patch.object(tempfile, "tempdir", own):
                    with counted_files(below=Path(shared)) as calls:
                        for number in range(node * PER_NODE, (node + 1) * PER_NODE):
                            with as_rank(number, world), patch.object(node_copy, "hold"):
                                node_copy.on_node(snapshot, "7.0")
                                if number == 0:
                                    folder.begin(world)
                                ranks.run_rank(ranks.RankJob(folder.path, folder.code))
                    opened.append(calls)
    return opened[-1]["open"], opened[0]


def start_opens(world: int) -> int:
    """Of a node that is not the first one, if there is another."""
    return start(world)[0] if world > PER_NODE else start(2 * PER_NODE)[0]


def start_creates(world: int) -> int:
    """By all ranks: rank 0 alone creates or renames anything."""
    calls = start(world)[1]
    return calls["create"] + calls["rename"]


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Our own all-reduces of small numbers, not those of a layout: calls and bytes."""
    counts: Counter[str] = Counter()
    whole = collectives._reduce

    def counted(values: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        counts["calls"] += 1
        counts["bytes"] += values.numel() * values.element_size()
        return whole(values, *given, **named)

    with patch.object(collectives, "_reduce", counted):
        yield counts


@cache
def middle(world: int) -> dict[str, Counter[str]]:
    """What a rank takes part in beyond the layout's own collectives."""
    found: dict[str, Counter[str]] = {}
    with fake_world(world):
        network = parallel_network(tiny_llama(), degrees("single", replicate=world))
        config = adamw()
        stepper = Stepper(network, config.build(network.named_parameters(), CPU), config.max_norm, 0)
        batch: Any = rows(1, 16, tiny_llama().vocab_size)
        with counted_collectives() as found["step"]:
            stepper([batch], stop=False)
        with counted_collectives() as found["validation"]:
            summed_loss(network, [batch] * 4, lambda: False)
        with patch.object(dist, "gather_object"):
            watch = StragglerWatch(0.1, 10, CPU, lambda _: None, probe=lambda _: 1.0)
        with counted_collectives() as found["stragglers"]:
            watch.values(10, 1.0, 0.0)
        with counted_collectives() as found["agreement"]:
            collectives.any_rank(False, CPU)
    return found


def step_calls(world: int) -> int:
    return middle(world)["step"]["calls"]


def step_bytes(world: int) -> int:
    return middle(world)["step"]["bytes"]


def validation_bytes(world: int) -> int:
    return middle(world)["validation"]["bytes"] * middle(world)["validation"]["calls"]


def straggler_bytes(world: int) -> int:
    return middle(world)["stragglers"]["bytes"]


def metrics_calls(world: int) -> int:
    """Calls of the file system by all ranks for a step that is logged."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reports = [Report(Log(folder), Console(10), folder), *(Report(None, None, folder) for _ in range(world - 1))]
        with counted_files() as calls, patch.object(Console, "record"):
            for report in reports:
                report.record(10, {"loss": 1.0})
    return sum(calls.values())


def stop_looks(_world: int) -> int:
    """Of a node's ranks at the shared disk, while they wait for the word that all have saved."""
    counts, whole = Counter[str](), Path.exists

    def exists(path: Path) -> bool:
        counts[path.name] += 1
        return whole(path)

    with tempfile.TemporaryDirectory() as place, patch.object(Path, "exists", exists):
        released, near = Path(place, "released"), Path(place, "near")
        waited = [0.0]

        def wait(seconds: float) -> None:
            waited[0] += seconds
            if waited[0] >= STOP_SECONDS:
                released.touch()

        await_release(released, near, leads=True, sleep=wait)
        for _ in range(PER_NODE - 1):
            await_release(released, near, leads=False, sleep=wait)
    return counts["released"]


def resume_samples(world: int) -> int:
    """Samples that a rank hashes to compare those that were used, after `world` windows of them."""
    position, mark = world * DIGEST_CHUNK + 5, ((world - 1) * DIGEST_CHUNK, 7)
    hashed, whole = [0], Batches.checksum

    def checksum(self: Batches, samples: Any) -> int:
        hashed[0] += len(samples)
        return whole(self, samples)

    with tempfile.TemporaryDirectory() as place:
        made = corpus(synthetic(), Path(place))
        before, after = batches(made, synthetic()), batches(made, synthetic())
        before.recall(mark)
        expected = before.digest(position)
        with patch.object(Batches, "checksum", checksum):
            assert recounted(after, position, mark, expected) == expected
    return hashed[0]


def marker_of(world: int) -> Marker:
    """Two files of each rank."""
    names = [f"__{rank}_{part}.distcp" for rank in range(world) for part in range(2)]
    return Marker(1, "2.13.0", {}, dict.fromkeys(names, CheckpointFile(1 << 30, "0123abcd")))


def resume_files(world: int) -> int:
    """Files of a checkpoint that a rank checks."""
    team: Any = SimpleNamespace(_team=SimpleNamespace(world=world))
    return max(map(len, Store._shares(team, marker_of(world))))


def save_creates(world: int) -> int:
    """Files and folders that rank 0 creates or renames for a save, beside its tensors."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "step_00000001"
        with counted_files() as calls:
            files.clean(path.parent, "a")
            files.draft(path, "a").mkdir()
            files.write_marker(files.draft(path, "a"), marker_of(world))
            files.publish(files.draft(path, "a"), path)
    return calls["create"] + calls["rename"]


def crash_records(world: int) -> int:
    """Lines that all ranks write to attempts.jsonl when one of them is lost."""
    with tempfile.TemporaryDirectory() as place, played_task(ConnectionResetError("by peer")):
        (Path(place) / ATTEMPTS_FILE).write_text("")
        told = [0]
        with patch.object(ranks, "end", lambda *_: told.__setitem__(0, told[0] + 1)):
            for number in range(world):
                with as_rank(number, world):
                    try:
                        ranks.run_rank(ranks.RankJob(Path(place), None), {})
                    except ConnectionResetError:
                        continue
    return told[0]
