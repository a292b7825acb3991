"""The pictures of README.md that show real runs: `python -m docs.pictures`, some ten minutes on two CPU cores;
`python -m docs.pictures report` makes one of them.

docs/pictures/loss.png    the loss curve of `make demo` on two ranks
docs/pictures/console.svg what a first run on one's own text prints, here the pages of docs/
docs/pictures/report.png  the first screen of a sweep's report.html, as headless Chromium shows it

docs/pictures/architecture.svg is drawn by hand.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

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
CONSOLE = ["experiment=own_text", "data.files=docs", "task.steps=40"]
COLUMNS = 104
FONT_FACE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich's comes from elsewhere


def console_of_a_run(root: Path) -> None:
    words = [sys.executable, "launch.py", *CONSOLE]
    pipe, both = subprocess.PIPE, subprocess.STDOUT  # as a terminal has them, in their order
    ended = subprocess.run(words, cwd=HOME, env=_environment(root), stdout=pipe, stderr=both, text=True, check=True)
    (PICTURES / "console.svg").write_text(console(ended.stdout, root))


def loss_of_the_demo(root: Path) -> None:
    _python(root, "launch.py", *DEMO)
    (curve,) = root.glob("demo-*/loss.png")
    shutil.copy(curve, PICTURES)


def report_of_a_sweep(root: Path) -> None:
    if (program := browser()) is None:
        raise UserError("no browser for a picture of the report; on Debian: apt-get install chromium")
    _python(root, "launch.py", *SWEEP)
    (sweep,) = root.glob("sweeps/*")
    _python(root, "-m", "src.sweeps", "report", str(sweep))
    # No sandbox: the page is our own, and root, as in a container, has none.
    window = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}"]
    window.append("--virtual-time-budget=20000")  # its script has drawn by then
    page = (sweep / "report.html").as_uri()
    subprocess.run([program, *window, f"--screenshot={PICTURES / 'report.png'}", page], check=True)


def console(told: str, root: Path) -> str:
    """What a run said, as the SVG of a terminal: the same for the same text. `root` is shown as runs."""
    terminal = Console(record=True, width=COLUMNS, file=StringIO())
    terminal.print(Text(f"$ python launch.py {' '.join(CONSOLE)}", style="bold"))
    for line in told.replace(str(root), "runs").rstrip().splitlines():
        terminal.print(Text(line, no_wrap=True, overflow="ellipsis"))
    return FONT_FACE.sub("", terminal.export_svg(title="ropewalk", unique_id="console"))


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"RUNS": str(root)}


def _python(root: Path, *words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=HOME, env=_environment(root), check=True)


ALL = {"console": console_of_a_run, "loss": loss_of_the_demo, "report": report_of_a_sweep}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(ALL)}; without a name all")
    chosen = parser.parse_args().names
    if unknown := sorted(set(chosen) - set(ALL)):
        parser.error(f"{unknown[0]}: no such picture; there are {', '.join(ALL)}")
    for name in chosen or ALL:
        with tempfile.TemporaryDirectory() as folder:
            ALL[name](Path(folder))


if __name__ == "__main__":
    main()
