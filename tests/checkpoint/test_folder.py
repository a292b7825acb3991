"""Checkpoints as files."""

import random
import zlib
from pathlib import Path

from src.checkpoint import folder
from src.checkpoint.folder import CheckpointFile, Marker
from tests.checkpoint.options import problems


def put(checkpoints: Path, step: int, content: str = "x") -> Path:
    path = folder.step_folder(checkpoints, step)
    path.mkdir(parents=True)
    (path / "data").write_text(content)
    folder.write_marker(path, Marker(step, "2", {}, {"data": folder.measure(path / "data")}))
    return path


def test_only_whole_names_with_a_marker_count(tmp_path: Path) -> None:
    steps = [3, 20, 100_000_000, 7]
    for step in steps:
        put(tmp_path, step)
    (tmp_path / "step_00000030").mkdir()
    put(tmp_path, 40).rename(tmp_path / "step_00000040.bad")
    put(tmp_path, 50).rename(tmp_path / "old_step_00000050")
    assert [folder.step_of(path) for path in folder.complete(tmp_path)] == sorted(steps)
    assert folder.complete(tmp_path / "nowhere") == []


def test_clean_removes_half_written_ones_only(tmp_path: Path) -> None:
    whole, half = put(tmp_path, 10), put(tmp_path, 20)
    (half / folder.MARKER).unlink()
    bad = put(tmp_path, 30).rename(tmp_path / "step_00000030.bad")
    (bad / folder.MARKER).unlink()
    folder.clean(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, bad]


def test_clean_takes_back_what_a_broken_replacement_set_aside(tmp_path: Path) -> None:
    old = put(tmp_path, 10, "old")
    old.rename(tmp_path / "step_00000010.replaced")
    old.mkdir()
    (old / "data").write_text("half")
    folder.clean(tmp_path)
    assert (old / "data").read_text() == "old"
    assert folder.complete(tmp_path) == [old]

    old.rename(tmp_path / "step_00000010.replaced")
    new = put(tmp_path, 10, "new")
    folder.clean(tmp_path)
    assert list(tmp_path.iterdir()) == [new]
    assert (new / "data").read_text() == "new"


def test_expendable_is_what_no_rule_keeps() -> None:
    generator = random.Random(0)
    for _ in range(50):
        steps = sorted(generator.sample(range(0, 200, 5), generator.randint(0, 15)))
        keep = generator.choice([2, 3, 5, None])
        keep_every = generator.choice([None, 20, 50])
        loaded = generator.choice(steps) if steps else None
        kept = set(steps if keep is None else steps[max(0, len(steps) - keep) :])
        kept |= {step for step in steps if keep_every and step % keep_every == 0}
        kept |= {step for step in steps if step == loaded}
        found = [folder.step_folder(Path("c"), step) for step in steps]
        protected = [folder.step_folder(Path("c"), loaded)] if loaded is not None else []
        gone = folder.expendable(found, keep, keep_every, protected=protected)
        assert {folder.step_of(path) for path in gone} == set(steps) - kept


def test_the_best_are_those_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    losses = {10: 3.0, 20: None, 30: 2.0, 40: 2.5, 50: 2.0}
    for step, loss in losses.items():
        path = folder.step_folder(tmp_path, step)
        path.mkdir()
        facts = {"tokens": step} | ({} if loss is None else {"validation_loss": loss})
        folder.write_marker(path, Marker(step, "2.13.0", facts, {}))
    found = folder.complete(tmp_path)
    assert [folder.step_of(path) for path in folder.best(found, 3)] == [30, 50, 40]
    assert folder.best(found, None) == []
    (folder.step_folder(tmp_path, 30) / folder.MARKER).write_text("{")  # one that cannot be read stops nothing
    assert [folder.step_of(path) for path in folder.best(found, 1)] == [50]


def test_measure_equals_zlib_over_several_blocks(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(folder.BLOCK_BYTES * 2 + 12345)
    (tmp_path / "file").write_bytes(content)
    assert folder.measure(tmp_path / "file") == CheckpointFile(len(content), f"{zlib.crc32(content):08x}")
    (tmp_path / "empty").touch()
    assert folder.measure(tmp_path / "empty") == CheckpointFile(0, "00000000")


def test_marker_round_trip_and_damage(tmp_path: Path) -> None:
    marker = Marker(7, "2.13.0", {"name": "a", "tokens": 2**60}, {"b": CheckpointFile(3, "00ff00ff")})
    folder.write_marker(tmp_path, marker)
    assert folder.read_marker(tmp_path) == marker
    assert [path.name for path in tmp_path.iterdir()] == [folder.MARKER]
    for text in ("", "{}", "[1]", '{"files": {"b": {}}, "step": 1}', (tmp_path / folder.MARKER).read_text()[:-20]):
        (tmp_path / folder.MARKER).write_text(text)
        assert problems(folder.read_marker, tmp_path)[0].startswith(f"{tmp_path / folder.MARKER}: corrupted")
    (tmp_path / folder.MARKER).unlink()
    assert "COMPLETE.json is missing" in problems(folder.read_marker, tmp_path)[0]


def test_fault_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"abcd")
    expected = folder.measure(path)
    assert folder.fault(path, expected, "full") is None
    path.write_bytes(b"abce")
    assert folder.fault(path, expected, "size") is None
    assert "corrupted, crc32" in str(folder.fault(path, expected, "full"))
    path.write_bytes(b"abc")
    assert f"{path}: truncated or overwritten, 3 bytes where 4 were written" == folder.fault(path, expected, "size")
    path.unlink()
    assert folder.fault(path, expected, "size") == f"{path}: missing"


def test_two_writers_of_one_step_do_not_touch_each_other(tmp_path: Path) -> None:
    """Replica groups that lost sight of each other, both told to stop."""
    path = folder.step_folder(tmp_path, 30)
    first, second = (folder.draft(path, f"group_{number}") for number in range(2))
    for place in (first, second):
        place.mkdir()
        (place / "data").write_text(place.name)
    folder.clean(tmp_path, "group_1")
    assert first.exists(), "another writer's draft stays"
    assert not second.exists()
    second.mkdir()
    (second / "data").write_text(second.name)
    assert folder.complete(tmp_path) == []
    for place in (second, first):
        folder.write_marker(place, folder.Marker(30, "2", {}, {}))
        assert folder.step_of(place) is None, "it does not count before it has the step's name"
        folder.publish(place, path)
    assert folder.complete(tmp_path) == [path]
    assert (path / "data").read_text() == second.name, "the first that was complete stands"
    assert not first.exists()


def test_what_was_half_written_gives_way_to_a_complete_draft(tmp_path: Path) -> None:
    path = folder.step_folder(tmp_path, 30)
    path.mkdir()
    (path / "data").write_text("half")
    place = folder.draft(path, "group_0")
    place.mkdir()
    folder.write_marker(place, folder.Marker(30, "2", {}, {}))
    folder.publish(place, path)
    assert folder.complete(tmp_path) == [path]
    assert not (path / "data").exists()
