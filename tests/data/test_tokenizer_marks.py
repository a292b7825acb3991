"""What begins and ends a document, by every file that may say so; and what a tokenizer.json may not do to a text."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from src.data.fingerprint import fingerprint
from src.data.prepare import prepare
from src.data.tokenizer import File
from src.errors import DataError
from tests.data.corpora import synthetic
from tests.data.tokenizer_folders import TEXT, backend, folder, mixed_lines, opened

NAMES = ("<a>", "<b>", "<c>")  # ids 0, 1, 2


@pytest.mark.parametrize(
    ("files", "marks"),
    [
        ({"tokenizer_config": {"bos_token": "<a>", "eos_token": "<b>"}}, (0, 1)),
        ({"special_tokens_map": {"bos_token": {"content": "<a>"}, "eos_token": "<b>"}}, (0, 1)),
        ({"config": {"bos_token_id": 0, "eos_token_id": 1}}, (0, 1)),
        ({"config": {"eos_token_id": [2, 1]}}, (None, 2)),
        ({"generation_config": {"bos_token_id": 0, "eos_token_id": [1]}}, (0, 1)),
        # The first of them that names one.
        ({"tokenizer_config": {"eos_token": "<b>"}, "special_tokens_map": {"eos_token": "<c>"}}, (None, 1)),
        ({"special_tokens_map": {"eos_token": "<b>"}, "config": {"eos_token_id": 2}}, (None, 1)),
        ({"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": 2}}, (None, 1)),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 1}}, (None, 1)),
        # Null is a word of tokenizer_config.json; 70 and 10^6 are a letter and nothing, true and "1" no ids.
        ({"tokenizer_config": {"bos_token": None, "eos_token": "<b>"}, "config": {"bos_token_id": 0}}, (None, 1)),
        ({"config": {"bos_token_id": 70, "eos_token_id": 10**6}, "generation_config": {"eos_token_id": 1}}, (None, 1)),
        ({"config": {"bos_token_id": "1", "eos_token_id": [True, -1, 2]}}, (None, 2)),
    ],
)
def test_marks_are_looked_for_wherever_the_hub_has_them(
    tmp_path: Path, files: dict[str, Any], marks: tuple[int | None, int]
) -> None:
    made = opened(folder(tmp_path / "it", backend(*NAMES), **files))
    assert (made.bos_id, made.eos_id) == marks


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"special_tokens_map": []}, "special_tokens_map.json: holds list, not an object"),
        ({"config": "x"}, "config.json: holds str, not an object"),
        ({"added_tokens": {"<x>": "y"}}, "added_tokens.json: must map each token to its id"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder must map ids to tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "must map ids to tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": {"7": "y"}}}, "must map ids to tokens"),
    ],
)
def test_malformed_files_are_one_line(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as told:
        opened(folder(tmp_path / "it", backend(*NAMES), **content))
    (line,) = told.value.problems
    assert said in line
    assert len(line) < 400


def test_a_vocabulary_of_special_tokens_is_refused_in_a_short_line(tmp_path: Path) -> None:
    made = folder(tmp_path / "it", backend(*(f"<|reserved_{number}|>" for number in range(256))))
    for typed in (None, "nothing like it"):
        with pytest.raises(DataError) as told:
            opened(made, eos=typed)
        (line,) = told.value.problems
        assert "and 250 more" in line
        assert len(line) < 400


@pytest.mark.parametrize("template", [None, "<a> $A"])
@pytest.mark.parametrize("config", [{"bos_token": "<a>", "eos_token": "<b>"}, {"bos_token": "<b>", "eos_token": "<b>"}])
def test_a_prompt_begins_as_in_transformers(tmp_path: Path, template: str | None, config: dict[str, Any]) -> None:
    """With a bos where the template puts one, not where one is only named, as in GPT-2's files."""
    path = folder(tmp_path / "it", backend(*NAMES, template=template), config)
    if template and config["bos_token"] == "<b>":
        config["bos_token"] = "<a>"
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    assert opened(path).prompt("def return") == theirs("def return")["input_ids"]


def test_limits_for_batches_neither_cut_nor_fill_a_document(tmp_path: Path) -> None:
    made = backend(*NAMES, template="$A <b>")
    plain = opened(folder(tmp_path / "plain", made, {"bos_token": "<a>"}))
    (expected,) = plain.documents([TEXT * 50])
    for limits in ("truncation", "padding", "both"):
        if limits != "padding":
            made.enable_truncation(64)
        if limits != "truncation":
            made.enable_padding(pad_id=2, pad_token="<c>", length=5000)
        else:
            made.no_padding()
        limited = opened(folder(tmp_path / limits, made, {"bos_token": "<a>"}))
        assert limited.documents([TEXT * 50])[0].tolist() == expected.tolist()
        assert (limited.bos_id, limited.eos_id) == (0, 1)
        assert limited.fingerprint == plain.fingerprint
        # Shards that were made with the limits lie under another name.
        facts = {"bos_id": 0, "eos_id": 1, "add_bos": True, "add_eos": False, "vocab_size": plain.vocab_size}
        assert fingerprint(made.to_str(), facts) != limited.fingerprint
        made.no_truncation()


def test_tokens_of_other_rules_are_not_found_again(tmp_path: Path) -> None:
    """The cache's folders change with the marks, and with what a text is split by."""
    path, data = folder(tmp_path / "it", backend(*NAMES), {"eos_token": "<b>"}), synthetic(documents=20)
    first = prepare(data, File(path=path, bos=None, eos=None), tmp_path / "cache", progress=False)
    other = prepare(data, File(path=path, bos=None, eos="<c>"), tmp_path / "cache", progress=False)
    (path / "added_tokens.json").write_text(json.dumps({"<new>": first.vocab_size}))
    more = prepare(data, File(path=path, bos=None, eos=None), tmp_path / "cache", progress=False)
    assert len({corpus.parts[0].shards.folder for corpus in (first, other, more)}) == 3
    assert not any(corpus.preparation.cached for corpus in (first, other, more))
    assert prepare(data, File(path=path, bos=None, eos=None), tmp_path / "cache", progress=False).preparation.cached


def test_word_lists_are_split_as_the_class_splits_them(tmp_path: Path) -> None:
    content = json.loads(backend("<|endoftext|>").to_str())["model"]
    pairs = [tuple(merge) for merge in content["merges"]]
    path = tmp_path / "it"
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, pairs)) + "\n")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    reference: Any = Qwen2Tokenizer(vocab=content["vocab"], merges=pairs)
    lines = [line.replace("<|endoftext|>", "") for line in mixed_lines(300)]
    assert [ids.tolist() for ids in opened(path).encode(lines)] == reference(lines)["input_ids"]
    assert opened(path).eos_id == 0
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CodeGenTokenizer"}))
    with pytest.raises(DataError, match=r"vocab\.json: CodeGenTokenizer splits words in a way that is not known here"):
        opened(path)


@pytest.mark.parametrize("name", ["tekken.json", "nothing.txt"])
def test_a_form_that_is_not_read_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"config": {}, "vocab": []}')
    with pytest.raises(DataError, match=rf"holds {name}.*or tokenizer=bytes"):
        opened(tmp_path)
    if name == "tekken.json":
        with pytest.raises(DataError, match=r"is not read here; give its tokenizer\.json"):
            opened(tmp_path / name)


def test_half_a_surrogate_pair_does_not_stop_it(tmp_path: Path) -> None:
    made = opened(folder(tmp_path / "it", backend(*NAMES), {"eos_token": "<b>"}))
    assert made.encode(["a\ud800"])[0].tolist() == made.encode(["a?"])[0].tolist()
