"""`python launch.py` as a person types it: a process with ranks of its own.

It is forked from one that has imported torch (tests/forks.py), which leaves the ranks as what takes time. That `python
launch.py` itself starts is shown by tests/test_launch.py and tests/test_readme.py.
"""

import atexit
import json
import os
import runpy
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.end_to_end.lives import HOME
from tests.forks import Place, forkserver

PATIENCE_SECONDS = 600.0  # far beyond what a busy machine needs


class Command:
    """What subprocess.Popen would be, of a process that is somebody else's child; `stdout` and `stderr` are pipes."""

    def __init__(self, argv: tuple[str, ...], environment: dict[str, str]) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        place = Place(environment, str(HOME), Connection(out_end), Connection(err_end))
        self._process = launched(argv, place)
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.stdout, self.stderr = open(out), open(err)  # noqa: SIM115 (as long as the command)

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same, by the name that subprocess.Popen has for it."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Until it has ended: all that it said."""
        with ThreadPoolExecutor(2) as pool:
            said = pool.submit(self.stdout.read), pool.submit(self.stderr.read)
            self._process.join(timeout)
            if self._process.exitcode is None:
                self.kill()
                raise TimeoutError(f"no end in {timeout:g} s: {[each.result() for each in said]}")
            return said[0].result(), said[1].result()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Its ranks notice, and end too."""
        self._process.kill()


def launched(argv: tuple[str, ...], place: Place) -> BaseProcess:
    """The process of this command line. The ends of `place` are its own from here on."""
    process = forkserver().Process(target=_launch, args=(argv, place))
    process.start()
    atexit.register(process.kill)  # or an interrupted suite would wait for it
    place.out.close()
    place.err.close()
    return process


def _launch(argv: tuple[str, ...], place: Place) -> None:
    os.setsid()  # its own process group, as a terminal gives it
    place.enter()
    sys.argv = [str(HOME / "launch.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(*argv: str, **environment: str) -> Command:
    """This command line, running."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return Command(argv, kept | environment)


def command(*argv: str, **environment: str) -> tuple[int, str]:
    """Exit code, and all that it said."""
    process = start(*argv, **environment)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode is not None
    return process.returncode, out + err


def wait_for_step(process: Command, root: Path, pattern: str, step: int) -> Path:
    """Until the metrics of the run folder that this command fills tell of a step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for file in root.glob(f"{pattern}/metrics.jsonl"):
            whole = [line for line in file.read_text().splitlines() if line.endswith("}")]
            if any(json.loads(line).get("step", 0) >= step for line in whole):
                return file.parent
        time.sleep(0.05)
    process.kill()
    out, err = process.communicate(PATIENCE_SECONDS)
    raise AssertionError(f"{root}/{pattern}: no step {step} in {PATIENCE_SECONDS:g} s\n{out}{err}")
