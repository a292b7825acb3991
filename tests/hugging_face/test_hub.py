"""Ids of the hub: downloaded from a server on this machine, pinned, taken up again, found in the cache, refused."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.hugging_face.hub import Fetched, fetch
from src.hugging_face.load import note, pinned
from tests.checkpoint.options import problems
from tests.end_to_end.commands import command
from tests.hugging_face.foreign import saved
from tests.hugging_face.hub_server import Hub, serving

HOME = Path(__file__).parents[2]
FIRST, SECOND = "a" * 40, "b" * 40
SCRIPT = """
import sys
from src.errors import UserError
from src.hugging_face.hub import fetch
try:
    print(fetch(sys.argv[1], weights=True).folder)
except UserError as error:
    sys.exit(error.problems[0])
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    saved("llama-bytes", folder)
    return folder


@pytest.fixture
def hub(files: Path) -> Iterator[Hub]:
    revisions = dict.fromkeys(("main", "v1", FIRST), (FIRST, files))
    with serving(Hub("me/tiny", revisions)) as served:
        yield served


def environment(hub: Hub | None, home: Path, **more: str) -> dict[str, str]:
    """huggingface_hub reads these when it is imported, so each look is a process of its own."""
    where = {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
    return {**where, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def look(source: str, hub: Hub | None, home: Path, **more: str) -> tuple[int, str]:
    """Exit code, and the folder or what was wrong."""
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, source],
        cwd=HOME,
        env=os.environ | environment(hub, home, **more),
        capture_output=True,
        text=True,
        check=False,
    )
    said = process.stdout if process.returncode == 0 else process.stderr
    return process.returncode, said.strip().splitlines()[-1]


def test_a_run_starts_from_an_id_and_writes_down_its_revision(hub: Hub, files: Path, tmp_path: Path) -> None:
    argv = (
        "model=auto",
        "tokenizer=bytes",
        "checkpoint.initial=hf:me/tiny@v1",
        f"root={tmp_path / 'runs'}",
        "cluster.gpus=0",
    )
    data = ("data=synthetic", "data.documents=200", "data.processes=1", "task.seq_len=32", "task.steps=1")
    code, told = command(*argv, *data, "task.validate_every=0", "name=hub", **environment(hub, tmp_path / "home"))
    assert code == 0, told
    assert "starts at step 0 with the weights of " in told
    (folder,) = (tmp_path / "runs").glob("hub-*")
    facts = json.loads((folder / "initial.json").read_text())
    assert (facts["source"], facts["revision"]) == ("me/tiny@v1", FIRST)
    assert (Path(facts["folder"]) / "model.safetensors.index.json").is_file()


def test_only_what_is_needed_is_downloaded_and_then_found_offline(hub: Hub, files: Path, tmp_path: Path) -> None:
    (files / "consolidated.safetensors").write_bytes(b"another form of the same weights")
    try:
        code, folder = look("me/tiny", hub, tmp_path)
    finally:
        (files / "consolidated.safetensors").unlink()
    assert code == 0, folder
    assert Path(folder).name == FIRST
    assert not any("consolidated" in each for each in hub.asked)
    for path in files.glob("*.safetensors"):
        assert (Path(folder) / path.name).read_bytes() == path.read_bytes()
    assert look("me/tiny", None, tmp_path) == (0, folder)
    code, told = look("me/other", None, tmp_path)
    assert code == 1
    offline = "the hub cannot be reached, or HF_HUB_OFFLINE=1, and its cache has no such snapshot"
    assert told == f"hf:me/other: no folder here; {offline}"


def test_a_broken_download_goes_on_with_the_files_that_miss(hub: Hub, files: Path, tmp_path: Path) -> None:
    """The connection breaks within each of the larger files; what came whole is not asked for again."""
    hub.broken_after = 60_000
    code, told = look("me/tiny", hub, tmp_path)
    assert (code, "cannot be downloaded" in told) == (1, True), told
    hub.broken_after = None
    code, folder = look("me/tiny", hub, tmp_path)
    assert code == 0, folder
    for path in files.iterdir():
        asked = sum(each.startswith("GET") and each.split()[1].endswith(f"/{path.name}") for each in hub.asked)
        assert (asked == 1) == (path.stat().st_size < 60_000), (path.name, asked)


def test_what_the_hub_refuses_is_told(hub: Hub, files: Path, tmp_path: Path) -> None:
    none = "no folder here, and no such repository of the hub, or a private one; then set HF_TOKEN"
    assert look("me/none", hub, tmp_path)[1] == f"hf:me/none: {none}"
    assert look("me/tiny@v9", hub, tmp_path)[1] == "hf:me/tiny@v9: has no revision v9"
    hub.token = "secret"
    assert "then set HF_TOKEN" in look("me/tiny", hub, tmp_path)[1]
    assert look("me/tiny", hub, tmp_path, HF_TOKEN="secret")[0] == 0


def test_a_repository_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "files" / name).write_text("{}")
    revisions = dict.fromkeys(("main", FIRST), (FIRST, tmp_path / "files"))
    with serving(Hub("me/tiny", revisions)) as hub:
        _, told = look("me/tiny", hub, tmp_path / "home")
    assert told.startswith("hf:me/tiny: has no model.safetensors. It has pytorch_model.bin; weights from elsewhere are")
    assert not any("pytorch_model.bin" in each for each in hub.asked)


def test_a_cache_that_another_machine_filled(files: Path, tmp_path: Path) -> None:
    """The layout of a hub cache: refs name commits, snapshots hold files."""
    repository = tmp_path / "hub/models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(SECOND)
    (repository / "snapshots" / SECOND).mkdir(parents=True)
    for path in files.iterdir():
        (repository / "snapshots" / SECOND / path.name).write_bytes(path.read_bytes())
    assert look("me/tiny", None, tmp_path) == (0, str(repository / "snapshots" / SECOND))


def test_a_later_start_keeps_the_revision_of_the_first(tmp_path: Path) -> None:
    assert pinned(tmp_path, "me/tiny@main") == "me/tiny@main"
    note(tmp_path, Fetched("me/tiny@main", "/somewhere", FIRST))
    assert pinned(tmp_path, "me/tiny@main") == f"me/tiny@{FIRST}"
    assert pinned(tmp_path, "me/other") == "me/other"
    note(tmp_path, Fetched("/folder", "/folder", None))
    assert pinned(tmp_path, "/folder") == "/folder"


@pytest.mark.parametrize("source", ["a/b/c", "nothing there", "me/", "https://some.where/me/tiny"])
def test_what_is_neither_folder_nor_id_is_refused(source: str) -> None:
    assert problems(lambda: fetch(source, weights=False))[0].startswith(f"hf:{source}: neither a folder nor <owner>")
