"""Text after prompts: greedily what transformers writes, by chance what the probabilities say, alike on all layouts."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from src.distributed.mesh import Mesh
from src.distributed.model_stages import ModelStages, SingleStage
from src.distributed.parallelize import parallelize
from src.errors import DataError
from src.tasks.generate import decoding as generation
from src.tasks.generate.config import read_prompts
from src.tasks.generate.decoding import generate
from src.tasks.generate.sampling import SamplingParams, sample
from tests.distributed.layouts import FP32, PLAIN, degrees, parallel_network, recomputed
from tests.models import test_deepseek, test_llama3
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

PROMPTS = [[5, 7, 11], [90], [3, 1, 4, 1, 5, 9, 2, 6, 5], [8, 8], [27, 18, 28]]
GREEDY = SamplingParams(0.0)
CHANCE = SamplingParams(0.9, top_k=20, top_p=0.95)
MODELS: dict[str, Any] = {
    "llama3": tiny_llama(),
    "deepseek": tiny_deepseek(q_lora_rank=16, moe=test_deepseek.SIGMOID),
}
FAMILIES: dict[str, Any] = {"llama3": test_llama3, "deepseek": test_deepseek}


def alone(model: Any) -> ModelStages:
    """A model as a network of one rank, with the weights that it has."""
    mesh = Mesh(degrees("single"), "cpu")
    parallelize(model, mesh, FP32, recomputed("none"), PLAIN)
    return SingleStage([model], mesh, torch.device("cpu"))


def written(family: str, at_once: int) -> list[list[int]]:
    model = FAMILIES[family].randomised(MODELS[family])
    with patch.object(generation, "TOKENS_AT_ONCE", at_once):
        return generate(alone(model), PROMPTS, count=12, rule=GREEDY, seed=0, ends=(), batch=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at_once", [2048, 6])
def test_greedy_text_is_that_of_transformers(family: str, at_once: int, ranks: RankPool) -> None:
    """Five prompts of five lengths, three and two at a time; 6 tokens at once read a prompt in several passes."""
    model = FAMILIES[family].randomised(MODELS[family])
    version = ["V3"] if family == "deepseek" else []
    theirs: Any = FAMILIES[family].as_transformers(model, MODELS[family], *version)
    expected = [
        theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        for prompt in PROMPTS
    ]
    texts = [row[0, len(prompt) :].tolist() for row, prompt in zip(expected, PROMPTS, strict=True)]
    assert ranks(1, written, family, at_once) == [texts]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)


def on_layout(layout: str, family: str, rule: SamplingParams, batch: int) -> list[list[int]]:
    network = parallel_network(MODELS[family], degrees(layout))
    return generate(network, PROMPTS, count=8, rule=rule, seed=3, ends=(), batch=batch)


@pytest.fixture(scope="module")
def single(ranks: RankPool) -> Callable[[str, SamplingParams], list[list[int]]]:
    """What one device writes."""
    return cache(lambda family, rule: ranks(1, on_layout, "single", family, rule, 5)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "batch"), [("tp2", 2), ("fsdp2", 2), ("cp2", 5), ("pp2", 3), ("tp2_fsdp2", 1), ("cp2_tp2", 4)]
)
@pytest.mark.parametrize("rule", [GREEDY, CHANCE], ids=["greedy", "chance"])
def test_every_layout_writes_the_same(
    layout: str,
    batch: int,
    rule: SamplingParams,
    ranks: RankPool,
    single: Callable[[str, SamplingParams], list[list[int]]],
) -> None:
    """Also with more ranks than prompts left: five prompts on two data ranks, two or one at a time."""
    world = degrees(layout).world
    assert ranks(world, on_layout, layout, "llama3", rule, batch) == [single("llama3", rule)] * world


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "pp2", "tp2", "cp2", "fsdp2_ep2", "tp2_ep2"])
def test_experts_write_the_same(
    layout: str, ranks: RankPool, single: Callable[[str, SamplingParams], list[list[int]]]
) -> None:
    assert ranks(2, on_layout, layout, "deepseek", CHANCE, 2) == [single("deepseek", CHANCE)] * 2


def ended(*ends: int) -> list[list[int]]:
    return generate(
        alone(test_llama3.randomised(MODELS["llama3"])), PROMPTS, count=12, rule=GREEDY, seed=0, ends=ends, batch=5
    )


def test_a_text_ends_where_it_says(ranks: RankPool) -> None:
    (whole,) = ranks(1, written, "llama3", 2048)
    end = whole[2][4]
    cut = [text[: text.index(end)] if end in text else text for text in whole]
    assert ranks(1, ended, end) == [cut]
    either = [
        text[: min((place for place, each in enumerate(text) if each in (end, cut[0][-1])), default=12)]
        for text in whole
    ]
    assert ranks(1, ended, end, cut[0][-1]) == [either] != [cut]
    assert any(len(text) < 12 for text in cut)
    assert any(len(text) == 12 for text in cut)


def uniforms(count: int) -> Tensor:
    """Evenly over [0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (SamplingParams(1.0), [0.1, 0.4, 0.2, 0.3]),
        (SamplingParams(0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (SamplingParams(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(1.0, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (SamplingParams(1.0, top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
        (SamplingParams(1.0, top_p=1e-9), [0, 1, 0, 0]),
        (SamplingParams(1.0, top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),  # of what top_k leaves, 4/9 is less than half
        (SamplingParams(0.0), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_the_rule_says(rule: SamplingParams, expected: list[float]) -> None:
    count = 9000
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(count, 4)
    drawn = sample(logits, rule, uniforms(count)).bincount(minlength=4) / count
    torch.testing.assert_close(drawn, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=2e-4)


def test_the_largest_uniform_number_draws_a_token_that_is_there() -> None:
    logits = torch.full((1, 7), -1e9)
    logits[0, 4] = 0.0
    assert sample(logits, SamplingParams(1.0), torch.tensor([1 - 2**-53], dtype=torch.float64)).item() == 4


def test_prompts_of_a_pipe_are_refused(tmp_path: Path) -> None:
    """The launcher would read it, and nothing be left for the ranks; or both would wait for ever."""
    os.mkfifo(tmp_path / "prompts")
    with pytest.raises(DataError, match=r"task\.prompts=.*/prompts: is no regular file"):
        read_prompts(tmp_path / "prompts")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": null}', "is no JSON object with a text under prompt"),
        (b'{"prompt": 5}', "is no JSON object with a text under prompt"),
        (b"[" * 100_000, "is no JSON object with a text under prompt"),
        (b'{"prompt": "\\ud800"}', "is not UTF-8 text"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text"),
    ],
)
def test_a_bad_prompt_is_named_by_its_line(tmp_path: Path, line: bytes, words: str) -> None:
    """Empty lines count, and none is written as None."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\n{"prompt": "one"}\r\n\n' + line)
    with pytest.raises(DataError, match=f"prompts.jsonl, line 4: {words}"):
        read_prompts(path)


def test_prompts_are_lines_that_end_with_a_line_feed(tmp_path: Path) -> None:
    """The separators of Unicode are letters of a text; marks and ends of another system are not."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}\n'.encode())
    assert read_prompts(path) == ["a\u2028b", "c"]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\r\n\nc\n".encode())
    assert read_prompts(path) == ["a\u2028b", "c"]
