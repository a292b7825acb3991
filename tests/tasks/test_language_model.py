"""Likelihoods, greedy answers and texts of a network, against its own logits one text at a time, on all layouts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from src.data.tokenizer import ByteTokenizer
from src.distributed.model_stages import ModelStages
from src.tasks.evaluate.language_model import LanguageModel, ScoredIds
from src.train.validate import StoppedError
from tests.distributed.layouts import degrees, parallel_network
from tests.models.shapes import tiny_deepseek, tiny_llama
from tests.ranks import RankPool

LENGTH = 32
FAMILIES: dict[str, Any] = {
    "llama3": tiny_llama(vocab_size=264),
    "documents": tiny_llama(vocab_size=264, attention="flex", mask="block_causal"),
    "deepseek": tiny_deepseek(vocab_size=264, q_lora_rank=16),
}
PAIRS = [
    ("one", " two"),
    ("", "begins"),
    ("a space at the end ", "stays"),
    ("a context far longer than what a row of this model can hold", " end"),
    ("x", " an answer that is itself much longer than the thirty-two tokens of a row"),
    ("two", " three four"),
    ("short", "."),
]
TEXTS = [
    "",
    "a",
    "exactly thirty-two letters, here",
    "some text that goes on for rather more than two rows of thirty-two",
]
PROMPTS = ["def ", "a prompt that is longer than a row of thirty-two tokens by far", "x"]


def asked(network: ModelStages, rows: int = 2) -> LanguageModel:
    tokenizer = ByteTokenizer()
    return LanguageModel(network, tokenizer, length=LENGTH, rows=rows, ends=(257,), stopped=lambda: False)


def answers(layout: str, family: str) -> tuple[list[float], list[float], list[bool], list[str]]:
    model = asked(parallel_network(FAMILIES[family], degrees(layout)))
    texts = model.written(PROMPTS, ["e", "\n"], 6)
    return model.log_likelihoods(PAIRS), model.whole(TEXTS), model.greedy([*PAIRS, *likeliest(texts)]), texts


def likeliest(texts: list[str]) -> list[tuple[str, str]]:
    """What a model has written by itself, where its bytes are text that can be asked again."""
    return [(prompt, text) for prompt, text in zip(PROMPTS, texts, strict=True) if text and "\ufffd" not in text]


def by_hand(family: str) -> tuple[list[float], list[float]]:
    """A row for each text and torch's own log softmax; long texts as the harness cuts them."""
    (part,) = parallel_network(FAMILIES[family], degrees("single")).stages
    part.eval()

    @torch.no_grad()
    def nats(ids: list[int], scored: int) -> float:
        tokens = torch.tensor([ids[:-1]])
        documents = torch.zeros(tokens.shape, dtype=torch.int32) if part.config.within_documents else None
        logits: Tensor = part(tokens, mask=part.attention_mask(documents, *tokens.shape))
        log = torch.log_softmax(logits[0].double(), -1)
        return float(sum(log[place, ids[place + 1]] for place in range(len(ids) - 1 - scored, len(ids) - 1)))

    pairs = []
    for context, follows in PAIRS:
        ids = [256, *(context + follows).encode()]
        count = len(follows.encode()) + len(context) - len(context.rstrip())
        pairs.append(nats(ids[-LENGTH - 1 :], min(count, LENGTH)))
    texts = []
    for text in TEXTS:
        ids, total = [256, *text.encode()], 0.0
        for first in range(1, len(ids), LENGTH):
            stop = min(first + LENGTH, len(ids))
            total += nats(ids[max(stop - LENGTH - 1, 0) : stop], stop - first)
        texts.append(total)
    return pairs, texts


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_are_those_of_the_logits(family: str, ranks: RankPool) -> None:
    ((likely, whole, greedy, texts),) = ranks(1, answers, "single", family)
    ((pairs, read),) = ranks(1, by_hand, family)
    assert likely == pytest.approx(pairs, rel=1e-5)
    assert whole == pytest.approx(read, rel=1e-5)
    assert whole[0] == 0.0
    assert greedy[len(PAIRS) :] == [True] * len(likeliest(texts))
    assert not all(greedy[: len(PAIRS)])
    assert all("e" not in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "family"),
    [
        ("tp2", "llama3"),
        ("fsdp2", "deepseek"),
        ("pp2", "documents"),
        ("cp2_tp2", "llama3"),
    ],
)
def test_every_layout_answers_alike(layout: str, family: str, ranks: RankPool) -> None:
    (alone,) = ranks(1, answers, "single", family)
    world = 4 if layout == "cp2_tp2" else 2
    for found in ranks(world, answers, layout, family):
        assert found[0] == pytest.approx(alone[0], rel=1e-4)
        assert found[1] == pytest.approx(alone[1], rel=1e-4)
        assert found[2:] == alone[2:]


def stopped() -> str:
    network, votes = parallel_network(FAMILIES["llama3"], degrees("single")), iter([False, True])
    model = LanguageModel(network, ByteTokenizer(), length=LENGTH, rows=1, ends=(), stopped=lambda: next(votes))
    try:
        model.log_likelihoods(PAIRS)
    except StoppedError:
        return "training" if network.stages[0].training and not network.stages[0].output.by_row else "left as it was"
    return "went on"


def test_a_stop_ends_it_between_two_batches_and_leaves_the_model_as_it_was(ranks: RankPool) -> None:
    assert ranks(1, stopped) == ["training"]


def windows(text: str) -> list[ScoredIds]:
    network = parallel_network(FAMILIES["llama3"], degrees("single"))
    return asked(network)._windows(text)


def test_each_token_of_a_text_counts_once(ranks: RankPool) -> None:
    (found,) = ranks(1, windows, "x" * 70)
    assert [each.scored for each in found] == [32, 32, 6]
    assert [len(each.ids) for each in found] == [33, 33, 33]
