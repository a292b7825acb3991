"""Answers the Pythons that tests start (site/warm_client.py): each becomes a fork of one that has imported torch.

A rank's imports take 5 to 10 s of a core, and the suite starts some 400 processes. Only these differ from a process of
its own: its pid, its session, and that `os.getppid` is told who asked. The frozen code of a run is not imported again
where it is that of this checkout, byte for byte.
"""

import atexit
import filecmp
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

from tests.forks import forkserver

HOME = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
LONGEST = 2**20  # bytes of one message


def serve() -> dict[str, str]:
    """From here to the end of this process; returns what the environment of those who ask must have."""
    folder = tempfile.TemporaryDirectory(prefix="warm")
    atexit.register(folder.cleanup)
    line = socket.socket(socket.AF_UNIX)
    line.bind(place := f"{folder.name}/socket")
    line.listen(64)
    threading.Thread(target=_accept, args=(line,), daemon=True).start()
    return {"WARM": place, "PYTHONPATH": str(SITE)}


def _accept(line: socket.socket) -> None:
    while True:
        asking, _ = line.accept()
        threading.Thread(target=_answer, args=(asking,), daemon=True).start()


def _answer(asking: socket.socket) -> None:
    with asking:
        said, files, _, _ = socket.recv_fds(asking, LONGEST, 3)
        while said and not said.endswith(b"\n"):
            said += asking.recv(LONGEST)
        life = json.loads(said)
        ends = {number: Connection(file) for number, file in zip(life["opened"], files, strict=True)}
        try:
            if not life["safe"]:
                script = "" if life["words"][0] == "-m" else os.path.dirname(life["words"][0])
                life["path"].insert(0, os.path.join(life["folder"], script))
            root = next((each for each in life["path"] if Path(each, "src").is_dir()), None)
            if root is None or (kind := _kind(root)) == "no":
                return
            reads_conf = life["words"][0] != "-m" or life["words"][1].startswith("src.config.")
            if reads_conf and kind == "warm" and Path(root).resolve() != HOME:
                return  # it would read conf/ beside the code that is warm, and freeze that
            process = forkserver().Process(target=_live, args=(life, ends, root, kind == "warm"))
            process.start()
        finally:
            for end in ends.values():
                end.close()
        try:
            asking.sendall(b"%d\n" % (process.pid or 0))
            process.join()
            asking.sendall(b"%d\n" % (process.exitcode or 0))
        except OSError:  # who asked was killed, and the fork ends by itself
            process.join()


@cache
def _kind(root: str) -> Literal["warm", "own", "no"]:
    """Of the `src` below a folder: "warm", that of this checkout, to which others may have added modules; "own", a
    stand-in that a fork imports; "no", another that only a process of its own can import: operators cannot be defined
    twice.
    """
    names = [str(file.relative_to(HOME)) for file in HOME.glob("src/**/*.py")]
    if filecmp.cmpfiles(HOME, root, names, shallow=False)[1:] == ([], []):
        return "warm"
    return "no" if Path(root, "src/models").is_dir() else "own"


def _live(life: dict[str, Any], ends: dict[int, Connection], root: str, warm: bool) -> NoReturn:
    """In the fork: the life of the process that asked."""
    os.setsid()
    asker, parent = _ended(life["pid"]), _ended(life["parent"])
    _end_with(asker)
    _enter(life, ends)

    def getppid() -> int:
        """Only who wants to end with its parent asks who that is."""
        _end_with(parent)
        found: int = life["parent"]
        return found

    os.getppid = getppid
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "src" and not warm:
            del sys.modules[name]
        elif name.partition(".")[0] == "src" and hasattr(module, "__path__"):
            module.__path__ = [os.path.join(root, *name.split("."))]  # where the rest is, which is not imported yet
            module.__file__ = os.path.join(module.__path__[0], "__init__.py")
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # which torch has read before the fork
    _run(life["words"])


def _ended(pid: int) -> int:
    """What can be read from as soon as this process has ended. Its number is none of 0, 1, 2, which are open now."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return os.open(os.devnull, os.O_RDONLY)


def _end_with(ended: int) -> None:
    def wait() -> None:
        select.select([ended], [], [])
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _enter(life: dict[str, Any], ends: dict[int, Connection]) -> None:
    """What a new Python finds, and has set up before its first line."""
    os.environ.clear()
    os.environ.update(life["environment"])
    # Which Python reads when it starts: bytecode in a run's frozen code is refused there.
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX") or None
    os.chdir(life["folder"])
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if number in ends:
            os.dup2(ends[number].fileno(), number)
            buffering, errors = (1, "backslashreplace") if name == "stderr" else (-1, None)
            stream = open(number, mode, buffering, errors=errors, closefd=False)  # noqa: SIM115 (as long as the process)
            setattr(sys, name, stream)
        else:
            os.close(number)
            setattr(sys, name, None)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in life["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.orig_argv, sys.path[:] = life["argv"], life["path"]
    sys.modules["warm_client"] = ModuleType("warm_client")  # which would ask again
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401  (a test's own, perhaps)


def _run(words: list[str]) -> NoReturn:
    """The command line, ended as Python ends."""
    code: Any = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)
