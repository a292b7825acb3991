"""Tokens in the files of other projects: read as they are, held against the tokenizer, split at documents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from src.config.groups import CONF
from src.data.config import Mixture, TokenFiles
from src.data.corpus import Corpus, check, reopen
from src.data.prepare import prepare
from src.data.sources import SyntheticSource
from src.data.token_files.config import TokenFileSource
from src.data.tokenizer import Bpe, Bytes, source_problems
from src.errors import DataError
from tests.data.corpora import KEYS, batches, corpus, synthetic
from tests.data.written_elsewhere import llm_c, megatron, nano_gpt, olmo, saved

DOCUMENTS = [[256, *(f"document {number} " * (1 + number % 3)).encode(), 257] for number in range(40)]
IDS = [token for each in DOCUMENTS for token in each]
FORMS: dict[str, Callable[[Path], Path]] = {
    "Megatron's .bin and .idx": lambda folder: megatron(folder / "text_document", DOCUMENTS),
    "Megatron's .bin and .idx (16)": lambda folder: megatron(folder / "text_document", DOCUMENTS, "uint16"),
    "llm.c's .bin": lambda folder: llm_c(folder / "edu_train_000001.bin", IDS),
    "llm.c's .bin (32)": lambda folder: llm_c(folder / "edu_train_000001.bin", IDS, 20240801, 7),
    "ids without a header": lambda folder: olmo(folder / "part-0-00000.npy", IDS),
    "ids without a header (nanoGPT)": lambda folder: nano_gpt(folder / "train.bin", IDS),
    "an array of numpy.save": lambda folder: saved(folder / "edufineweb_train_000001.npy", IDS),
    "an array of numpy.save (32)": lambda folder: saved(folder / "edufineweb_train_000001.npy", IDS, "uint32"),
}


def tokens(*files: object, **changes: Any) -> TokenFiles:
    keys = {"files": tuple(map(str, files)), "validation_files": None, "dtype": None, "validation_fraction": 0.0}
    return TokenFiles.model_validate({**KEYS, **keys, **changes})


def opened(tmp_path: Path, *files: object, **changes: Any) -> Corpus:
    return prepare(tokens(*files, **changes), Bytes(), tmp_path / "cache", progress=False)


def stream(made: Corpus, split: str) -> list[int]:
    shards = made.parts[0].shards
    return shards.read(split, 0, shards.tokens(split)).tolist()


@pytest.mark.parametrize("form", FORMS)
def test_the_ids_of_every_form_are_read_as_they_are(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path)
    made = opened(tmp_path, path)
    assert stream(made, "train") == IDS
    assert made.documents("train") == len(DOCUMENTS)
    line, note = made.preparation.lines()
    assert line.startswith(f"data: 40 documents, {len(IDS):,} tokens")
    assert f"1 of {form.partition(' (')[0]}" in note
    assert "'document 0 document 1" in note
    again = reopen(json.loads(json.dumps(made.recipe())), tmp_path / "cache")
    assert (stream(again, "train"), again.fingerprint) == (IDS, made.fingerprint)
    kept = [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]
    assert sum(each.stat().st_size for each in kept) < 4096  # nothing was copied


def test_batches_of_tokens_are_those_of_the_text_that_made_them(tmp_path: Path) -> None:
    """What this project tokenises itself and what it is given are one corpus to a run."""
    data = synthetic(validation_fraction=0.0)
    ours = corpus(data, tmp_path / "cache")
    ids = stream(ours, "train")
    made = opened(tmp_path, llm_c(tmp_path / "one.bin", ids), document_masks=True, mask_document_starts=True)
    first, second = batches(ours, data), batches(made, data)
    for mine, theirs in zip(first.step(7), second.step(7), strict=True):
        assert mine.tokens.shape == theirs.tokens.shape
    assert made.windows("train", 32) == ours.windows("train", 32)
    assert made.rows(0, "train", 32).read(5).tolist() == ours.rows(0, "train", 32).read(5).tolist()


def test_several_files_are_one_stream_in_the_order_of_their_names(tmp_path: Path) -> None:
    half = len(DOCUMENTS) // 2
    for number, part in enumerate((DOCUMENTS[:half], DOCUMENTS[half:])):
        llm_c(tmp_path / f"train_{number:06d}.bin", [token for each in part for token in each])
    for named in (tmp_path / "train_*.bin", tmp_path):
        assert stream(opened(tmp_path, named), "train") == IDS


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", "corpus"])
def test_megatrons_pair_has_three_names(tmp_path: Path, name: str) -> None:
    megatron(tmp_path / "corpus", DOCUMENTS)
    assert stream(opened(tmp_path, tmp_path / name), "train") == IDS


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.97])
def test_whole_documents_at_the_end_of_each_file_are_held_out(tmp_path: Path, fraction: float) -> None:
    made = opened(tmp_path, llm_c(tmp_path / "a.bin", IDS), validation_fraction=fraction)
    train, held = stream(made, "train"), stream(made, "validation")
    assert train + held == IDS
    assert (train[-1], held[0], held[-1]) == (257, 256, 257)
    assert abs(len(held) - fraction * len(IDS)) <= max(map(len, DOCUMENTS))
    assert (made.documents("train"), made.documents("validation")) == (train.count(257), held.count(257))


def test_files_that_are_held_out_as_a_whole(tmp_path: Path) -> None:
    llm_c(tmp_path / "edu_train_1.bin", IDS)
    llm_c(tmp_path / "edu_val_0.bin", DOCUMENTS[3])
    val = (str(tmp_path / "edu_val_*.bin"),)
    for pattern in ("edu_train_*.bin", "edu_*.bin"):  # the second has the held-out file, too
        made = opened(tmp_path, tmp_path / pattern, validation_files=val, validation_fraction=0.5)
        assert (stream(made, "train"), stream(made, "validation")) == (IDS, DOCUMENTS[3])
        assert "1 of them are held out (data.validation_files)" in made.preparation.notes[1]


def test_ids_beyond_the_vocabulary_are_told_with_file_and_tokenizer(tmp_path: Path) -> None:
    path = llm_c(tmp_path / "a.bin", [*IDS, 50256])
    told = r"a\.bin \(llm\.c's \.bin\) holds the id 50,256, and the tokenizer has 258 ids: pass tokenizer=file"
    for _ in range(2):  # the second time from memory
        with pytest.raises(DataError, match=told):
            opened(tmp_path, path)
    with pytest.raises(DataError, match="holds the id -1; ids begin at 0"):
        opened(tmp_path, megatron(tmp_path / "b", [[1, -1]]))
    with pytest.raises(DataError, match=r"or its ids are uint16: pass data\.dtype=uint16"):
        opened(tmp_path, olmo(tmp_path / "c.npy", IDS[:100]), dtype="uint32")


def test_four_bytes_without_a_header_are_asked_about(tmp_path: Path) -> None:
    path = olmo(tmp_path / "part.npy", IDS, "uint32")
    with pytest.raises(DataError, match=r"every other uint16 is 0, as in uint32; pass data\.dtype=uint32"):
        opened(tmp_path, path)
    assert stream(opened(tmp_path, path, dtype="uint32"), "train") == IDS
    with pytest.raises(DataError, match=r"data\.dtype=uint32: .* whose header says uint16; pass null"):
        opened(tmp_path, llm_c(tmp_path / "a.bin", IDS), dtype="uint32")


def broken(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    def megatron_with(name: str, at: int, content: bytes, cut: int | None = None) -> Path:
        path = megatron(tmp_path / name, DOCUMENTS)
        index = path.with_suffix(".idx")
        index.write_bytes((index.read_bytes()[:at] + content + index.read_bytes()[at + len(content) :])[:cut])
        return path

    short = megatron(tmp_path / "short", DOCUMENTS)
    short.write_bytes(short.read_bytes()[:-4])
    odd = nano_gpt(tmp_path / "odd.bin", IDS)
    odd.write_bytes(odd.read_bytes()[:-1])
    table = tmp_path / "table.npy"
    np.save(table, np.zeros((2, 3), np.uint16))
    torn = saved(tmp_path / "torn.npy", IDS)
    torn.write_bytes(torn.read_bytes()[:-2])
    return {
        "magic": (megatron_with("a", 0, b"X"), "no index of Megatron's"),
        "version": (megatron_with("b", 9, b"\2"), "version 2 of Megatron's index is not known, only 1"),
        "floats": (megatron_with("c", 17, b"\6"), "dtype code 6 is none of token ids"),
        "cut": (megatron_with("d", 0, b"", -8), "it was cut off"),
        "moved": (megatron_with("e", 34 + 4 * 40, b"\4"), "do not follow each other"),
        "short": (short, "and its index speaks of"),
        "count": (llm_c(tmp_path / "f.bin", IDS, count=3), "its header speaks of 3 ids"),
        "new": (llm_c(tmp_path / "g.bin", IDS, version=2), "version 2 of llm.c's 20240520 is not known, only 1"),
        "quiz": (llm_c(tmp_path / "h.bin", IDS, 20240522), "a multiple-choice file of llm.c"),
        "odd": (odd, "no whole number of uint16"),
        "table": (table, "ids are one row of integers"),
        "torn": (torn, "it was cut"),
        "text": (tmp_path / "text.txt", "data=text reads .txt"),
        "none": (tmp_path / "none.bin", "matches no file"),
    }


def test_every_broken_file_is_named_before_an_id_is_read(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    for name, (path, told) in broken(tmp_path).items():
        (problem,) = tokens(path).problems()
        assert told in problem, name
        assert path.stem in problem, name
    every = tokens(*(path for path, _ in broken(tmp_path).values())).problems()
    assert len(every) >= 14  # all at once


def test_a_file_that_changed_is_named_and_the_same_command_indexes_it_anew(tmp_path: Path) -> None:
    path = llm_c(tmp_path / "a.bin", IDS)
    made = opened(tmp_path, path)
    llm_c(path, [*IDS[:-1], 7])
    with pytest.raises(DataError, match=r"a\.bin: changed since"):
        made.verify()
    assert opened(tmp_path, path).fingerprint != made.fingerprint
    llm_c(path, IDS[:-1])
    on_rank = reopen(made.recipe(), tmp_path / "cache")
    with pytest.raises(DataError, match=r"bytes, not .* as when"):
        stream(on_rank, "train")
    path.unlink()
    with pytest.raises(DataError, match="missing; it is read where it lies"):
        stream(on_rank, "train")


def test_tokens_without_an_end_of_document_are_told(tmp_path: Path) -> None:
    bare = [each[1:-1] for each in DOCUMENTS]
    made = opened(tmp_path, megatron(tmp_path / "a", bare))
    assert "Megatron's counts 40 documents (--append-eod)" in made.preparation.lines()[-1]
    assert "end of document is 257" in made.preparation.lines()[-1]


def test_what_only_text_can_do_is_refused(tmp_path: Path) -> None:
    data = tokens(llm_c(tmp_path / "a.bin", IDS), hold_out="ends")
    (one, two) = source_problems(Bpe(vocab_size=300, sample_bytes=10), data)
    assert "tokenizer=bpe learns from text" in one
    assert "data.hold_out=ends cuts texts" in two
    assert source_problems(Bytes(), tokens(tmp_path / "a.bin")) == []
    with pytest.raises(ValidationError):
        tokens(tmp_path / "a.bin", dtype="int64")


def test_tokens_and_text_are_mixed(tmp_path: Path) -> None:
    """Both by their weights; the conf file of the source has all of its keys."""
    path = llm_c(tmp_path / "a.bin", IDS)
    source = TokenFileSource.model_validate({"files": (str(path),), "validation_files": None, "dtype": None})
    sources = {"mine": source, "made": SyntheticSource(documents=200, words=20, seed=0)}
    data = Mixture.model_validate({**KEYS, "sources": sources, "weights": {"mine": 0.25, "made": 0.75}})
    made = corpus(data, tmp_path / "cache")
    assert check(made, data, seq_len=16, global_batch=4, steps=2, validation_samples=2) == []
    assert made.source_tokens()["mine"] > 0.8 * len(IDS)
    assert {line.partition(":")[0] for line in (CONF / "data/source/tokens.yaml").read_text().splitlines()} >= {
        "files", "validation_files", "dtype",
    }  # fmt: skip
