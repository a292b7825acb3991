"""Batches: the same samples under any layout, rows as the packing rules say, and a prefetch that hides nothing."""

import errno
import os
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from src.data.batches import DIGEST_CHUNK, Batch, Batches
from src.data.config import Data
from src.data.corpus import Corpus
from src.data.order import Unsigned
from src.storage.patience import Patience
from src.train.resume import recounted
from tests.data.corpora import batches, corpus, mixture, stream, synthetic, texts_of

SEQ_LEN = 32
LAYOUTS = [(1, 12, 1), (1, 4, 3), (1, 1, 12), (2, 3, 2), (3, 4, 1), (4, 1, 3), (12, 1, 1)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(cache: Path) -> Corpus:
    return corpus(synthetic(), cache)


@pytest.fixture(scope="module")
def mixed(cache: Path) -> Corpus:
    return corpus(mixture({"a": 0.7, "b": 0.2, "c": 0.1}), cache)


def rows(batch_list: list[Batch]) -> dict[int, tuple[list[int], list[int]]]:
    return {
        sample: (batch.tokens[row].tolist(), batch.labels[row].tolist())
        for batch in batch_list
        for row, sample in enumerate(batch.samples)
    }


def world(made: Corpus, data: Data, ranks: int, micro_batch: int, micro_batches: int) -> list[Batches]:
    shape = {"ranks": ranks, "micro_batch": micro_batch, "micro_batches": micro_batches}
    return [batches(made, data, rank=rank, **shape) for rank in range(ranks)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_sees_the_same_samples(mixed: Corpus, layout: tuple[int, int, int]) -> None:
    data = mixture({"a": 0.7, "b": 0.2, "c": 0.1})
    (single,) = world(mixed, data, 1, 12, 1)
    ranks = world(mixed, data, *layout)
    for position in (0, 12, 60_000, 7):
        expected = rows(single.step(position))
        assert sorted(expected) == list(range(position, position + 12))
        assert {key: row for one in ranks for key, row in rows(one.step(position)).items()} == expected


def test_rows_stand_where_the_contract_says(made: Corpus) -> None:
    ranks, micro_batch, micro_batches, position = 3, 2, 2, 100
    for rank, one in enumerate(world(made, synthetic(), ranks, micro_batch, micro_batches)):
        for m, batch in enumerate(one.step(position)):
            assert batch.samples == tuple(position + (m * ranks + rank) * micro_batch + i for i in range(micro_batch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_digest_is_of_what_the_ranks_consumed(mixed: Corpus, layout: tuple[int, int, int]) -> None:
    ranks = world(mixed, mixture({"a": 0.7, "b": 0.2, "c": 0.1}), *layout)
    fresh, told = (batches(mixed, mixture({"a": 0.7, "b": 0.2, "c": 0.1})) for _ in range(2))
    for at in range(0, 120, 12):
        fed = [batch for one in ranks for batch in one.step(at)]
        assert all(batch.checksum == fresh.checksum(np.array(batch.samples)) for batch in fed)
        told.taken(range(at, at + 12), sum(batch.checksum for batch in fed))
    with patch.object(told, "checksum"):  # nothing is computed again
        assert told.digest(120) == fresh.digest(120)
    grown = [ranks[0].digest(position) for position in (12, 60, 61, 120)]
    assert grown == [fresh.digest(position) for position in (12, 60, 61, 120)]
    assert ranks[-1].digest(120) == grown[-1]
    assert ranks[0].digest(60) == grown[1]


def test_a_resume_counts_a_window_and_not_what_was_before_it(made: Corpus) -> None:
    """The same digest as from the start; two windows of 65,536 samples at most, however far the run is."""
    position = 1_000_003
    straight, stepping = batches(made, synthetic()), batches(made, synthetic())
    digest, mark = straight.digest(position), straight.mark
    assert mark[0] == (position // DIGEST_CHUNK - 1) * DIGEST_CHUNK
    for at in range(0, position, 50_000):  # as steps tell it, whose ranges cross borders of windows
        taken = range(at, min(at + 50_000, position))
        stepping.taken(taken, stepping.checksum(np.arange(taken.start, taken.stop)))
    assert (stepping.digest(position), stepping.mark) == (digest, mark)
    resumed, counted = batches(made, synthetic()), list[int]()

    def counting(samples: NDArray[np.int64]) -> Unsigned:
        counted.append(len(samples))
        return straight.hashes(samples)

    with patch.object(resumed, "hashes", counting):
        assert recounted(resumed, position, mark, digest) == digest
        assert sum(counted) == position - mark[0] < 2 * DIGEST_CHUNK
        assert resumed.mark == mark
        counted.clear()
        assert recounted(resumed, position, (mark[0], mark[1] + 1), digest) == digest, "a mark that is not the order's"
        assert sum(counted) == position - mark[0] + position
        counted.clear()
        assert resumed.digest(position - 5) == straight.digest(position - 5)  # after a rewind
        assert sum(counted) < 2 * DIGEST_CHUNK
    other = batches(made, synthetic(), seed=1)
    assert recounted(other, position, mark, digest) != digest


def test_a_read_that_fails_with_what_passes_is_tried_again(made: Corpus) -> None:
    """The same samples, and the prefetch of the next steps knows nothing of it; a file that is gone is told at once."""
    sound, pauses, left = batches(made, synthetic()), list[float](), [2]
    patience = Patience(sleep=pauses.append, tell=lambda _: None)
    sick, rows_read = batches(made, synthetic(), patience=patience), made.rows(0, "train", SEQ_LEN)
    whole, number = rows_read.read, [errno.EIO]

    def fails(window: int) -> NDArray[np.int64]:
        if left[0]:
            left[0] -= 1
            raise OSError(number[0], os.strerror(number[0]), "/shared/tokens.bin")
        return whole(window)

    expected = [rows(made_of) for made_of in (sound.step(0), sound.step(sound.global_batch))]
    with patch.object(rows_read, "read", fails):
        assert [rows(made_of) for made_of in islice(sick.prefetch(0, 2), 2)] == expected
        assert (pauses, patience.faults, patience.seconds) == ([1.0, 2.0], 2, 3.0)
        left[0], number[0] = 1, errno.ENOENT
        with pytest.raises(FileNotFoundError):
            sick.step(0)


def test_the_digest_tells_other_data_orders_and_positions(made: Corpus, mixed: Corpus) -> None:
    digests = [
        batches(made, synthetic(), seed=seed, seq_len=seq_len).digest(position)
        for seed in (0, 1)
        for seq_len in (16, 32)
        for position in (0, 5, 6, 70_000)
    ]
    digests.append(batches(mixed, mixture({"a": 0.7, "b": 0.2, "c": 0.1})).digest(6))
    assert len(set(digests)) == len(digests)


def windows(split: str) -> list[tuple[int, ...]]:
    tokens = stream(texts_of(synthetic()), split, 0.1)
    return [tuple(tokens[at : at + SEQ_LEN + 1]) for at in range(0, len(tokens) - 1, SEQ_LEN)]


def test_an_epoch_reads_every_window_once(made: Corpus) -> None:
    """Three epochs in one go: each is all windows of the stream but the short last, in another order."""
    count = made.windows("train", SEQ_LEN)
    one = batches(made, synthetic(), micro_batch=count)
    expected = [window for window in windows("train") if len(window) == SEQ_LEN + 1]
    assert count == len(expected)
    orders = []
    for epoch in range(3):
        (batch,) = one.step(epoch * count)
        orders.append(list(map(tuple, torch.cat((batch.tokens, batch.labels[:, -1:]), dim=1).tolist())))
        assert sorted(orders[-1]) == sorted(expected)
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_weights_are_held_in_tokens(mixed: Corpus) -> None:
    one = batches(mixed, mixture({"a": 0.7, "b": 0.2, "c": 0.1}))
    for position in (1, 10, 137, 10_000):
        told = one.realised(position)
        for name, weight in {"a": 0.7, "b": 0.2, "c": 0.1}.items():
            assert abs(told[name]["tokens"] / SEQ_LEN - weight * position) < 1
            assert told[name]["target"] == pytest.approx(weight)
        assert sum(source["tokens"] for source in told.values()) == position * SEQ_LEN


def brute_force(tokens: list[int], eos: int) -> tuple[list[int], list[int]]:
    """doc(t) = number of eos at u < t; positions count up and restart with the document."""
    documents = [sum(token == eos for token in tokens[:t]) for t in range(len(tokens))]
    positions = [sum(documents[u] == documents[t] for u in range(t)) for t in range(len(tokens))]
    return documents, positions


def test_documents_positions_and_masked_starts(made: Corpus) -> None:
    keys = {"document_masks": True, "mask_document_starts": True}
    plain, packed = batches(made, synthetic(), micro_batch=64), batches(made, synthetic(**keys), micro_batch=64)
    (bare,), (batch,) = plain.step(0), packed.step(0)
    assert bare.documents is None
    assert bare.positions is None
    assert batch.documents is not None
    assert batch.positions is not None
    assert (batch.documents.dtype, batch.positions.dtype) == (torch.int32, torch.int64)
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    for row, tokens in enumerate(batch.tokens.tolist()):
        assert (batch.documents[row].tolist(), batch.positions[row].tolist()) == brute_force(tokens, 257)
        unmasked = bare.labels[row].tolist()
        expected = [-100 if token == 257 else label for token, label in zip(tokens, unmasked, strict=True)]
        assert batch.labels[row].tolist() == expected
    assert torch.equal(batch.tokens, bare.tokens)
    assert int(batch.documents.max()) > 1


def test_the_example_of_the_contract(made: Corpus) -> None:
    one = batches(made, synthetic(document_masks=True), seq_len=8)
    tokens = np.array([[5, 9, 257, 7, 257, 3, 4, 257]])
    batch = one._pack(tokens, tokens.copy(), (0,), 0)
    assert batch.documents is not None
    assert batch.positions is not None
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("samples", [None, 10_000, 5])
def test_validation_rows_come_once_under_any_layout(
    made: Corpus, layout: tuple[int, int, int], samples: int | None
) -> None:
    each = [list(one.validation(samples)) for one in world(made, synthetic(), *layout)]
    assert len({len(batch_list) for batch_list in each}) == 1  # equally many forward passes on every rank
    seen = [
        (tuple(token for token, label in zip(tokens, labels, strict=True) if label != -100), labels)
        for one in each
        for batch in one
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True)
    ]
    expected = windows("validation")
    found = sorted((*tokens, [label for label in labels if label != -100][-1]) for tokens, labels in seen if tokens)
    assert sum(len(batch.samples) for one in each for batch in one) == len(found)
    if samples == 5:
        assert len(found) == 5
        assert set(found) <= set(expected)
    else:
        assert found == sorted(expected)
        assert sum(len(window) - 1 for window in found) == made.tokens("validation") - 1


def test_validation_is_the_same_each_time_for_every_seed(made: Corpus) -> None:
    first, again = (rows(list(batches(made, synthetic(), seed=seed).validation(6))) for seed in (0, 1))
    assert first == again
    more = rows(list(batches(made, synthetic()).validation(9)))
    assert first.items() <= more.items()


@pytest.mark.parametrize("split", ["validation", "train"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (3, 2, 1)], ids=str)
def test_the_rows_of_the_sources_are_all_rows(mixed: Corpus, split: str, layout: tuple[int, int, int]) -> None:
    """By source and at once the same rows, each source its share of them, and ranks have equally many batches."""
    data, together, shares = mixture({"a": 0.7, "b": 0.2, "c": 0.1}), {}, []
    for source in range(3):
        each = [list(one.fixed(split, 20, source)) for one in world(mixed, data, *layout)]
        assert len({len(of_rank) for of_rank in each}) == 1
        found = rows([batch for of_rank in each for batch in of_rank])
        assert not found.keys() & together.keys()
        together |= found
        shares.append(len(found))
    assert shares == [14, 4, 2]
    assert together == rows(list(batches(mixed, data, micro_batch=1).fixed(split, 20)))


def test_prefetch_gives_the_same_steps(made: Corpus) -> None:
    one = batches(made, synthetic(), micro_batches=2)
    fetched = [rows(step) for step in one.prefetch(16, 5)]
    assert fetched == [rows(one.step(16 + 8 * number)) for number in range(5)]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_an_error_while_prefetching_reaches_the_caller(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    one = batches(made, synthetic())
    step = one.step
    monkeypatch.setattr(one, "step", lambda at: step(at) if at < 12 else (_ for _ in ()).throw(OSError("disk gone")))
    taken = []
    with pytest.raises(OSError, match="disk gone"):
        taken.extend(one.prefetch(0, 10))
    assert len(taken) == 3
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_a_rank_with_a_gpu_gets_pinned_batches_from_its_own_gpu(made: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said with a GPU that is not there: rank 3 of a host must not open a context on GPU 0."""
    told: list[tuple[str, object]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append((threading.current_thread().name, device)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1000)
    one = batches(made, synthetic(document_masks=True))
    ((pinned,),) = one.prefetch(0, 1)
    (plain,) = one.step(0)
    assert told == [("prefetch", 3)]
    for name in ("tokens", "labels", "positions", "documents"):
        assert torch.equal(getattr(pinned, name), getattr(plain, name) + 1000)
    assert pinned.samples == plain.samples


def test_leaving_early_ends_the_thread(made: Corpus) -> None:
    fetching: Iterator[list[Batch]] = batches(made, synthetic()).prefetch(0, 1000)
    assert len(list(islice(fetching, 2))) == 2
    assert "prefetch" in {thread.name for thread in threading.enumerate()}
    fetching.close()  # type: ignore[attr-defined]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
