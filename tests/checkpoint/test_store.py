"""What a save promises: complete or not there, as it was at the call, checked before it is read."""

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex

from src.checkpoint.folder import read_marker
from src.checkpoint.state import Snapshot
from src.checkpoint.store import Store
from tests.checkpoint.options import options, problems
from tests.checkpoint.states import VALUES, bits, blank, equals, state, tensors, two_saves
from tests.ranks import RankPool

# Bit-exact, and a snapshot ---------------------------------------------------------------------------------


def round_trip(folder: Path, asynchronous: bool) -> dict[str, Any]:
    store = Store(folder / "checkpoints", options(asynchronous=asynchronous))
    assert store.newest() is None
    store.save(10, state(1), {"name": "run"})
    path = store.newest()
    assert path is not None
    given = blank()
    tree = store.load(path, given)
    assert tree["model"]["a.weight"] is given["model"]["a.weight"]
    assert equals(tree, 1)
    assert store.last is not None
    assert 0 < store.last.stall_seconds <= store.last.write_seconds
    return {"path": path, "values": {name: tree[name] for name in VALUES}, "bytes": store.last.bytes}


@pytest.mark.parametrize(("world", "asynchronous"), [(1, True), (2, True), (2, False)])
def test_round_trip_is_exact(ranks: RankPool, tmp_path: Path, world: int, asynchronous: bool) -> None:
    results = ranks(world, round_trip, tmp_path, asynchronous)
    path = tmp_path / "checkpoints" / "step_00000010"
    assert [result["path"] for result in results] == [path] * world
    assert all(result["values"] == VALUES for result in results)
    assert all(type(result["values"]["step"]) is int for result in results)

    marker = read_marker(path)
    written = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "COMPLETE.json"}
    assert {name: (file.bytes, file.crc32) for name, file in marker.files.items()} == {
        name: (len(content), f"{zlib.crc32(content):08x}") for name, content in written.items()
    }
    assert {f"__{rank}_0.distcp" for rank in range(world)} <= written.keys()
    assert (marker.step, marker.facts, marker.torch) == (10, {"name": "run"}, torch.__version__)
    assert results[0]["bytes"] == sum(map(len, written.values()))


def snapshot(folder: Path) -> tuple[bool, int, bool]:
    store = Store(folder, options(asynchronous=True))
    gate, write = threading.Event(), store._write_tensors

    def write_late(*args: Any) -> Any:
        assert gate.wait(60)
        return write(*args)

    store._write_tensors = write_late  # type: ignore[method-assign]
    live, facts = state(1, rng={"seeds": [1, 2], "none": None, "on": True}), {"tokens": [1]}
    store.save(10, live, facts)
    complete_early = (folder / "step_00000010" / "COMPLETE.json").exists()
    # The next optimizer step, while nothing is on the disk yet.
    for tensor in (live["model"]["a.weight"], live["model"]["a.odd"], live["rng_state"]):
        tensor.zero_()
    for tensor in live["optimizer"]["a.weight"].values():
        tensor.add_(1)
    live["rng"]["seeds"].append(3)
    facts["tokens"].append(2)
    gate.set()
    store.finish()
    tree = store.load(folder / "step_00000010", blank())
    return (
        equals(tree, 1) and tree["rng"]["seeds"] == [1, 2],
        len(read_marker(folder / "step_00000010").facts["tokens"]),
        complete_early,
    )


def test_updates_in_place_after_save_do_not_reach_the_disk(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(2, snapshot, tmp_path) == [(True, 1, False)] * 2


def one_in_flight(folder: Path) -> list[str]:
    store = Store(folder, options(asynchronous=True))
    order: list[str] = []
    write = store._write

    def told(job: Any) -> None:
        order.append(f"begin {job.step}")
        write(job)
        order.append(f"end {job.step}")

    store._write = told  # type: ignore[method-assign]
    for step in (1, 2, 3):
        store.save(step, state(step), {})
    store.save(4, state(4), {}, wait=True)
    order.append("returned")
    return order


def test_saves_follow_each_other(ranks: RankPool, tmp_path: Path) -> None:
    expected = [f"{word} {step}" for step in (1, 2, 3, 4) for word in ("begin", "end")]
    assert ranks(2, one_in_flight, tmp_path) == [[*expected, "returned"]] * 2


# What counts, and what stays -------------------------------------------------------------------------------


def save_many(folder: Path, load: int, steps: list[int]) -> list[str]:
    store = Store(folder, options(every=10, keep=2, keep_every=40, keep_best=1))
    for step in steps:
        store.save(step, state(step), {"validation_loss": abs(step - 53.0)})
        if step == load:
            path = store.newest()
            assert path is not None
            store.load(path, blank())
    store.finish()
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_last_the_round_the_best_and_the_loaded(ranks: RankPool, tmp_path: Path) -> None:
    kept = [f"step_{step:08d}" for step in (20, 40, 50, 80, 100, 110)]
    assert ranks(1, save_many, tmp_path, 20, list(range(10, 120, 10))) == [kept]


def die(folder: Path, store_file: Path, moment: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store_file}", rank=0, world_size=1)
    store = Store(folder, options())
    store.save(10, state(1), {}, wait=True)
    setattr(store, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    store.save(20, state(2), {})
    store.finish()


def after_a_kill(folder: Path) -> tuple[list[str], bool]:
    store = Store(folder, options())
    path = store.newest()
    assert path is not None
    tree = store.load(path, blank())
    there = [one.name for one in folder.iterdir()]
    store.save(20, state(2), {})
    newest = store.newest()
    assert newest == folder / "step_00000020"
    return there, equals(tree, 1) and equals(store.load(newest, blank()), 2)


@pytest.mark.parametrize("moment", ["_seal", pytest.param("_close", marks=pytest.mark.slow)])
def test_a_save_killed_midway_is_no_checkpoint(ranks: RankPool, tmp_path: Path, moment: str) -> None:
    with tempfile.TemporaryDirectory() as other:
        process = multiprocessing.get_context("spawn").Process(target=die, args=(tmp_path, Path(other) / "s", moment))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "step_00000020" / ".metadata").exists()
    assert ranks(2, after_a_kill, tmp_path) == [(["step_00000010"], True)] * 2


def same_step_again(folder: Path) -> list[bool]:
    path = folder / "step_00000010"
    first = Store(folder, options())
    first.save(10, state(1), {})
    first.save(10, state(2), {})  # written by this process a moment ago: kept
    first.finish()
    kept = equals(first.load(path, blank()), 1)
    second = Store(folder, options())
    second.save(10, state(2), {})  # of unknown soundness: replaced
    second.finish()
    replaced = equals(second.load(path, blank()), 2)
    third = Store(folder, options(asynchronous=False))
    third._seal = lambda *_: {}["fails"]  # type: ignore[method-assign]
    try:
        third.save(10, state(3), {})
        failed = False
    except RuntimeError as error:
        failed = "KeyError" in str(error)
    dist.barrier()
    fourth = Store(folder, options())
    return [
        kept,
        replaced,
        failed,
        equals(fourth.load(path, blank()), 2),
        [one.name for one in folder.iterdir()] == [path.name],
    ]


def test_a_second_save_of_a_step_never_loses_the_first(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(2, same_step_again, tmp_path) == [[True] * 5] * 2


def weights_alone(folder: Path) -> bool:
    store = Store(folder, options())
    store.save(10, state(1), {}, wait=True)
    model = store.load(folder / "step_00000010", {"model": blank()["model"]})["model"]
    full = tensors(1)
    return bits(model["a.weight"]) == bits(full["weight"]) and bits(model["a.odd"]) == bits(full["odd"])


def test_sections_left_out_are_not_read(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(2, weights_alone, tmp_path) == [True, True]


def stages(folder: Path) -> tuple[str, float]:
    """Ranks of a pipeline have different names; together they are the model."""
    rank = dist.get_rank()
    store = Store(folder, options())
    mine = {"model": {f"layers.{rank}": torch.full((3,), float(rank))}, "by_layer": {f"layers.{rank}": rank}, "step": 1}
    store.save(1, mine, {}, wait=True)
    theirs = 1 - rank
    swapped = {"model": {f"layers.{theirs}": torch.zeros(3)}, "by_layer": {f"layers.{theirs}": 9}, "step": 0}
    tree = store.load(folder / "step_00000001", swapped)
    assert tree["by_layer"] == {f"layers.{theirs}": theirs}
    (told,) = problems(store.load, folder / "step_00000001", {"model": {"layers.0": torch.zeros(3)}})
    return told, tree["model"][f"layers.{theirs}"].sum().item()


def test_ranks_with_different_names(ranks: RankPool, tmp_path: Path) -> None:
    (told, first), (_, second) = ranks(2, stages, tmp_path)
    assert (first, second) == (3.0, 0.0)
    assert told.endswith("1 entry in it that this run has no place for: model.layers.1")


def test_values_can_be_read_by_a_human(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1, two_saves, tmp_path)
    read = json.loads((tmp_path / "step_00000020" / "values.json").read_text())
    assert read["schedule.peak"] == VALUES["schedule"]["peak"]  # type: ignore[index]
    assert read["tokens"] == 2**62 + 1


def on_a_gpu(folder: Path) -> tuple[bool, bool, bool]:
    def tree(seed: int) -> dict[str, Any]:
        return {"model": {name: tensor.cuda() for name, tensor in tensors(seed).items()}, "step": seed}

    store = Store(folder, options())
    live = tree(1)
    store.save(1, live, {})
    for tensor in live["model"].values():
        tensor.zero_()
    store.save(2, tree(2), {}, wait=True)

    def right(seed: int) -> bool:
        found = store.load(folder / f"step_{seed:08d}", tree(5))["model"]
        return all(
            found[name].is_cuda and bits(found[name].cpu()) == bits(full) for name, full in tensors(seed).items()
        )

    pinned = Snapshot(tree(1)["model"], coordinator=True, copy=True).lookup_object(MetadataIndex("weight"))
    return right(1), right(2), pinned.is_pinned()


@pytest.mark.gpu
def test_tensors_on_a_gpu(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(1, on_a_gpu, tmp_path) == [(True, True, True)]
