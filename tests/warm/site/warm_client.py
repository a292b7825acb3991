"""What every Python that a test starts does first: ask the test session for a process that has imported torch already.

tests/warm/server.py answers with one that is forked and lives this process's life: same command line, environment,
folder, open files, ignored signals. This process then only passes signals on, and ends as that one does. Where nobody
answers, or the command line is none of src's, Python goes on as if this file were not here.
"""

import os
import sys

OPTIONS = ("-P", "-u", "-B")
MODULES = ("submitit.core._submit", "torch.distributed.run")  # which run code of src
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


def words() -> list[str]:
    """The command line without Python and its options."""
    found = sys.orig_argv[1:]
    while found and found[0] in OPTIONS:
        found = found[1:]
    return found


def ours(line: list[str]) -> bool:
    """Whether this is `python launch.py ...`, `python -m src...` or one of MODULES."""
    if line[:1] == ["-m"]:
        return line[1].startswith("src.") or line[1] in MODULES
    return bool(line) and os.path.basename(line[0]) == "launch.py"


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def hand_over(place: str) -> None:
    import array
    import contextlib
    import json
    import signal
    import socket

    numbers = [getattr(signal, name) for name in SIGNALS]
    opened = [number for number in range(3) if is_open(number)]
    life = {
        "words": words(),
        "argv": sys.orig_argv,
        "path": sys.path,
        "safe": sys.flags.safe_path,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "opened": opened,
        "ignored": [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN],
        "pid": os.getpid(),
        "parent": os.getppid(),
    }
    line = socket.socket(socket.AF_UNIX)
    request = json.dumps(life).encode() + b"\n"
    try:
        line.connect(place)
        sent = line.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened))])
        if sent < len(request):  # even to send nothing fails where it has been read and refused by now
            line.sendall(request[sent:])
        answers = line.makefile()
        pid = int(answers.readline() or 0)
    except OSError:  # who starts no process closes the line
        return
    if not pid:
        return
    # From here on nothing may raise: this Python would go on and live the same life a second time.

    def pass_on(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and the answer is on its way
            os.kill(pid, number)

    for number in numbers:
        if number not in life["ignored"]:
            signal.signal(number, pass_on)
    try:
        code = int(answers.readline() or -signal.SIGKILL)
    except OSError:  # whoever warms us is dead, and all its processes with it
        code = -signal.SIGKILL
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if os.environ.get("WARM") and ours(words()):
    hand_over(os.environ["WARM"])
