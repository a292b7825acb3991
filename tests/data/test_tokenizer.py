"""Tokenizers: text comes back, documents are marked once, and a file says clearly what it lacks."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from src.data.sources import held_out
from src.data.tokenizer import Bpe, Bytes, StoredTokenizer
from src.errors import DataError
from tests.data.corpora import synthetic, texts_of
from tests.data.tokenizer_folders import TEXT, backend, folder, opened


def test_bytes_are_bytes(tmp_path: Path) -> None:
    made = Bytes().open(tmp_path, synthetic())
    (ids,) = made.documents([TEXT])
    assert ids.tolist() == [256, *TEXT.encode(), 257]
    assert made.decode(ids) == TEXT
    assert made.prompt("ab") == [256, 97, 98]
    assert Bytes().vocabulary() == made.vocab_size == 258


def test_a_lone_surrogate_does_not_stop_it(tmp_path: Path) -> None:
    assert Bytes().open(tmp_path, synthetic()).encode(["a\ud800"])[0].tolist() == [97, 63]


@pytest.mark.parametrize("template", [None, "<bos> $A", "<bos> $A <eos>"])
def test_marks_stand_once_whatever_the_backend_adds(tmp_path: Path, template: str | None) -> None:
    made = backend("<bos>", "<eos>", template=template)
    path = folder(tmp_path / "it", made, {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}})
    (ids,) = opened(path).documents(["def return"])
    bare = made.encode("def return", add_special_tokens=False).ids
    assert ids.tolist() == [0, *bare, 1]
    assert opened(path).decode(ids) == "def return"


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    path = folder(tmp_path / "it", backend("<bos>", "<eos>"), {"bos_token": "<bos>", "eos_token": "<eos>"})
    reference = PreTrainedTokenizerFast.from_pretrained(path)
    plain = TEXT.removesuffix(" <eos>")
    assert opened(path).encode([plain])[0].tolist() == reference.encode(plain, add_special_tokens=False)
    assert (opened(path).bos_id, opened(path).eos_id) == (reference.bos_token_id, reference.eos_token_id)
    assert opened(path).vocab_size == len(reference)


def test_a_document_cannot_end_itself(tmp_path: Path) -> None:
    made = opened(folder(tmp_path / "it", backend("<bos>", "<eos>"), {"eos_token": "<eos>"}))
    (ids,) = made.documents([TEXT])
    assert ids.tolist().count(made.eos_id) == 1
    assert made.decode(ids) == TEXT


def test_one_token_may_be_both_and_stands_once(tmp_path: Path) -> None:
    path = folder(tmp_path / "it", backend("<end>"), {"bos_token": "<end>", "eos_token": "<end>"})
    made = opened(path)
    assert made.bos_id == made.eos_id == 0
    (ids,) = made.documents(["def"])
    assert ids.tolist() == [*made.encode(["def"])[0], 0]
    assert made.prompt("def") == PreTrainedTokenizerFast.from_pretrained(path)("def")["input_ids"] == ids.tolist()[:-1]
    assert made.prompt("def", add_bos=True)[0] == 0


def test_the_template_of_a_bare_file_names_the_marks(tmp_path: Path) -> None:
    path = folder(tmp_path / "it", backend("<bos>", "<eos>", template="<bos> $A <eos>"))
    made = opened(path / "tokenizer.json")
    assert (made.bos_id, made.eos_id) == (0, 1)


def test_the_key_wins_and_a_misspelling_gets_an_offer(tmp_path: Path) -> None:
    path = folder(tmp_path / "it", backend("<bos>", "<eos>", "<stop>"), {"eos_token": "<eos>"})
    assert opened(path, eos="<stop>").eos_id == 2
    with pytest.raises(DataError, match=r"tokenizer\.eos=<stp>: not in the vocabulary; near it: <stop>"):
        opened(path, eos="<stp>")


def test_without_an_end_of_document_the_candidates_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pass tokenizer\.eos=\.\.\. \(its special tokens: <one>, <two>\)"):
        opened(folder(tmp_path / "it", backend("<one>", "<two>")))


def test_prompt_defaults_come_from_the_config(tmp_path: Path) -> None:
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": False, "add_eos_token": True}
    made = opened(folder(tmp_path / "it", backend("<bos>", "<eos>"), config))
    bare = made.encode(["def"])[0].tolist()
    assert made.prompt("def") == [*bare, 1]
    assert made.prompt("def", add_bos=True, add_eos=False) == [0, *bare]


def test_declared_tokens_are_registered_under_their_ids(tmp_path: Path) -> None:
    made = backend("<bos>")
    size = made.get_vocab_size()
    declared = {str(size): {"content": "<eos>", "special": True}, str(size + 1): {"content": "<pad>", "special": True}}
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "added_tokens_decoder": declared}
    read = opened(folder(tmp_path / "it", made, config))
    assert (read.eos_id, read.vocab_size) == (size, size + 2)
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<eos>", "special": True}}
    with pytest.raises(DataError, match=f"declares '<eos>' with the id {size + 5}, its vocabulary gives {size}"):
        opened(folder(tmp_path / "it", made, config))


def test_vocabulary_and_merges_make_the_same_tokenizer(tmp_path: Path) -> None:
    made = backend("<bos>", "<eos>")
    whole = opened(folder(tmp_path / "whole", made, {"eos_token": "<eos>"}))
    parts = tmp_path / "parts"
    parts.mkdir()
    content = json.loads(made.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (parts / "vocab.json").write_text(json.dumps(content["vocab"]))
    (parts / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (parts / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    read = opened(parts)
    assert read.encode([TEXT])[0].tolist() == whole.encode([TEXT])[0].tolist()
    assert read.decode(read.encode([TEXT])[0]) == TEXT


def test_a_list_of_words_is_a_tokenizer_too(tmp_path: Path) -> None:
    path = tmp_path / "words"
    path.mkdir()
    (path / "vocab.txt").write_text("[UNK]\n[END]\nred\nblue\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[END]", "unk_token": "[UNK]"}))
    assert opened(path).documents(["red green blue"])[0].tolist() == [2, 0, 3, 1]


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.md").write_text("")
    with pytest.raises(DataError, match=r"needs tokenizer\.json, .* or vocab\.json and merges\.txt; holds notes\.md"):
        opened(empty)
    with pytest.raises(DataError, match="no such file or folder"):
        opened(tmp_path / "nowhere")
    (empty / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        opened(empty)


def test_a_kept_tokenizer_that_was_changed_is_refused(tmp_path: Path) -> None:
    made = opened(folder(tmp_path / "it", backend("<eos>"), {"eos_token": "<eos>"}))
    assert isinstance(made, StoredTokenizer)
    kept = made.folder / "tokenizer.json"
    kept.write_text(kept.read_text().replace("<eos>", "<EOS>"))
    with pytest.raises(DataError, match="its content is not what was written"):
        opened(tmp_path / "it")


def test_bpe_learns_the_corpus_once(tmp_path: Path) -> None:
    data = synthetic()
    config = Bpe(vocab_size=400, sample_bytes=1_000_000)
    first = config.open(tmp_path, data)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokenizers").rglob("*")}
    again = config.open(tmp_path, data)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokenizers").rglob("*")}
    assert first == again
    assert (first.vocab_size, first.bos_id, first.eos_id) == (400, 0, 1)
    texts = texts_of(data)
    ids = first.encode(texts)
    assert [first.decode(each) for each in ids] == texts
    assert sum(map(len, ids)) < sum(map(len, texts)) / 3
    assert all(each.dtype == np.uint32 for each in ids)
    assert first.decode(first.encode([TEXT])[0]) == TEXT


def test_bpe_does_not_read_what_is_held_out(tmp_path: Path) -> None:
    data = synthetic(validation_fraction=0.5)
    sampled = list(Bpe(vocab_size=300, sample_bytes=10**9)._sample(data))
    assert sampled == [text for text in texts_of(data) if not held_out(text, 0.5)]
    short = list(Bpe(vocab_size=300, sample_bytes=1000)._sample(data))
    assert 1000 <= sum(map(len, short)) < 1000 + max(map(len, short))


def test_bpe_without_a_training_document_is_refused(tmp_path: Path) -> None:
    data = synthetic(documents=1, validation_fraction=0.999999)
    with pytest.raises(DataError, match="tokenizer=bpe: no training document"):
        Bpe(vocab_size=300, sample_bytes=1000).open(tmp_path, data)
