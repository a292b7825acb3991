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
from src.distributed.process.rank_context import RankContext
from src.errors import DataError
from src.models.cache import Cache, attending
from src.tasks.generate import decoding as generation
from src.tasks.generate.config import read_prompts
from src.tasks.generate.decoding import DecodingGroup, generate
from src.tasks.generate.graph import NextToken, has_graph, next_logits
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


class EagerToken:
    """`NextToken` without its graph: the pass that a GPU captures, on a CPU."""

    def __init__(self, network: ModelStages, cache: Cache) -> None:
        self.network, self.cache = network, cache
        cache.fix()

    def __call__(self, tokens: Tensor) -> Tensor:
        return next_logits(self.network, self.cache, tokens)


class ToldAtOnce:
    """`Told` of a CPU."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids.clone()

    def ids(self) -> list[int]:
        return self._ids.tolist()


def lengths_of_passes() -> list[int]:
    network = alone(FAMILIES["llama3"].randomised(MODELS["llama3"]))
    seen: list[int] = []

    def logits(tokens: Tensor, *rest: Any) -> Tensor:
        seen.append(tokens.shape[1])
        return SingleStage.logits(network, tokens, *rest)

    with patch.object(network, "logits", logits):
        generate(network, [[5, 7, 11]], count=4, rule=GREEDY, seed=0, ends=(), batch=1)
    return seen


def test_one_device_reads_what_it_writes_token_by_token(ranks: RankPool) -> None:
    """Two columns a pass, as a ring of context ranks needs them, would be twice the work: 0.96 of transformers' speed
    on eight prompts, and 1.2 without.
    """
    assert ranks(1, lengths_of_passes)[0] == [3, 1, 1, 1]


def written_at_fixed_size(family: str, fixed_block: int | None) -> list[list[list[int]]]:
    """With a cache that grows, and with one that is as large as it will be."""
    config = MODELS[family].model_copy(update={"fixed_block": fixed_block})
    model = FAMILIES[family].randomised(config)
    found = []
    for fixed in (False, True):
        with (
            patch.object(generation, "has_graph", lambda _, fixed=fixed: fixed),
            patch.object(generation, "NextToken", EagerToken),
            patch.object(generation, "Told", ToldAtOnce),
        ):
            found.append(generate(alone(model), PROMPTS, count=12, rule=GREEDY, seed=0, ends=(), batch=3))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fixed_block", [None, 4])
def test_a_cache_of_fixed_size_writes_the_same(family: str, fixed_block: int | None, ranks: RankPool) -> None:
    ((grown, fixed),) = ranks(1, written_at_fixed_size, family, fixed_block)
    assert grown == fixed


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "dtype", "close"), [("llama3", torch.float32, 1e-4), ("deepseek", torch.bfloat16, 0.06)]
)
def test_a_captured_token_has_the_logits_of_a_launched_one(family: str, dtype: torch.dtype, close: float) -> None:
    """Fifteen tokens after three prompts of three lengths. Kernels sum in other orders: bf16 has 8 bits."""
    process = RankContext.join("cuda", 1, timeout_seconds=60)
    model = FAMILIES[family].randomised(MODELS[family]).to("cuda")
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    mesh = Mesh(degrees("single"), "cuda")
    network = SingleStage([model], mesh, process.device)
    tokens = torch.randint(1, 30, (3, 15, 1), generator=torch.Generator().manual_seed(1))
    found: list[list[Tensor]] = [[], []]
    with network.inference():
        for captured, logits in zip((False, True), found, strict=True):
            group = DecodingGroup(network, dict(enumerate(PROMPTS[:3])), 16, seed=0)
            with attending(model, group.cache):
                group.read(group.tokens)
                assert has_graph(network)
                step = NextToken(network, group.cache) if captured else group.read
                logits += [step(tokens[:, place]).float().cpu() for place in range(15)]
    process.leave()
    for launched, replayed in zip(*found, strict=True):
        torch.testing.assert_close(replayed, launched, rtol=0, atol=close * float(launched.abs().max()))
    assert not torch.equal(found[1][2], found[1][3])


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
