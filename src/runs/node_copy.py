"""A machine's own copy of a run's frozen code and its bytecode, made once a machine out of one file of the run folder.

`python -I -S <snapshot>/src/runs/node_copy.py <snapshot> <start> ...` goes on as `python ...`, importing that copy: how
each rank of a job begins. Of the disk that all machines share, it reads this file, and one of its ranks the archive;
all else is on the machine's own disk (TMPDIR). It imports the standard library alone: nothing else can be found yet.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import source_hash
from pathlib import Path
from typing import NoReturn

ARCHIVE = "ARCHIVE"  # of a snapshot: its code and bytecode in one file; no suffix that Python would import
CACHE = "__pycache__"
KEPT_SECONDS = 7 * 86_400.0  # a copy that nobody has used for so long goes when another one is made
USER_ERROR = 2  # src.errors.UserError.exit_code, which cannot be imported here


class DamagedCodeError(Exception):
    """In words: what is wrong with an archive."""


def digest(contents: Mapping[str, bytes]) -> str:
    """8 hex digits over names and contents."""
    whole = hashlib.sha256()
    for name in sorted(contents):
        whole.update(f"{name}\0{len(contents[name])}\0".encode())
        whole.update(contents[name])
    return whole.hexdigest()[:8]


def packed(files: Mapping[str, bytes]) -> bytes:
    """Names and contents, compressed, behind a line with their checksum; the same bytes for the same files."""
    index = json.dumps([(name, len(content)) for name, content in files.items()]).encode()
    # A third of the size in 0.06 s; zipfile takes 0.15 for the 1,065 files of this code, the best compression 0.4.
    body = zlib.compress(b"\n".join((index, b"".join(files.values()))), 1)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def is_whole(archive: bytes) -> bool:
    """Whether its checksum is that of the rest."""
    checksum, _, body = archive.partition(b"\n")
    return hashlib.sha256(body).hexdigest().encode() == checksum


def unpacked(archive: bytes) -> dict[str, bytes]:
    """What `packed` was given. DamagedCodeError where the checksum says otherwise, or another version packed it."""
    if not is_whole(archive):
        raise DamagedCodeError("is damaged")
    body = archive.partition(b"\n")[2]
    files, at = dict[str, bytes](), 0
    try:
        index, _, contents = zlib.decompress(body).partition(b"\n")
        for name, size in json.loads(index):
            files[name], at = contents[at : at + size], at + size
    except (zlib.error, ValueError, TypeError) as error:
        raise DamagedCodeError(f"has another form ({error})") from error
    return files


def home() -> Path:
    """A folder of this user alone on this machine's own disk. OSError where there can be none."""
    path = Path(tempfile.gettempdir()) / f"frozen-code.{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path}: is not a folder that this user alone may write")
    return path


def place(snapshot: Path) -> Path:
    """Where this machine's copy is or will be; its last name is the snapshot's, which is the code's digest."""
    return home() / (sys.implementation.cache_tag or "source") / snapshot.name


def on_node(snapshot: Path, start: str = "") -> Path:
    """This machine's copy of a snapshot, whole and checked; kept from others' cleaning while this process, or what it
    becomes, lives. With `start`, a name of this start of a job, the first process that asks checks for all that give
    the same one.

    OSError where this machine has no room for it, DamagedCodeError where the archive is not what the snapshot's name
    says.
    """
    copy = place(snapshot)
    with one_by_one(copy, start) as first:
        with suppress(FileNotFoundError):
            hold(copy)  # before it is looked at: an old one may be about to go
        if first or not copy.is_dir():
            files = _checked((snapshot / ARCHIVE).read_bytes(), snapshot.name)
            if not _is_exactly(copy, files):
                make(copy, files)
                hold(copy)
    return copy


@contextmanager
def one_by_one(folder: Path, start: str) -> Iterator[bool]:
    """The processes of this machine that ask for `folder`: whether this is the first one of `start`, or of those that
    have failed since; each one of no start is.
    """
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        first = not start or lock.read() != start.encode()
        yield first
        if first:
            lock.truncate(0)
            lock.write(start.encode())


def _checked(archive: bytes, name: str) -> dict[str, bytes]:
    files = unpacked(archive)
    code = {each: content for each, content in files.items() if CACHE not in each.split("/")}
    if (found := digest(code)) != name:
        raise DamagedCodeError(f"holds other code (hash {found})")
    tag = sys.implementation.cache_tag or ""
    ours = {bytecode_name(each, tag): content for each, content in code.items() if each.endswith(".py")}
    for each in files.keys() - code.keys():
        # Of another Python, which hashes with another key, only the name can be judged.
        foreign = bytecode_name(_module_of(each), tag) in ours and not each.endswith(f".{tag}.pyc")
        if not foreign and (each not in ours or files[each][8:16] != source_hash(ours[each])):
            raise DamagedCodeError(f"holds {each}, which is no bytecode of its code")
    return files


def bytecode_name(module: str, tag: str) -> str:
    """src/a.py -> src/__pycache__/a.cpython-312.pyc"""
    folder, file = os.path.split(module)
    return os.path.join(folder, CACHE, f"{file.removesuffix('.py')}.{tag}.pyc")


def _module_of(bytecode: str) -> str:
    folder, file = os.path.split(bytecode)
    return os.path.join(os.path.dirname(folder), f"{file.partition('.')[0]}.py")


def _is_exactly(copy: Path, files: Mapping[str, bytes]) -> bool:
    """Without a Path of each, which took half of the time."""
    there = set[str]()
    for folder, folders, names in os.walk(copy):
        inside = os.path.relpath(folder, copy)
        found = {os.path.normpath(os.path.join(inside, name)) for name in names}
        if not found <= files.keys() or any(os.path.islink(os.path.join(folder, each)) for each in (*folders, *names)):
            return False
        there |= found
    return there == files.keys() and all(_content(f"{copy}/{name}") == files[name] for name in there)


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def make(copy: Path, files: Mapping[str, bytes]) -> None:
    """Under the lock: who reads a folder that is replaced finds the new one the moment after."""
    _clean(copy.parent)
    draft = Path(tempfile.mkdtemp(prefix=f"{copy.name}.", suffix=".partial", dir=copy.parent))
    try:
        write_files(draft, files)
        if copy.exists():
            copy.rename(Path(f"{draft}.old"))
        draft.rename(copy)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(Path(f"{draft}.old"), ignore_errors=True)


def write_files(into: Path, files: Mapping[str, bytes]) -> None:
    """All files below a folder; without a Path of each, which took two thirds of the time: a sweep of 50 points writes
    23,000.
    """
    for parent in sorted({os.path.dirname(name) for name in files} | {""}):
        os.makedirs(os.path.join(into, parent), exist_ok=True)
    for name, content in files.items():
        with open(f"{into}/{name}", "xb") as file:
            file.write(content)


def _clean(folder: Path) -> None:
    """Remove copies that have not been used lately and that nobody holds."""
    for each in folder.iterdir():
        with suppress(OSError):
            if each.is_dir() and time.time() - each.stat().st_mtime > KEPT_SECONDS:
                handle = os.open(each, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(each)
                finally:
                    os.close(handle)


def hold(folder: Path) -> None:
    """For the life of this process and of what it becomes; systemd-tmpfiles leaves alone what is locked, too."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    os.set_inheritable(handle, True)  # noqa: FBT003  (takes no keyword)
    with suppress(OSError):
        os.utime(folder)


def instead(path: str, snapshot: Path, copy: Path) -> str:
    """PYTHONPATH that leads to the copy where it led to the snapshot."""
    return os.pathsep.join(str(copy) if each == str(snapshot) else each for each in path.split(os.pathsep))


def main(arguments: Iterable[str]) -> int:
    """Becomes the Python that was asked for; the exit code where it cannot."""
    given, start, *rest = arguments
    snapshot = Path(given)
    try:
        copy = on_node(snapshot, start)
    except DamagedCodeError as error:
        print(f"{snapshot / ARCHIVE}: {error}; start the run again", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"warning: {error}: this rank imports {snapshot} instead", file=sys.stderr)
        copy = snapshot
    os.environ["PYTHONPATH"] = instead(os.environ.get("PYTHONPATH", ""), snapshot, copy)
    return _become([sys.executable, *rest])


def _become(command: list[str]) -> NoReturn:
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
