"""What a store says of damaged files, full disks and states that do not fit; an older checkpoint stays as it was."""

import errno
import json
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from src.checkpoint import folder as files
from src.checkpoint.store import Store
from src.checkpoint.writer import CheckpointWriter
from src.errors import DiskFullError
from src.storage.patience import Patience
from tests.checkpoint.options import options, problems
from tests.checkpoint.states import blank, equals, state, two_saves
from tests.ranks import RankError, RankPool


def load_damaged(folder: Path, path: Path, verify: str) -> tuple[tuple[str, ...], bool]:
    store = Store(folder, options(verify=verify))
    tree = state(5)
    told = problems(store.load, path, tree)
    return told, equals(tree, 5)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    elif how == "truncate":
        del content[len(content) // 2 :]
    path.unlink()
    if how != "remove":
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "how", "verify", "words"),
    [
        ("__1_0.distcp", "flip", "full", "corrupted, crc32"),
        (".metadata", "flip", "full", "corrupted, crc32"),
        ("values.json", "flip", "full", "corrupted, crc32"),
        ("__0_0.distcp", "truncate", "size", "truncated or overwritten"),
        ("__1_0.distcp", "remove", "size", "missing"),
        ("COMPLETE.json", "truncate", "full", "corrupted"),
    ],
)
def test_damage_is_named_and_an_older_checkpoint_offered(
    ranks: RankPool, tmp_path: Path, name: str, how: str, verify: str, words: str
) -> None:
    run = tmp_path / "run" / "checkpoints"
    ranks(2, two_saves, run)
    old, new = run / "step_00000010", run / "step_00000020"
    damage(new / name, how)
    (told, untouched), other = ranks(2, load_damaged, run, new, verify)
    assert (told, untouched) == other
    assert untouched
    assert told[0].startswith(f"{new / name}: {words}")
    offer = f"the next older complete checkpoint is {old}"
    assert told[-1] == f"{offer}: to resume from it, `mv {new} {new}.bad` and run the same command again"
    (told, _), _ = ranks(2, load_damaged, tmp_path / "new" / "checkpoints", new, verify)
    assert told[-1] == f"{offer}: set checkpoint.initial={old}"


def test_damage_of_the_only_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    ranks(1, two_saves, tmp_path)
    path = tmp_path / "step_00000010"
    damage(path / "__0_0.distcp", "flip")
    ((told, _),) = ranks(1, load_damaged, tmp_path, path, "full")
    assert told[-1] == f"there is no older complete checkpoint in {tmp_path}"


@contextmanager
def no_room_on_rank_1(room: int) -> Iterator[None]:
    """A file may not grow beyond this: what a full disk or a quota does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def big() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return {"model": {"w": distribute_tensor(torch.ones(2, 200_000), mesh, [Shard(0)])}}


def full_disk(folder: Path, background: bool) -> dict[str, Any]:
    store = Store(folder, options())
    store.save(10, big(), {}, wait=True)
    with no_room_on_rank_1(400_000):
        if background:
            store.save(20, big(), {})
        told = problems(store.save, 30 if background else 20, big(), {}, wait=True)
    newest = store.newest()
    left = [path.name for path in folder.iterdir()]
    dist.barrier()
    store.save(40, big(), {})
    store.finish()
    return {"told": told, "newest": newest, "left": left, "there": sorted(path.name for path in folder.iterdir())}


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_fails_the_save_on_all_ranks(ranks: RankPool, tmp_path: Path, background: bool) -> None:
    first, second = ranks(2, full_disk, tmp_path, background)
    assert first == second
    (told,) = first["told"]
    assert re.fullmatch(rf"{tmp_path}/step_00000020: file too large; [\d,]+ bytes are free, 800,000 are needed", told)
    assert first["newest"] == tmp_path / "step_00000010"
    assert first["left"] == ["step_00000010"]
    assert first["there"] == ["step_00000010", "step_00000040"]


def short_of_room(folder: Path, keep: int | None) -> tuple[str, list[str]]:
    """What the save of step 40 says where three others leave no room until one of them is gone."""
    store = Store(folder, options(keep=keep))
    for step in (10, 20, 30):
        store.save(step, big(), {}, wait=True)
    write = CheckpointWriter.write_data

    def full(self: CheckpointWriter, *given: Any) -> Any:
        with no_room_on_rank_1(400_000 if len(list(folder.glob("*/COMPLETE.json"))) > 1 else 10**8):
            return write(self, *given)

    with patch.object(CheckpointWriter, "write_data", full):
        try:
            store.save(40, big(), {}, wait=True)
        except DiskFullError as error:
            said = type(error).__name__
        else:
            said = "saved"
    dist.barrier()
    return said, sorted(path.name for path in folder.iterdir())


def test_what_is_not_kept_makes_room_for_the_save(ranks: RankPool, tmp_path: Path) -> None:
    """keep=2 means the new one and the one before it: the oldest may go first. Without keep nothing may."""
    both = ranks(2, short_of_room, tmp_path / "two", 2)
    assert both == [("saved", ["step_00000030", "step_00000040"])] * 2
    everything = ranks(2, short_of_room, tmp_path / "all", None)
    assert everything == [("DiskFullError", ["step_00000010", "step_00000020", "step_00000030"])] * 2


def no_folder(folder: Path) -> tuple[str, ...]:
    return problems(Store, folder, options())


def test_a_folder_that_cannot_be_made(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    first, second = ranks(2, no_folder, tmp_path / "checkpoints")
    assert first == second == (f"{tmp_path / 'checkpoints'}: File exists (rank 0)",)


def misfit(folder: Path) -> list[tuple[str, ...]]:
    store = Store(folder, options())
    store.save(10, state(1), {})
    path = store.newest()
    assert path is not None
    told = []
    more = blank()
    more["model"] |= {f"b.{i}": torch.zeros(2) for i in range(10)}
    more["epoch"] = 1
    del more["optimizer"]["a.weight"]["moment"], more["rng"]["on"]
    told.append(problems(store.load, path, more))
    other = blank()
    other["model"]["a.weight"] = torch.zeros(8, 7)
    other["optimizer"]["a.weight"]["moment"] = torch.zeros(8, 6)
    told.append(problems(store.load, path, other))
    kinds = blank()
    kinds["step"] = torch.zeros(())
    told.append(problems(store.load, path, kinds))
    return told


def test_what_does_not_fit_is_named(ranks: RankPool, tmp_path: Path) -> None:
    first, second = ranks(2, misfit, tmp_path)
    assert first == second
    names, shapes, kinds = first
    path = tmp_path / "step_00000010"
    first_names = ", ".join(["epoch", *(f"model.b.{i}" for i in range(7))])
    assert names == (
        f"{path}: 11 entries missing in it: {first_names} and 3 more",
        f"{path}: 2 entries in it that this run has no place for: optimizer.a.weight.moment, rng.on",
    )
    assert shapes == (
        f"{path}: model.a.weight: expected float32 [8, 7], found float32 [8, 6]",
        f"{path}: optimizer.a.weight.moment: expected float32 [8, 6], found bfloat16 [8, 6]",
    )
    assert kinds == (
        f"{path}: 1 entry missing in it: step",
        f"{path}: 1 entry in it that this run has no place for: step",
    )


def differing(folder: Path) -> None:
    Store(folder, options()).save(1, {"position": dist.get_rank()}, {}, wait=True)


def test_values_that_differ_between_ranks_are_our_fault(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="position: 0 on one rank, 1 on another"):
        ranks(2, differing, tmp_path)
    assert not (tmp_path / "step_00000001").exists()


def foreign(folder: Path, path: Path) -> bool:
    store = Store(folder, options(initial=str(path)))
    assert store.origin() == path
    return equals(store.load(path, blank()), 2)


def test_a_checkpoint_from_elsewhere_needs_no_trust(ranks: RankPool, tmp_path: Path) -> None:
    other = tmp_path / "other" / "checkpoints"
    ranks(2, two_saves, other)
    assert ranks(2, foreign, tmp_path / "own" / "checkpoints", other / "step_00000020") == [True, True]


def linked(folder: Path) -> bool:
    store = Store(folder, options())
    newest = store.newest()
    assert newest is not None
    loaded = equals(store.load(newest, blank()), 2)
    store.save(30, state(3), {}, wait=True)
    return loaded and store.newest() == folder / "step_00000030"


@pytest.mark.parametrize("what", ["checkpoints", "checkpoints/step_00000020"])
def test_checkpoints_moved_to_another_disk_and_linked(ranks: RankPool, tmp_path: Path, what: str) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    ranks(2, two_saves, run / "checkpoints")
    (run / what).rename(disk)
    (run / what).symlink_to(disk)
    assert ranks(2, linked, run / "checkpoints") == [True, True]


class Faults:
    """The first `count` times, opening a file of a step folder fails so on rank 1."""

    def __init__(self, count: int, number: int) -> None:
        self.left, self.number, self.pauses = count, number, list[float]()

    def patience(self, seconds: float) -> Patience:
        clock = [0.0]

        def sleep(pause: float) -> None:
            self.pauses.append(pause)
            clock[0] += pause

        return Patience(seconds, sleep=sleep, clock=lambda: clock[0])

    @contextmanager
    def injected(self) -> Iterator[None]:
        whole = Path.open

        def sick(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            if self.left and dist.get_rank() == 1 and path.parent.name.startswith("step_"):
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number), str(path))
            return whole(path, mode, *more, **named)

        with patch.object(Path, "open", sick):
            yield


def passing_fault(folder: Path, number: int) -> dict[str, Any]:
    faults = Faults(2, number)
    store = Store(folder, options(), patience=faults.patience(300))
    with faults.injected():
        store.save(10, state(1), {})
        store.finish()
    saved = store.last
    assert saved is not None
    faults.left = 2
    tree = state(5)
    with faults.injected():
        store.load(saved.path, tree)
    dist.barrier()
    return {"sound": equals(tree, 1), "faults": saved.faults, "waited": saved.waited_seconds, "pauses": faults.pauses}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_faults_that_pass_in_a_save_and_a_load_are_waited_out_and_counted(
    ranks: RankPool, tmp_path: Path, number: int
) -> None:
    first, second = ranks(2, passing_fault, tmp_path, number)
    assert first == {"sound": True, "faults": 2, "waited": 3.0, "pauses": []}
    assert second == {"sound": True, "faults": 2, "waited": 3.0, "pauses": [1.0, 2.0, 1.0, 2.0]}


def failed_saves(folder: Path) -> dict[str, Any]:
    faults = Faults(3, errno.EIO)  # as many as fit into four seconds
    store = Store(folder, options(), patience=faults.patience(4))
    with faults.injected():
        store.save(10, state(1), {})
        store.busy()
    store.save(20, state(2), {})
    lost = str(store.lost)
    store.finish()
    there, healed = [path.name for path in files.complete(folder)], store.lost
    faults.left = 9
    with faults.injected():
        store.save(30, state(3), {})
        store.save(40, state(4), {})
        store.busy()
        stops = store.failed
        told = problems(store.save, 50, state(5), {})
    dist.barrier()
    return {"lost": lost, "there": there, "healed": healed, "stops": stops, "told": told}


def test_a_failed_save_is_tried_again_at_the_next_one_and_only_the_second_in_a_row_is_raised(
    ranks: RankPool, tmp_path: Path
) -> None:
    """`failed`, which stops training between two steps, is for what a person must mend."""
    first, second = ranks(2, failed_saves, tmp_path)
    assert first == second
    place = tmp_path / "step_00000010" / "__1_0.distcp"
    assert first["lost"] == f"{place}: input/output error, still after 3 s of trying again"
    assert (first["there"], first["healed"], first["stops"]) == (["step_00000020"], None, False)
    assert first["told"] == (f"{tmp_path / 'step_00000040' / '__1_0.distcp'}: input/output error, still after 3 s of "
                             "trying again",)  # fmt: skip


def hanging_save(folder: Path) -> tuple[list[bool], list[str]]:
    store, goes_on = Store(folder, options()), Event()
    write = CheckpointWriter.write_data

    def hangs(self: CheckpointWriter, *given: Any) -> Any:
        if dist.get_rank() == 1:
            goes_on.wait()
        return write(self, *given)

    with patch.object(CheckpointWriter, "write_data", hangs):
        idle = store.busy(0.0)
        store.save(10, state(1), {})
        busy = store.busy(0.01)
        goes_on.set()
        store.finish()
    return [idle, busy, store.busy(0.0)], [path.name for path in files.complete(folder)]


def test_a_save_that_hangs_is_seen_by_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks(2, hanging_save, tmp_path) == [([False, True, False], ["step_00000010"])] * 2


def opened(folder: Path) -> list[tuple[str, str]]:
    """What a save does below its folder: each file that is opened, with its mode, and each listing."""
    store, seen, on = Store(folder, options()), list[tuple[str, str]](), [True]

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if on[0] and event in ("open", "os.scandir", "os.listdir") and given and isinstance(given[0], str | Path):
            path = Path(given[0])
            if "step_00000010" in path.parts and path.parent != folder:
                seen.append((path.name, str(given[1])[0] if event == "open" else event))
            elif path.name == "step_00000010" and event != "open":
                seen.append((path.name, event))

    sys.addaudithook(hook)
    store.save(10, state(1), {}, wait=True)
    on[0] = False
    return seen


def test_a_save_writes_each_file_once_and_reads_none_of_it(ranks: RankPool, tmp_path: Path) -> None:
    """No listing of a folder that has a file of every rank, and no byte again for its checksum."""
    first, second = ranks(2, opened, tmp_path)
    assert second == [("__1_0.distcp", "w")]
    assert [each for each in first if not each[0].startswith((".COMPLETE", ".values"))] == [
        ("__0_0.distcp", "w"),
        (".metadata.tmp", "w"),
    ]
    marker = json.loads((tmp_path / "step_00000010" / "COMPLETE.json").read_text())
    assert sorted(marker["files"]) == [".metadata", "__0_0.distcp", "__1_0.distcp", "values.json"]
    for name, told in marker["files"].items():
        assert files.measure(tmp_path / "step_00000010" / name) == files.CheckpointFile(**told)
