"""Rows of whole documents, and rows that begin with a mark: no token lost, none cut that fits, alike for any layout."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data.batches import IGNORED
from src.data.corpus import Corpus, check, reopen
from src.data.packing.best_fit import Pieces, best_fit, cut_to_fit, laid_out
from src.data.packing.rows import PackedRows
from src.data.prepare import row_problems
from src.data.tokenizer import ByteTokenizer
from src.errors import DataError
from tests.data.corpora import batches, corpus, mixture, stream, synthetic, text, texts_of

BOS, EOS = 256, 257
SEQ_LEN = 64
PACKED = {"packing": "best_fit"}
BOTH = {"packing": "best_fit", "bos_at_row_start": True}


def made(tmp_path: Path, **changes: Any) -> Corpus:
    return corpus(synthetic(**changes), tmp_path / "cache")


def rows_of_split(of: Corpus, split: str = "train", seq_len: int = SEQ_LEN) -> list[list[int]]:
    rows = of.rows(0, split, seq_len)
    return [rows.read(number).tolist() for number in range(rows.count)]


def documents(tokens: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in tokens:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return [each for each in found if each]


def drawn(seed: int, count: int, longest: int) -> tuple[Pieces, list[tuple[int, int]], bool, int]:
    """Documents that follow each other, of which some begin with a mark, cut for rows with and without marks."""
    chance = random.Random(seed)
    seq_len, marks = chance.randint(4, 40), chance.random() < 0.5
    lengths = [chance.randint(2, longest) for _ in range(count)]
    stops = np.cumsum(lengths)
    starts = stops - lengths
    begun = np.array([not marks or chance.random() < 0.5 for _ in lengths])
    ended = np.ones(count, bool)
    ended[-1] = chance.random() < 0.5
    spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
    return cut_to_fit(starts, stops, begun, ended, seq_len, marks=marks), spans, marks, seq_len


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_predicted_once_and_nothing_is_cut_that_fits(seed: int) -> None:
    pieces, spans, marks, seq_len = drawn(seed, 60, 3 * (seed + 3))
    rows = best_fit(pieces, seq_len, marks=marks)
    assert sorted(piece for row in rows for piece in row) == list(range(len(pieces.starts)))
    predicted: list[int] = []
    table = iter(laid_out(pieces, rows).tolist())
    for row in rows:
        in_front = int(marks and not pieces.begun[row[0]])
        assert in_front + sum(pieces.lengths[row]) <= seq_len + 1
        assert all(pieces.ended[row[:-1]])  # what no mark ends has nothing behind it
        for place, (start, length) in zip(range(len(row)), table):  # noqa: B905  the rest is of the next rows
            # Of a row without a mark in front, the first token has no label.
            predicted += range(start if in_front or place else start + 1, start + length)
    once = {token: predicted.count(token) for token in set(predicted)}
    firsts = {start for start, _ in spans}
    assert set(once.values()) == {1}
    assert set(range(spans[-1][1])) - once.keys() <= firsts  # only the first of a document may go without
    cut = [span for span in spans if span not in set(zip(pieces.starts, pieces.starts + pieces.lengths, strict=True))]
    assert all(stop - start > seq_len for start, stop in cut)


def naive(pieces: Pieces, seq_len: int, *, marks: bool) -> list[list[int]]:
    """The rule, said again without lists of rooms."""
    rows: list[list[int]] = []
    rooms: list[int] = []
    order = sorted(range(len(pieces.lengths)), key=lambda piece: (-pieces.lengths[piece], piece))
    for piece in order:
        length = int(pieces.lengths[piece])
        enough = [room for room in rooms if room >= length]
        if enough:
            row = max(at for at, room in enumerate(rooms) if room == min(enough))
        else:
            row = len(rows)
            rows.append([])
            rooms.append(seq_len + 1 - int(marks and not pieces.begun[piece]))
        rows[row].append(piece)
        rooms[row] = rooms[row] - length if pieces.ended[piece] and rooms[row] - length > 1 else 0
    return rows


@pytest.mark.parametrize("seed", range(10))
def test_each_goes_where_the_least_room_is_left(seed: int) -> None:
    pieces, _, marks, seq_len = drawn(100 + seed, 80, 20)
    ours, theirs = best_fit(pieces, seq_len, marks=marks), naive(pieces, seq_len, marks=marks)

    def left(rows: list[list[int]]) -> list[int]:
        rooms = [seq_len + 1 - int(marks and not pieces.begun[row[0]]) for row in rows]
        return sorted(room - int(sum(pieces.lengths[row])) for room, row in zip(rooms, rows, strict=True))

    assert left(ours) == left(theirs)


def test_packed_rows_hold_the_documents_of_the_text(tmp_path: Path) -> None:
    of = made(tmp_path, **PACKED)
    wanted = documents(stream(texts_of(synthetic()), "train", 0.1))
    rows = rows_of_split(of)
    found = [each for row in rows for each in documents(row)]
    short = [each for each in wanted if len(each) <= SEQ_LEN + 1]
    assert 0.1 * len(wanted) < len(short) < len(wanted)  # of both kinds
    whole = [each for each in found if each[0] == BOS and each[-1] == EOS]
    assert sorted(whole) == sorted(short)
    (note,) = of.notes(SEQ_LEN)
    share = 100 * (1 - len(short) / len(wanted))
    assert f"data: synthetic: {len(rows):,} rows of 64 by best fit: {share:.1f} % of {len(wanted)} documents" in note
    padding = 1 - sum(len(row) - 1 for row in rows) / (SEQ_LEN * len(rows))
    assert f"{100 * padding:.2f} % is padding" in note
    assert padding < 0.1
    assert made(tmp_path).notes(SEQ_LEN) == []


def test_concatenation_cuts_as_many_as_is_said(tmp_path: Path) -> None:
    of, plain = made(tmp_path, **PACKED), made(tmp_path)
    rows = of.rows(0, "train", SEQ_LEN)
    assert isinstance(rows, PackedRows)
    tokens, at, cut = stream(texts_of(synthetic()), "train", 0.1), 0, 0
    windows = [plain.rows(0, "train", SEQ_LEN).read(0).tolist()]
    assert windows[0] == tokens[: SEQ_LEN + 1]
    for each in documents(tokens):
        inside = any(first <= at and at + len(each) <= first + SEQ_LEN + 1 for first in range(0, at + 1, SEQ_LEN))
        at, cut = at + len(each), cut + (not inside)
    assert rows.facts.cut_by_windows == cut > rows.facts.cut


@pytest.mark.parametrize("rules", [{"bos_at_row_start": True}, BOTH], ids=["windows", "packed"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_row_begins_with_a_mark_and_has_no_two_of_them(tmp_path: Path, rules: dict[str, Any], split: str) -> None:
    of = made(tmp_path, **rules)
    rows = rows_of_split(of, split)
    assert all(row[0] == BOS and row[1] != BOS and len(row) <= SEQ_LEN + 1 for row in rows)
    tokens = stream(texts_of(synthetic()), split, 0.1)
    text_of_rows = sorted(token for row in rows for token in row if token < 256)
    text_of_stream = sorted(token for token in tokens if token < 256)
    assert len(text_of_stream) - len(text_of_rows) < (SEQ_LEN if split == "train" and rules != BOTH else 1) + len(rows)


@pytest.mark.parametrize("rules", [PACKED, {"bos_at_row_start": True}, BOTH], ids=["packed", "marks", "both"])
@pytest.mark.parametrize("layout", [(1, 4, 3), (3, 4, 1), (12, 1, 1)])
def test_the_order_is_a_function_of_seed_and_number(
    tmp_path: Path, rules: dict[str, Any], layout: tuple[int, int, int]
) -> None:
    data = mixture({"a": 0.7, "b": 0.3}, **rules)
    of = corpus(data, tmp_path / "cache")
    again = reopen(json.loads(json.dumps(of.recipe())), tmp_path / "cache")
    (whole,) = batches(of, data, micro_batch=12, seq_len=SEQ_LEN).step(24)
    ranks, micro_batch, micro_batches = layout
    shape = {"ranks": ranks, "micro_batch": micro_batch, "micro_batches": micro_batches, "seq_len": SEQ_LEN}
    found = {}
    for rank in range(ranks):
        for batch in batches(again, data, rank=rank, **shape).step(24):
            found |= {sample: (batch.tokens[row], batch.labels[row]) for row, sample in enumerate(batch.samples)}
    assert sorted(found) == list(whole.samples)
    for row, sample in enumerate(whole.samples):
        assert found[sample][0].tolist() == whole.tokens[row].tolist()
        assert found[sample][1].tolist() == whole.labels[row].tolist()
    plain = corpus(mixture({"a": 0.7, "b": 0.3}), tmp_path / "cache")
    first, second, other = (batches(each, data, seq_len=SEQ_LEN).digest(24) for each in (of, again, plain))
    assert first == second != other


def test_padding_has_no_label_and_masks_keep_documents_apart(tmp_path: Path) -> None:
    data = synthetic(document_masks=True, mask_document_starts=True, **BOTH)
    of = corpus(data, tmp_path / "cache")
    rows = of.rows(0, "train", SEQ_LEN)
    for batch in batches(of, data, seq_len=SEQ_LEN).step(0):
        assert batch.documents is not None
        for tokens, labels, within in zip(
            batch.tokens.tolist(), batch.labels.tolist(), batch.documents.tolist(), strict=True
        ):
            every = map(rows.read, range(rows.count))
            row = next(each for each in every if each[:-1].tolist() == tokens[: len(each) - 1])
            assert labels[len(row) - 1 :] == [IGNORED] * (SEQ_LEN - len(row) + 1)
            assert within == [sum(token == EOS for token in tokens[:at]) for at in range(SEQ_LEN)]


def test_one_mark_for_both_ends_nothing_where_it_begins_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's way: documents end with <|endoftext|>, and nothing begins them."""
    monkeypatch.setattr(ByteTokenizer, "bos_id", EOS)
    data = synthetic(document_masks=True, mask_document_starts=True, **BOTH)
    of = corpus(data, tmp_path / "cache")
    assert {row[0] for row in rows_of_split(of)} == {EOS}
    (batch,) = batches(of, data, seq_len=SEQ_LEN).step(0)
    assert batch.documents is not None
    assert batch.documents[:, 1].tolist() == [0] * len(batch.tokens)
    assert all(label != IGNORED for label in batch.labels[:, 0].tolist())


def test_rows_are_packed_once_and_named_when_they_are_broken(tmp_path: Path) -> None:
    of = made(tmp_path, **PACKED)
    before = rows_of_split(of)
    folder = of.parts[0].shards.folder / "rows/train-64-257"
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert sorted(stamps) == ["pieces.bin", "rows.json", "stops.bin"]
    assert rows_of_split(made(tmp_path, **PACKED)) == before
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "stops.bin").write_bytes((folder / "stops.bin").read_bytes()[:-8])
    with pytest.raises(DataError, match=r"stops\.bin: missing or cut off; delete"):
        rows_of_split(made(tmp_path, **PACKED))


def test_marks_that_a_tokenizer_has_not_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "eos_id", None)
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    assert row_problems(ByteTokenizer(), synthetic()) == []
    with pytest.raises(DataError, match=r"best_fit needs .* tokenizer\.eos\n.*bos_at_row_start=true needs"):
        made(tmp_path, **BOTH)


def test_a_corpus_of_one_document_is_packed_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 500)
    data = text(tmp_path / "a.txt", validation_fraction=0.0, **PACKED)
    of = corpus(data, tmp_path / "cache")
    assert of.windows("train", SEQ_LEN) == -(-501 // SEQ_LEN)
    assert of.windows("validation", SEQ_LEN) == 0
    assert check(of, data, seq_len=SEQ_LEN, global_batch=2, steps=3) == []
