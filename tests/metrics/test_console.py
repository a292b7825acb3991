"""What is printed, in a terminal and in a file."""

import io
import re

import pytest
from rich.console import Console as Terminal

from src.metrics.console import COLUMNS, Console, format_record, format_startup, format_validation

VALUES = {
    "loss": 3.21456,
    "grad_norm": 0.5213,
    "lr": 8e-4,
    "tokens_per_second": 12345.6,
    "mfu_full_percent": 41.23,
    "mfu_causal_percent": 35.0,
    "step_seconds": 2.0,
    "data_seconds": 0.0012,
    "peak_reserved_gib": 31.24,
    "tokens": 1e6,
}


def shown(*, terminal: bool) -> str:
    file = io.StringIO()
    with Console(1000, Terminal(file=file, force_terminal=terminal, soft_wrap=True, width=160)) as console:
        console.record(400, VALUES)
        console.say(format_validation(400, 3.5))
        console.record(410, VALUES | {"loss": 2.0})
    return file.getvalue()


def test_record_line() -> None:
    assert format_record(VALUES) == (
        "loss 3.2146  12,346 tok/s  MFU 41.2%  (35.0% causal)  grad norm 0.521  lr 8.00e-04  data 0.001 s  31.2 GiB"
    )
    assert format_record({"lr": 1.0, "experts/load_max_over_mean": 1.71}) == "lr 1.00e+00  busiest expert 1.7x"
    assert format_record({"loss": float("nan"), "step_seconds": 1.0}) == "loss nan"


def test_plain_lines_into_a_file() -> None:
    first, validation, second = shown(terminal=False).splitlines()
    assert first == f"step 400/1000  ETA 0:20:00  {format_record(VALUES)}"
    assert validation == "step 400  validation loss 3.5000"
    assert second.startswith("step 410/1000  ETA 0:19:40  loss 2.0000")


def test_live_line_in_a_terminal() -> None:
    output = shown(terminal=True)
    assert "\x1b[2K" in output  # the line is drawn over, not repeated below itself
    for text in ("400/1000", "410/1000", "loss 2.0000", "12,346 tok/s", "ETA 0:19:40", "validation loss 3.5000"):
        assert text in output


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal_and_all_stay_in_its_scrollback(width: int) -> None:
    file = io.StringIO()
    everything = {name: 12345.678 for name, _ in COLUMNS} | {"step_seconds": 2.0}
    with Console(100_000, Terminal(file=file, force_terminal=True, soft_wrap=True, width=width)) as console:
        console.say(format_startup(dict.fromkeys(("import", "init", "load", "compile", "first_step"), 1234.5)))
        for step in (99_990, 99_995):
            console.record(step, everything)
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue()).replace("\r", "\n").splitlines()
    assert [line for line in drawn if len(line) > width] == []
    assert [line[:18] for line in drawn if line.startswith("step ")] == ["step 99990/100000 ", "step 99995/100000 "]
    assert all("loss 12345.6780" in line for line in drawn if line.startswith("step "))
    assert any("99995/100000  ETA 0:00:10" in line for line in drawn if not line.startswith("step "))


def test_a_task_without_steps_has_no_bar() -> None:
    file = io.StringIO()
    with Console(0, Terminal(file=file, force_terminal=True, width=80)) as console:
        console.say("read back: the same bits")
    assert file.getvalue() == "read back: the same bits\n"


def test_startup_line() -> None:
    text = format_startup({"import": 3.0, "init": 0.5, "first_step": 0.25})
    assert text == "startup 3.8 s:  import 3.0 s  init 0.5 s  first step 0.2 s"
