"""The pictures of README.md that show real runs: `python -m docs.pictures`, some ten minutes on two CPU cores.

docs/pictures/loss.png    the loss curve of `make demo` on two ranks
docs/pictures/report.png  the first screen of a sweep's report.html, as headless Chromium shows it

docs/pictures/architecture.svg is drawn by hand.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from docs.browser import browser
from src.errors import UserError

HOME = Path(__file__).parents[1]
PICTURES = HOME / "docs" / "pictures"
DEMO = ["experiment=demo", "parallel=fsdp2"]
SMALL = ["model.n_layers=2", "model.dim=128", "task.seq_len=128", "task.steps=60", "task.validate_every=20"]
SWEEP = [
    "-m",
    "experiment=demo",
    "parallel=single",
    *SMALL,
    "optim.lr=3e-4,1e-3,3e-3",
    "seed=0,1",
    "name=lr_${optim.lr}",
]
WINDOW = "1280,1150"  # pixels


def main(root: Path) -> None:
    if (program := browser()) is None:
        raise UserError("no browser for a picture of the report; on Debian: apt-get install chromium")
    _python(root, "launch.py", *DEMO)
    _python(root, "launch.py", *SWEEP)
    (curve,) = root.glob("demo-*/loss.png")
    shutil.copy(curve, PICTURES)
    (sweep,) = root.glob("sweeps/*")
    _python(root, "-m", "src.sweeps", "report", str(sweep))
    # No sandbox: the page is our own, and root, as in a container, has none.
    window = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}"]
    window.append("--virtual-time-budget=20000")  # its script has drawn by then
    page = (sweep / "report.html").as_uri()
    subprocess.run([program, *window, f"--screenshot={PICTURES / 'report.png'}", page], check=True)


def _python(root: Path, *words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=HOME, env=os.environ | {"RUNS": str(root)}, check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
