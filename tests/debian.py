"""Programs of Debian that tests need and a fresh machine lacks."""

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path


def install(*packages: str, recommended: bool = True) -> None:
    """As root, one process of tests at a time: a second apt-get would fail on the lock of the first.

    `recommended`: also what the packages work better with.
    """
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    wanted = ["install", "-y", *([] if recommended else ["--no-install-recommends"]), *packages]
    with (Path(tempfile.gettempdir()) / "tests-apt-get.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for words in (["update"], wanted):
            subprocess.run(["apt-get", "-qq", *words], env=environment, check=True, stdout=subprocess.DEVNULL)
