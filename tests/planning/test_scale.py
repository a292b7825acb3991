"""docs/scale.md has the planner's figures, of which the cheap ones are made again; and what sites send, by hand."""

import re
from dataclasses import replace

import pytest

from docs.scale import (
    BEGIN,
    END,
    GPUS_OF_A_SITE,
    KINDS,
    METHODS,
    MODELS,
    NUMBER_OF_SITES,
    PAGE,
    PICTURES,
    ROUND_TRIP,
    SITES,
    SIZES,
    fastest,
    group_row,
    kind,
    of_a_site,
    row,
    sent,
    stall,
    strong,
    weak,
)

EIGHT, _, _, SIXTEEN, _ = MODELS
TEXT = PAGE.read_text()
TABLES = TEXT.partition(BEGIN)[2].partition(END)[0].splitlines()


@pytest.mark.parametrize(
    "case",
    [strong(EIGHT, "H100", 8), strong(EIGHT, "H200", 32), weak(EIGHT, "H200", 8), strong(SIXTEEN, "H200", 8)],
    ids=lambda case: f"{case.model.name}-{case.gpu}-{case.gpus}",
)
def test_the_page_has_what_the_planner_says(case: object) -> None:
    assert row(case) in TABLES, "python -m docs.scale --write"  # type: ignore[arg-type]


def test_the_page_has_every_row() -> None:
    for model in MODELS:
        for gpu in SITES:
            for gpus in SIZES:
                rows = [line for line in TABLES if line.startswith(f"| {model.name} | {gpu} | {gpus:,} |")]
                assert len(rows) == 2, "strong and weak"
        for name in KINDS:
            assert len([line for line in TABLES if line.startswith(f"| {model.name} | {name} |")]) == 1


def test_its_pictures_are_there_and_small() -> None:
    names = re.findall(r"\(pictures/(scale_\w+\.svg)\)", TEXT)
    assert len(names) == 4
    assert all(1000 < (PICTURES / name).stat().st_size < 200_000 for name in names)


def test_more_gpus_are_never_slower_on_the_page() -> None:
    """Strong scaling: seconds of a step fall with every column, up to where the batch ends."""
    for model in MODELS:
        for gpu in SITES:
            rows = [line.split(" | ") for line in TABLES if line.startswith(f"| {model.name} | {gpu} |")]
            times = [float(each[5]) for each in rows[: len(SIZES)] if len(each) > 6]
            assert times == sorted(times, reverse=True)


def test_what_sites_send_by_hand() -> None:
    """1,024 weights a rank, four sites: three quarters go out and three quarters of means come, four bytes each."""
    gradients, plain, _, streaming = METHODS
    parameters = 1024 * GPUS_OF_A_SITE
    assert NUMBER_OF_SITES == 4
    assert sent(parameters, gradients) == sent(parameters, plain) == GPUS_OF_A_SITE * 2 * 3 * 256 * 4
    # A tenth of them in a whole block of 256, of one byte and a scale of four for the block.
    assert sent(parameters, streaming) == GPUS_OF_A_SITE * 2 * 3 * (256 + 4)
    wire = 8 * sent(parameters, plain) / 1e9 + 2 * ROUND_TRIP
    assert stall(parameters, gradients, 1.0, 1.0) == pytest.approx(wire)
    assert stall(parameters, plain, 1.0, 1.0) == pytest.approx(wire / plain.sync_steps)
    assert stall(parameters, streaming, 1.0, 1.0) == 0.0, "nine steps hide it"
    slow = replace(streaming, delay_steps=0)
    assert stall(parameters, slow, 1.0, 1.0) > 0.0


def test_sites_on_the_page() -> None:
    found = of_a_site(EIGHT)
    assert found is not None
    assert found.load.degrees.replicate == 1
    for method in METHODS:
        assert group_row(EIGHT, method, found) in TABLES


def test_kinds_are_of_what_is_cut() -> None:
    found = fastest(strong(EIGHT, "H100", 8))
    assert found is not None
    degrees = found.load.degrees
    assert kind(degrees.model_copy(update={"tensor": 1, "pipeline": 1, "context": 1})) == "FSDP"
    assert kind(degrees.model_copy(update={"tensor": 8, "pipeline": 4, "context": 1})) == "tensor + pipeline"
