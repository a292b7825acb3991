"""The second copy: whole or not there, kept like the first, never in its way, and the way home."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from src.checkpoint.config import Checkpoint
from src.checkpoint.folder import CheckpointFile, Marker, complete, measure, read_marker, step_folder, write_marker
from src.checkpoint.host_group import HostGroup
from src.checkpoint.mirror import Copied, Failure, Mirror, bring_back
from src.checkpoint.remote import HOME, RemoteCheckpoints, mirror_url
from src.checkpoint.store import Store
from src.config.base import PathField
from src.errors import CheckpointError
from src.storage.remote import RemoteFolder, below
from tests.checkpoint.options import options, problems
from tests.checkpoint.states import blank, equals, state
from tests.ranks import RankPool
from tests.storage.s3 import S3Server, known, served

PATIENCE_SECONDS = 60.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with served() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "tiny-0badcafe"
    (folder / HOME).mkdir(parents=True)
    (folder / "config.yaml").write_text("name: tiny\n")
    return folder


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    return s3.bucket(re.sub(r"\W|_", "-", request.node.name.lower())[-60:].strip("-"))


def saved(run: Path, step: int, text: str = "", loss: float | None = None) -> Path:
    """A complete step folder of two files."""
    path = step_folder(run / HOME, step)
    path.mkdir()
    (path / "__0_0.distcp").write_text(f"shard of {step} {text}" * 100)
    (path / "values.json").write_text("{}")
    files = {name: measure(path / name) for name in ("__0_0.distcp", "values.json")}
    write_marker(path, Marker(step, "2.13", {} if loss is None else {"validation_loss": loss}, files))
    return path


def there(run: Path, mirror: str) -> RemoteCheckpoints:
    """What somebody else sees."""
    return RemoteCheckpoints(RemoteFolder(below(mirror_url(mirror, run), HOME)), tries=1)


def whole(run: Path, mirror: str) -> list[int]:
    found = there(run, mirror)
    return [step for step in found.steps() if found.marker(step) is not None]


def copied(run: Path, chosen: Checkpoint, **more: Any) -> list[Copied | Failure]:
    """One mirror's life, until all is there."""
    mirror = Mirror(run, chosen, tries=1, first_wait_seconds=0.01, **more)
    mirror.wake()
    assert mirror.finish(PATIENCE_SECONDS)
    assert mirror.holds() == []
    mirror.close()
    return mirror.news()


def test_a_copy_is_what_was_saved_and_its_marker_goes_last(run: Path, bucket: str, s3: S3Server) -> None:
    path = saved(run, 10)
    s3.requests.clear()
    (news,) = copied(run, options(mirror=bucket))
    assert isinstance(news, Copied)
    assert (news.step, news.bytes, news.failures) == (10, read_marker(path).bytes, 0)
    puts = [each.rpartition("/")[2] for each in s3.requests if each.startswith("PUT")]
    assert sorted(puts[:-1]) == ["__0_0.distcp", "config.yaml", "values.json"]
    assert puts[-1] == "COMPLETE.json"
    assert there(run, bucket).marker(10) == read_marker(path)
    assert copied(run, options(mirror=bucket)) == []  # another life finds it there
    shutil.rmtree(path)
    newer = saved(run, 10, "of another layout")
    assert [type(each) for each in copied(run, options(mirror=bucket))] == [Copied]
    assert there(run, bucket).marker(10) == read_marker(newer)


def test_it_keeps_what_a_run_keeps(run: Path, bucket: str) -> None:
    chosen = options(mirror=bucket, every=10, keep=2, keep_every=40, keep_best=1)
    for step in range(10, 110, 10):
        path = saved(run, step, loss=abs(step - 53.0))
        copied(run, chosen)
        if step not in (50, 100):
            shutil.rmtree(path)  # what is gone here stays there as long as the rule says
    assert whole(run, bucket) == [40, 50, 80, 90, 100]


def test_faults_are_got_over_and_counted(run: Path, bucket: str, s3: S3Server) -> None:
    saved(run, 10)
    s3.faulty, s3.busy = "PUT .*distcp", 2
    news = copied(run, options(mirror=bucket))
    s3.faulty = "PUT .*"
    assert [type(each) for each in news] == [Failure, Failure, Copied]
    assert [each.failures for each in news] == [1, 2, 2]
    assert "ServiceUnavailable" in news[0].words or "busy" in news[0].words
    assert news[1].again_seconds == pytest.approx(2 * news[0].again_seconds)
    assert whole(run, bucket) == [10]


@pytest.mark.parametrize("file", ["distcp", "COMPLETE.json"])
def test_a_cut_upload_is_no_checkpoint(run: Path, bucket: str, s3: S3Server, file: str) -> None:
    saved(run, 10)
    copied(run, options(mirror=bucket))
    saved(run, 20)
    s3.faulty, s3.cut = f"PUT .*step_00000020/.*{file}", 10**6
    mirror = Mirror(run, options(mirror=bucket), tries=1, first_wait_seconds=0.01)
    mirror.wake()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while mirror.failing_seconds == 0 and time.monotonic() < deadline:
        assert not mirror.finish(0.05)
    assert whole(run, bucket) == [10]
    newest = there(run, bucket).newest()
    assert newest is not None
    assert newest.step == 10
    s3.faulty, s3.cut = "PUT .*", 0
    assert mirror.finish(PATIENCE_SECONDS)
    mirror.close()
    assert whole(run, bucket) == [10, 20]
    assert mirror.failing_seconds == 0


def test_a_torn_marker_or_a_short_file_is_no_checkpoint(run: Path, tmp_path: Path) -> None:
    """On a store that has half a file under its name, as an object store never does."""
    mirror = f"file://{tmp_path}/mirror"
    for step in (10, 20, 30):
        saved(run, step)
    copied(run, options(mirror=mirror))
    home = tmp_path / "mirror" / run.name / HOME
    marker = home / "step_00000030" / "COMPLETE.json"
    marker.write_bytes(marker.read_bytes()[:-20])
    shard = home / "step_00000020" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert whole(run, mirror) == [10]
    assert [each.step for each in copied(run, options(mirror=mirror))] == [30, 20]
    assert whole(run, mirror) == [10, 20, 30]


def test_a_checkpoint_that_is_being_copied_stays(ranks: RankPool, run: Path) -> None:
    assert ranks(1, save_while_copying, run) == [(["step_00000001", "step_00000003", "step_00000004"], [4, 3])]


def save_while_copying(run: Path) -> tuple[list[str], list[int]]:
    chosen = options(every=1, keep=2, mirror="memory://held")
    mirror, gate = Mirror(run, chosen), threading.Event()
    began, send = threading.Event(), mirror._remote.send

    def send_late(path: Path) -> int:
        began.set()
        assert gate.wait(PATIENCE_SECONDS)
        return send(path)

    mirror._remote.send = send_late  # type: ignore[method-assign]
    store = Store(run / HOME, chosen, mirror=mirror)
    store.save(1, state(1), {}, wait=True)
    assert began.wait(PATIENCE_SECONDS)
    for step in (2, 3, 4):
        store.save(step, state(step), {}, wait=True)
    left = sorted(path.name for path in complete(run / HOME))
    gate.set()
    assert mirror.finish(PATIENCE_SECONDS)
    mirror.close()
    steps = [each.step for each in mirror.news() if isinstance(each, Copied)]
    return left, steps[1:]


# The way home ------------------------------------------------------------------------------------------------


def save_two(run: Path, mirror: str, environment: dict[str, str]) -> None:
    chosen = options(mirror=mirror)
    with known(environment):
        copier = Mirror(run, chosen) if int(os.environ["RANK"]) == 0 else None
        store = Store(run / HOME, chosen, mirror=copier)
        for step in (10, 20):
            store.save(step, state(step), {}, wait=True)
        if copier is not None:
            assert copier.finish(PATIENCE_SECONDS)
            copier.close()
        store.shared(lambda: None)


def come_back(run: Path, mirror: str, environment: dict[str, str]) -> tuple[str | None, list[str], bool]:
    with known(environment):
        line = bring_back(run, options(mirror=mirror), HostGroup())
    store = Store(run / HOME, options())
    path = store.newest()
    tree = None if path is None else store.load(path, blank())
    return line, [each.name for each in complete(run / HOME)], tree is not None and equals(tree, 20)


def test_the_newest_whole_one_of_both_is_taken(ranks: RankPool, run: Path, bucket: str, s3: S3Server) -> None:
    ranks(2, save_two, run, bucket, s3.environment)
    first, second = complete(run / HOME)
    marker = read_marker(second)
    shutil.rmtree(second)
    (line, names, right), (_, _, right_too) = ranks(2, come_back, run, bucket, s3.environment)
    assert line is not None
    assert line.startswith(f"step_00000020 is back from {bucket}/{run.name}: {marker.bytes:,} bytes in ")
    assert (names, right, right_too) == ([first.name, second.name], True, True)
    assert read_marker(second) == marker
    assert sorted(path.name for path in (run / HOME).iterdir()) == names  # no draft is left
    # As new here as there: nothing moves. A whole run folder that is gone comes back too.
    assert ranks(2, come_back, run, bucket, s3.environment)[0] == (None, names, True)
    shutil.rmtree(run)
    assert ranks(2, come_back, run, bucket, s3.environment)[0][1:] == ([second.name], True)


def test_what_was_set_aside_does_not_come_back(ranks: RankPool, run: Path, tmp_path: Path) -> None:
    mirror = f"file://{tmp_path}/mirror"
    ranks(1, save_two, run, mirror, {})
    newest = complete(run / HOME)[-1]
    newest.rename(newest.with_name(f"{newest.name}.set_aside"))
    assert ranks(1, come_back, run, mirror, {}) == [(None, ["step_00000010"], False)]


def test_a_rotten_copy_is_refused(ranks: RankPool, run: Path, tmp_path: Path) -> None:
    mirror = f"file://{tmp_path}/mirror"
    ranks(1, save_two, run, mirror, {})
    file = tmp_path / "mirror" / run.name / HOME / "step_00000020" / "values.json"
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    shutil.rmtree(run)
    (said,) = ranks(1, refused, run, mirror)
    assert said[0].startswith(f"fetched from {mirror}/{run.name}/checkpoints/step_00000020: ")
    assert "values.json: corrupted, crc32" in said[0]
    assert complete(run / HOME) == []


def refused(run: Path, mirror: str) -> tuple[str, ...]:
    return problems(bring_back, run, options(mirror=mirror), HostGroup(), tries=1)


def test_a_mirror_that_does_not_answer(ranks: RankPool, run: Path) -> None:
    nobody = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    told, line = ranks(1, ask_nobody, run, nobody | {"AWS_MAX_ATTEMPTS": "1"})[0]
    assert told[-1] == "nothing is saved here, and the mirror may hold more"
    assert told[0].startswith(f"checkpoint.mirror=s3://away/{run.name}/checkpoints: ")
    assert line is not None
    assert line.endswith("goes on with step_00000010, which is here")


def ask_nobody(run: Path, environment: dict[str, str]) -> tuple[tuple[str, ...], str | None]:
    with known(environment):
        told = refused(run, "s3://away")
        saved(run, 10)
        return told, bring_back(run, options(mirror="s3://away"), HostGroup(), tries=1)


# The key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mirror": "bucket/runs"}, "is no URL of a folder; such as s3://bucket/runs"),
        ({"mirror": "s3:///"}, "is no URL of a folder"),
        ({"mirror": "https://me:secret@host/x"}, "https://... holds a password"),
        ({"mirror": "s3://a/*"}, "holds one of"),
        ({"mirror": "s3://a", "every": None}, "mirror=s3://a copies nothing while every=null"),
    ],
)
def test_mistakes(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")) as error:
        options(**changes)
    assert "secret" not in str(error.value).partition("input_value")[0]


def test_a_url_is_no_path_here() -> None:
    """Of which a Path would make the folder s3: in the working directory, without a word."""
    path = TypeAdapter(PathField)
    assert path.validate_python("runs/x") == Path("runs/x")
    with pytest.raises(ValueError, match=r"'s3://b/x' is a URL, where a path of this machine belongs"):
        path.validate_python("s3://b/x")


def test_a_marker_that_is_cut_is_told(run: Path) -> None:
    path = saved(run, 10)
    (path / "COMPLETE.json").write_text(json.dumps({"step": 10, "files": {}}))
    with pytest.raises(CheckpointError, match="corrupted"):
        read_marker(path)
    assert CheckpointFile(1, "0").bytes == 1
