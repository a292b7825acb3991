"""`plot`, `table` and `cite`: the numbers that are drawn and set, the files that are written, what is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from src.runs.commands.figures.software import ALWAYS, USED
from src.runs.commands.figures.tables import escaped
from src.runs.commands.main import main
from tests.runs.made import made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two learning rates with seeds of known losses, three and two; the second rate's last seed failed at step 60."""
    root = tmp_path / "runs"
    for seed, loss in enumerate((2.5, 2.6, 2.7)):
        made(root, f"slow-{seed}", "optim.lr=3e-4", f"seed={seed}", f"task.log_every={seed + 1}", loss=loss)
    made(root, "fast-0", "optim.lr=0.001", "seed=0", loss=3.0)
    made(root, "fast-1", "optim.lr=0.001", "seed=1", loss=3.2, ended="failed", said="rank 0: ValueError: bad")
    return root


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[str, str]:
    assert main([*map(str, argv)]) == code
    told = capsys.readouterr()
    return told.out, told.err


def drawn(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return json.loads(run(capsys, *argv, "--json")[0])


def fall(step: int, steps: int = 200) -> float:
    """What tests.sweeps.points.train adds to a loss."""
    return 3.0 * math.exp(-step / (0.12 * steps)) + 0.04 * math.sin(step * 12.9898) * math.cos(step * 4.1)


def test_seeds_are_averaged_where_all_of_them_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, said = root / "fig.svg", "fast-1: ends at step 60, and so does the mean of lr=0.001\n"
    assert run(capsys, "plot", "--root", root, "y=loss", f"out={out}")[1] == said
    fast, slow = drawn(capsys, "plot", "--root", root, "x=tokens", "y=loss", f"out={out}")["curves"]
    assert (slow["label"], slow["runs"]) == ("lr=0.0003", ["slow-0", "slow-1", "slow-2"])
    assert slow["x"] == [step * 8192.0 for step in range(10, 201, 10)]
    assert slow["mean"] == pytest.approx([2.6 + fall(step) for step in range(10, 201, 10)])
    assert slow["deviation"] == pytest.approx([0.1] * 20)  # of 2.5, 2.6 and 2.7, over n - 1
    assert fast["x"][-1] == 60 * 8192.0
    picture = out.read_text()
    assert re.findall(r'id="((?:curve|band)_\d)"', picture) == ["band_1", "band_2", "curve_1", "curve_2"]
    assert "lr=0.0003 (3 seeds)" in picture
    assert "loss (nats per token)" in picture
    assert points(picture, "curve_2") == 20


def points(picture: str, curve: str) -> int:
    """Of a line in an SVG."""
    found = re.search(rf'id="{curve}">.*?d="(M[^"]*)"', picture, re.DOTALL)
    assert found is not None
    return len(re.findall("[ML]", found[1]))


def test_axes_and_labels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={root / 'fig.png'}"
    (one,) = drawn(capsys, "plot", "slow-0", "--root", root, out, "x=hours", "y=loss")["curves"]
    assert (one["label"], one["deviation"]) == ("slow-0", None)
    assert one["x"][0] == pytest.approx(5.0 / 3600)  # ten steps of half a second after the first line
    each = drawn(capsys, "plot", "--root", root, out, "label=seed,optim.lr", "x=step", "log=xy")["curves"]
    assert [curve["label"] for curve in each] == [
        "seed=0 lr=0.001", "seed=1 lr=0.001", "seed=0 lr=0.0003", "seed=1 lr=0.0003", "seed=2 lr=0.0003",
    ]  # fmt: skip
    assert [curve["mean"] for curve in each] == [[3.0], [3.2], [2.5], [2.6], [2.7]]
    assert [curve["x"] for curve in each] == [[200.0], [60.0], [200.0], [200.0], [200.0]]
    made(root, "small", "model=llama3_1b", "optim.lr=3e-4", loss=4.0)
    labels = [
        curve["label"] for curve in drawn(capsys, "plot", "slow", "small", "--root", root, out, "y=loss")["curves"]
    ]
    assert labels == ["model=llama3_debug", "model=llama3_1b"], "the preset says all that its recipe changes"


@pytest.mark.parametrize(("name", "begin"), [("a.pdf", b"%PDF-"), ("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_same_numbers_are_the_same_file(
    root: Path, name: str, begin: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    out = root / name
    run(capsys, "plot", "slow", "--root", root, f"out={out}")
    first = out.read_bytes()
    run(capsys, "plot", "slow", "--root", root, f"out={out}")
    assert first.startswith(begin)
    assert out.read_bytes() == first
    assert b"/Type3" not in first


def test_a_style_file_has_the_last_word(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style, out = root / "paper.mplstyle", root / "fig.svg"
    style.write_text("figure.figsize: 2, 1\naxes.prop_cycle: cycler('color', ['abcdef'])\n")
    run(capsys, "plot", "--root", root, "y=loss", f"out={out}", f"style={style}")
    assert 'width="144pt" height="72pt"' in out.read_text()
    assert "#abcdef" in out.read_text()
    style.write_text("figure.fig: 2\nlines.linewidth: thick\n")
    said = run(capsys, "plot", "slow", "--root", root, f"out={out}", f"style={style}", code=2)[1]
    assert "Bad key figure.fig" in said
    assert "Bad value" in said


def test_a_table_sets_final_numbers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "table.tex"
    shown, said = run(capsys, "table", "--root", root, "y=parameters,validation_loss", f"out={out}")
    assert "2.6000 +- 0.1000" in shown
    assert said == "fast-1: failed at step 60 of 200, so its numbers are not final\n"
    lines = out.read_text().splitlines()
    assert lines[0] == f"% python -m src.runs table y=parameters,validation_loss out={out}"
    assert lines[1:] == [
        r"% needs \usepackage{booktabs}",
        "% fast-1: failed at step 60 of 200, so its numbers are not final",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r"lr & seeds & parameters & validation loss \\",
        r"\midrule",
        r"0.001 & 2 & 8.03B & $3.1000 \pm 0.1414$ \\",
        r"0.0003 & 3 & 8.03B & $2.6000 \pm 0.1000$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    (row,) = json.loads(run(capsys, "table", "fast-0", "--root", root, "--json")[0])["rows"]
    assert row["numbers"]["validation_loss"] == {"mean": 3.0, "deviation": None}
    latex = run(capsys, "table", "fast-0", "--root", root, "label=name", "--latex")[0]
    assert r"fast-0 & 8.03B & 1.64M & " in latex


def test_tex_is_escaped(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(root, "a_b")
    assert r"a\_b & 8.03B & " in run(capsys, "table", "a_b", "--root", root, "--latex")[0]
    assert escaped(r"a_b 50% $x^2 \{") == r"a\_b 50\% \$x\textasciicircum{}2 \textbackslash{}\{"


def test_the_software_of_a_run_is_cited(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(root, "more", "precision=fp8", "tokenizer=bpe", "tracker=wandb", "fault_tolerance=torchft", "data=c4")
    keys = [entry["key"] for entry in json.loads(run(capsys, "cite", "more", "--root", root, "--json")[0])]
    assert keys == [
        "ropewalk", "Ansel_PyTorch_2_2024", "Yadan2019Hydra", "torchao", "torchft", "lhoest-etal-2021-datasets",
        "Moi_HuggingFace_s_Tokenizers_2023", "wandb",
    ]  # fmt: skip
    text = run(capsys, "cite", "slow-0", "--root", root)[0]
    assert re.findall(r"^@(\w+)\{", text, re.MULTILINE) == ["software", "inproceedings", "misc"]
    assert text.count("{") == text.count("}")
    assert "version = {0.1.0}," in text, "of the folder's newest attempt, which names none"
    trackers = ("wandb", "trackio", "mlflow")
    chosen = {name: [one["key"] for used, one in USED if used({"tracker": {name: {}}})] for name in trackers}
    assert chosen == {"wandb": ["wandb"], "trackio": ["trackio"], "mlflow": ["zaharia2018accelerating"]}
    assert all({"author", "title", "year"} <= set(one) for one in (*ALWAYS, *(one for _, one in USED)))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plot", "x=token"], "x=token: no such axis; did you mean tokens?"),
        (["plot", "y=los"], "y=los: no run has it; there are "),
        (["plot", "x=flops"], "x=flops: fast-0 has no such numbers; take x=step"),
        (["plot", "log=z"], "log=z: no such axis; there are: none, x, y, xy"),
        (["plot", "out=fig.jpg"], "out=fig.jpg: jpg is no format; end the name with .pdf, .png or .svg"),
        (["plot", "out=fig"], "out=fig: no ending is no format"),
        (
            ["plot", "y=loss", "out=/nowhere/fig.pdf"],
            "out=/nowhere/fig.pdf: cannot be written (No such file or directory)",
        ),
        (["plot", "style=ggplt"], "style=ggplt: no such file, nor a style of matplotlib; did you mean ggplot?"),
        (["plot", "label=optim.rate"], "label=optim.rate: none of these runs has it"),
        (["plot", "label=optin.lr"], "optin.lr: no such key of a run; did you mean optim?"),
        (["plot", "state=running"], "no such run; name runs, a sweep or conditions"),
        (["table", "out=a.csv"], "out=a.csv: a table is LaTeX; end the name with .tex"),
        (["table", "y=los"], "y=los: no run has it; there are "),
    ],
)
def test_a_mistake_is_told_in_one_line(
    root: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(root.rglob("*"))
    said = run(capsys, *argv, "--root", root, code=2)[1]
    assert said.startswith(words), said
    assert said.count("\n") == 1
    assert sorted(root.rglob("*")) == before
