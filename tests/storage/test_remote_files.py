"""Files that URLs name come here once, whole, and follow what is there."""

from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest

from src.errors import RemoteError
from src.storage import remote
from src.storage.remote_files import FilesAt, copy_of, fetch, files_at, missing
from tests.storage.s3 import S3Server, files, served

NAMES = ("a.bin", "b.bin", "notes.txt", "deep/c.bin", "deep/.hidden/d.bin", "deep/er/e.bin")
CONTENT = b"tokens" * 1000


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with served() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """None of these tests waits for a second try."""
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.0)
    return tmp_path / "cache"


def at(url: str, *companions: str) -> FilesAt:
    return FilesAt("data.files", url, (".bin",), companions)


def fetched(wanted: FilesAt, cache: Path) -> list[str]:
    said: list[str] = []
    fetch(wanted, files_at(wanted), cache, said.extend)
    return said


def filled(url: str) -> str:
    scheme, _, path = url.partition("://")
    for name in NAMES:
        files(scheme).makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        files(scheme).pipe_file(f"{path}/{name}", CONTENT)
    return url


@pytest.mark.parametrize("scheme", ["s3", "memory", "file"])
def test_a_url_names_what_a_path_would(scheme: str, s3: S3Server, tmp_path: Path) -> None:
    """Globs are held against Python's own, on a folder with the same files."""
    root = {"s3": s3.bucket, "memory": lambda name: f"memory://{name}", "file": lambda _: f"file://{tmp_path}/there"}
    url, local = filled(f"{root[scheme]('named')}/x"), tmp_path / "local"
    filled(f"file://{local}")

    def names(wanted: FilesAt) -> list[str]:
        return [each.url.removeprefix(f"{url}/") for each in files_at(wanted)]

    for pattern in ("*.bin", "[ab].*", "**/*.bin", "deep/**", "*/?.bin", "d*p/*/*", "a.bin"):
        here = sorted(
            str(each.relative_to(local))
            for each in map(Path, glob(f"{local}/{pattern}", recursive=True))
            if each.is_file()
        )
        assert names(at(f"{url}/{pattern}")) == here, pattern
    assert names(at(f"{url}/")) == sorted(each for each in NAMES if each.endswith(".bin"))
    assert names(at(f"{url}/a.*", f"{url}/notes.txt", f"{url}/nothing.idx")) == ["a.bin", "notes.txt"]


def test_each_file_comes_once_and_follows_what_is_there(s3: S3Server, cache: Path) -> None:
    url = filled(s3.bucket("once"))
    s3.faulty, s3.busy = "GET .*a.bin", 1
    (said,) = fetched(at(f"{url}/*.bin"), cache)
    assert (s3.busy, said.partition(", into ")[0]) == (0, f"data.files={url}/*.bin: fetches 2 of 2 files, 12,000 bytes")
    copy = Path(copy_of(f"{url}/a.bin", cache))
    assert copy.read_bytes() == CONTENT
    s3.requests.clear()
    assert fetched(at(f"{url}/*.bin"), cache) == fetched(at(f"{url}/a.bin"), cache) == []
    assert not any(each.startswith("GET") and each.endswith(".bin") for each in s3.requests)
    assert [each.url for each in missing(files_at(at(url)), cache)] == sorted(f"{url}/{each}" for each in NAMES[3:])
    files("s3").pipe_file("once/a.bin", CONTENT[::-1])  # of the same size
    files("s3").rm("once/b.bin")
    (said,) = fetched(at(f"{url}/*.bin"), cache)
    assert "fetches 1 of 1 files, 6,000 bytes" in said
    assert sorted(each.name for each in copy.parent.iterdir()) == ["a.bin"]
    assert copy.read_bytes() == CONTENT[::-1]
    copy.write_bytes(CONTENT)  # by somebody's hand
    assert len(fetched(at(url), cache)) == 1
    assert copy.read_bytes() == CONTENT[::-1]


def test_what_arrives_short_is_no_copy(s3: S3Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = filled(s3.bucket("short"))
    monkeypatch.setattr(remote.RemoteFolder, "fetch", lambda _self, _name, local: local.write_bytes(CONTENT[:7]))
    with pytest.raises(RemoteError, match=r"data\.files: s3://short/a\.bin: 7 bytes arrived where 6,000 are there"):
        fetched(at(f"{url}/a.bin"), cache)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


def test_what_is_not_there_is_told(s3: S3Server, cache: Path) -> None:
    url = filled(s3.bucket("wrong"))
    for wanted in (f"{url}/*.npy", f"{url}/nothing", f"{url}/none/*"):
        with pytest.raises(
            RemoteError, match=rf"data\.files={url}/.*: matches no file there; of a folder those with \.bin"
        ):
            files_at(at(wanted))
    with pytest.raises(RemoteError, match=r"data\.files=s3://nobodys/x: there is no bucket nobodys"):
        files_at(at("s3://nobodys/x/*.bin"))
    with pytest.raises(RemoteError, match=r"data\.files=s4://x: fsspec knows no s4://"):
        files_at(at("s4://x/*.bin"))
    s3.faulty, s3.busy = "GET .*", 1000
    with pytest.raises(RemoteError, match="busy"):  # and no empty folder
        files_at(at(f"{url}/**/*.bin"))
    s3.busy = 0
    files("s3").pipe_file("wrong/y/../z.bin", b"")
    with pytest.raises(RemoteError, match=r"has an empty part, \. or \.\. in its name; rename it there"):
        files_at(at(f"{url}/y"))


def test_brackets_in_the_cache_are_letters(tmp_path: Path) -> None:
    assert copy_of("s3://b/x/*.bin", tmp_path / "a[1]").startswith(f"{tmp_path}/a[[]1]/remote/")
    assert copy_of("s3://b/x/y.bin", tmp_path / "a[1]").startswith(f"{tmp_path}/a[1]/remote/")
