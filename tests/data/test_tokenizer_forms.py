"""Files of sentencepiece and tiktoken: the ids of the library, of transformers and of the vendor's rules."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import models
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from src.data.tokenizer import Kept, StoredTokenizer, open_kept
from src.data.tokenizer_formats.tiktoken_form import LONGEST_RUN
from src.errors import DataError
from src.hugging_face.companions import tokenizer_files
from src.tasks.export.self_check import tokenizer_problems
from tests.data.corpora import synthetic
from tests.data.tokenizer_folders import mixed_lines, opened, ranks_file, sentencepiece_model, split_by, trained_ranks

LLAMA3_RANKS = 128_000
# Kimi's rule with a look ahead in the place of the class without Chinese signs.
_NOT_HAN = r"(?!\p{Han})"
_CAPITAL, _SMALL = (
    rf"(?:{_NOT_HAN}[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}])",
    rf"(?:{_NOT_HAN}[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}])",
)
_SHORT = "(?:'[sStTmMdD]|'[rR][eE]|'[vV][eE]|'[lL][lL])"
KIMI = "|".join(
    (
        r"\p{Han}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}*{_SMALL}+{_SHORT}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITAL}+{_SMALL}*{_SHORT}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@cache
def lines() -> list[str]:
    return mixed_lines()


@cache
def ranks() -> Any:
    return trained_ranks(lines())


def bpe() -> models.BPE:
    """The ranks as transformers converts them: a word that is a token is that token, whatever its merges."""
    content = json.loads(ranks().to_str())["model"]
    return models.BPE(content["vocab"], [tuple(pair) for pair in content["merges"]], ignore_merges=True)


def stored(path: Path, name: str, content: bytes, **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    for other, values in files.items():
        (path / f"{other}.json").write_text(json.dumps(values))
    return path


def test_llama3_ranks_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    made = opened(stored(tmp_path / "it", "tokenizer.model", ranks_file(ranks(), LLAMA3_RANKS)))
    reference = split_by(TikTokenConverter().pattern, bpe())
    assert [ids.tolist() for ids in made.encode(lines())] == [one.ids for one in reference.encode_batch(lines())]
    assert (made.vocab_size, made.bos_id, made.eos_id) == (128_256, 128_000, 128_001)
    assert made.prompt("Hi") == [128_000, *made.encode(["Hi"])[0]]
    assert [made.decode(ids) for ids in made.documents(lines()[:50])] == lines()[:50]
    assert opened(tmp_path / "it", eos="<|eot_id|>").eos_id == 128_009
    # The last of 256, by Meta's count of those that have no use.
    assert opened(tmp_path / "it", eos="<|reserved_special_token_245|>").eos_id == 128_255


def test_qwen_ranks_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    made = opened(stored(tmp_path / "it", "qwen.tiktoken", ranks_file(ranks())))
    content = json.loads(ranks().to_str())["model"]
    pairs = [tuple(pair) for pair in content["merges"]]
    reference: Any = Qwen2Tokenizer(vocab=content["vocab"], merges=pairs)
    reference._tokenizer.model.ignore_merges = True
    theirs = reference(lines(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [ids.tolist() for ids in made.encode(lines())] == theirs
    size = len(content["vocab"])
    assert (made.vocab_size, made.bos_id, made.eos_id) == (size + 208, None, size)
    assert made.prompt("Hi") == made.encode(["Hi"])[0].tolist()


def test_kimi_ranks_are_read_by_its_rule(tmp_path: Path) -> None:
    size = ranks().get_vocab_size()
    declared = {
        str(size + place): {"content": content, "special": special}
        for place, content, special in (
            (0, "[BOS]", True),
            (1, "[EOS]", True),
            (2, "<|im_end|>", True),
            (9, "<tool>", False),
        )
    }
    config = {"bos_token": "[BOS]", "eos_token": "<|im_end|>", "added_tokens_decoder": declared}
    made = opened(stored(tmp_path / "it", "tiktoken.model", ranks_file(ranks()), tokenizer_config=config))
    reference = split_by(KIMI, bpe())
    assert [ids.tolist() for ids in made.encode(lines())] == [one.ids for one in reference.encode_batch(lines())]
    assert (made.vocab_size, made.bos_id, made.eos_id) == (size + 256, size, size + 2)
    assert made.prompt("Hi<tool>")[-1] == size + 9, "a token that is not special stands for itself"
    assert made.decode([size, *made.prompt("Hi<tool>"), size + 2, size + 255, 10**6]) == "Hi<tool>"


def test_a_text_without_a_break_is_cut_as_the_vendors_cut_it(tmp_path: Path) -> None:
    """tiktoken overflows its stack on a million blanks."""
    made = opened(stored(tmp_path / "it", "tiktoken.model", ranks_file(ranks())))
    run = LONGEST_RUN
    text = "b " + "あ" * (run + 7) + " c" + " " * (run + 5) + "d"
    pieces = ["b " + "あ" * run, "あ" * 7 + " c" + " " * run, " " * 5 + "d"]
    assert made.encode([text])[0].tolist() == [number for piece in made.encode(pieces) for number in piece.tolist()]
    assert made.decode(made.encode([" " * 1_000_000])[0]) == " " * 1_000_000


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("tokenizer.model", {}, "1,500 ranks of tiktoken; which words it joins is known of Llama 3, Qwen and Kimi"),
        ("other.tiktoken", {}, "1,500 ranks of tiktoken; which words"),
        ("qwen.tiktoken", {"added_tokens": {"<new>": 5}}, "declares ids of the ranks in qwen.tiktoken anew: <new>"),
    ],
)
def test_ranks_of_nobody_known_are_refused(tmp_path: Path, name: str, files: dict[str, Any], said: str) -> None:
    path = stored(tmp_path / "it", name, ranks_file(ranks()), **files)
    with pytest.raises(DataError, match=said.replace(".", r"\.")):
        opened(path / name)


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    """GLM-4's file has the name and the form of Llama 3's."""
    content = ranks_file(ranks(), LLAMA3_RANKS)
    path = stored(tmp_path / "it", "tokenizer.model", content, config={"model_type": "chatglm"})
    with pytest.raises(DataError, match="128,000 ranks of tiktoken of a chatglm; which words it joins is known of"):
        opened(path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-300] + b"\n", "is no token in base64 and its rank|ranks are not 0, 1, 2"),
        (lambda content: content.split(b"\n", 1)[1], "its 1,499 ranks are not 0, 1, 2 ... with all 256 bytes"),
        (lambda content: content.replace(b" 7\n", b" seven\n", 1), "line 8: is no token in base64 and its rank"),
        (lambda _: b"IQ==", "neither a sentencepiece model nor lines of tiktoken"),
        (lambda _: b"", "neither a sentencepiece model nor lines of tiktoken"),
    ],
)
def test_damaged_ranks_are_refused(tmp_path: Path, damage: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        opened(stored(tmp_path / "it", "qwen.tiktoken", damage(ranks_file(ranks()))))


def test_sentencepiece_ids_are_the_library_s(tmp_path: Path) -> None:
    content = sentencepiece_model(lines()[:300], user_defined_symbols=["<tab>"])
    # add_bos_token: transformers 5 needs to be told; Meta's code begins every prompt with one.
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **names}
    path = stored(tmp_path / "it", "tokenizer.model", content, tokenizer_config=config, added_tokens={"<pad>": 1500})
    made, library = opened(path), SentencePieceProcessor(model_proto=content)
    assert [ids.tolist() for ids in made.encode(lines())] == library.encode(lines())
    assert (made.vocab_size, made.bos_id, made.eos_id) == (1501, 1, 2)
    assert made.decode([1, *library.encode("a <tab> 🙂"), 2, 1500, 9999]) == "a <tab> 🙂"
    reference: Any = AutoTokenizer.from_pretrained(path)
    plain = ["def return naïve", "HTTPServer ABCdef", "Привет, как дела?", "中文字符和English混合 text"]
    assert [made.prompt(text) for text in plain] == reference(plain)["input_ids"]
    assert made.prompt("  def") != reference("  def")["input_ids"], "the library puts one more space before a text"
    assert tokenizer_problems(path, made, "  def") == [], "which is no fault of an export"
    (document,) = made.documents(["<s> a </s>"])
    assert [document.tolist().count(mark) for mark in (1, 2)] == [1, 1], "a text cannot end itself"


def test_sentencepiece_with_tokens_that_change_texts_is_refused(tmp_path: Path) -> None:
    content = sentencepiece_model(lines()[:300])
    path = stored(tmp_path / "it", "tokenizer.model", content, added_tokens={"<call>": 1500, "<back>": 1501})
    with pytest.raises(DataError, match=r"adds tokens that are not special \(<back>, <call>\)"):
        opened(path)
    (path / "added_tokens.json").write_text('{"<s>": 5}')
    with pytest.raises(DataError, match="declares '<s>' with the id 5, which is '<0x02>'"):
        opened(path)
    ending = sentencepiece_model(lines()[:300], user_defined_symbols=["<end>"])
    path = stored(tmp_path / "other", "tokenizer.model", ending, tokenizer_config={"eos_token": "<end>"})
    with pytest.raises(DataError, match="takes '<end>' inside a text for the end of its document"):
        opened(path)


def test_files_of_other_forms_are_kept_and_handed_on(tmp_path: Path) -> None:
    """In the cache, in that of another root, and in an export with and without the original."""
    content = sentencepiece_model(lines()[:300])
    path = stored(tmp_path / "it", "tokenizer.model", content, special_tokens_map={"eos_token": "</s>"})
    made = opened(path)
    assert isinstance(made, StoredTokenizer)
    theirs = Kept(path=made.folder).open(tmp_path / "another", synthetic())
    assert isinstance(theirs, StoredTokenizer)
    assert theirs.fingerprint == made.fingerprint
    assert theirs.encode(["def"])[0].tolist() == made.encode(["def"])[0].tolist()
    names = ("tokenizer.model", "special_tokens_map.json")
    written = tokenizer_files(made, path, 64)
    assert {name: written.pop(name) for name in names} == {name: (path / name).read_bytes() for name in names}
    assert [*written] == ["tokenizer_config.json"], "which transformers needs to know the class"
    written = tokenizer_files(made, None, 64)
    again = tmp_path / "again"
    again.mkdir()
    for name, text in written.items():
        (again / name).write_bytes(text)
    assert opened(again).encode(["def naïve"])[0].tolist() == made.encode(["def naïve"])[0].tolist()
    assert opened(again).prompt("a") == made.prompt("a")
    (made.folder / "tokenizer.model").write_bytes(content[:-1])
    with pytest.raises(DataError, match="its content is not what was written"):
        open_kept(made.folder)
