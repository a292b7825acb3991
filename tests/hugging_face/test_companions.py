"""What came with the weights goes out with them: files byte for byte, ids of the ends, licence, base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from src.data.tokenizer import Bytes, ByteTokenizer, File
from src.hugging_face.companions import Sources, card, companions
from src.hugging_face.hub import Fetched
from src.hugging_face.load import note
from src.hugging_face.origin import card_head, ends_of, lost, origin_of
from src.hugging_face.save import Form, save
from src.hugging_face.write import held
from tests.hugging_face.foreign import MODELS, config_of, edit, saved
from tests.hugging_face.test_float8_export import Alone
from tests.hugging_face.test_import import imported, tensors

FORM = Form("bfloat16", fp8=False, biases=False, shard_bytes=10**9)
NO_DATA: Any = None
SPECIAL = ("<|begin|>", "<|end|>", "<|eom|>", "<|eot|>")
HEAD = "---\nlicense: other\nlicense_name: our-licence\nlanguage:\n- sv\n- en\nbase_model: me/older\n---\n\n# A model\n"
CONFIG = {"eos_token_id": [257, 258, 259], "initializer_range": 0.006, "pad_token_id": 258, "attention_dropout": 0.1}
BESIDE: dict[str, Any] = {
    "tokenizer_config.json": {
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": "{% for message in messages %}{{ message.content }}<|eot|>{% endfor %}",
        "added_tokens_decoder": {str(256 + place): {"content": mark} for place, mark in enumerate(SPECIAL)},
        "model_max_length": 4096,
    },
    "special_tokens_map.json": {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]},
    "generation_config.json": {"eos_token_id": [257, 258, 259], "temperature": 0.6, "top_p": 0.9, "do_sample": True},
}


def instruct(folder: Path) -> Path:
    """A llama of 300 words with all that an Instruct release has beside its weights."""
    saved("llama-bytes", folder, torch.bfloat16)
    edit(folder / "config.json", **CONFIG)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    for name, values in BESIDE.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("do no harm")
    (folder / "README.md").write_text(HEAD)
    return folder


def begun(run: Path, folder: Path, source: str) -> Any:
    run.mkdir()
    note(run, Fetched(source, str(folder), None))
    return origin_of(run)


def test_files_go_out_byte_for_byte(tmp_path: Path) -> None:
    theirs = instruct(tmp_path / "theirs")
    origin = begun(tmp_path / "run", theirs, "me/model@abc")
    tokens = File(path=theirs, bos=None, eos=None)
    opened, config = tokens.open(tmp_path / "cache", NO_DATA), config_of(theirs)
    files = companions(config, opened, tokens, FORM, Sources(origin, ()))
    same = ("tokenizer.json", *BESIDE, "chat_template.jinja", "LICENSE")
    assert {name: files[name] for name in same} == {name: (theirs / name).read_bytes() for name in same}
    values = json.loads(files["config.json"])
    assert {key: values[key] for key in CONFIG} == CONFIG
    # A later run of the kept copy alone finds the same files where its config says that they were.
    from_cache = companions(config, opened, Bytes(), FORM, Sources(origin, (theirs,)))
    assert from_cache == files
    (tmp_path / "card.md").write_bytes(card("x", {"seed": 1}, origin))
    head = card_head(tmp_path / "card.md")
    assert {key: head[key] for key in ("license", "license_name", "language", "base_model")} == {
        "license": "other",
        "license_name": "our-licence",
        "language": ["sv", "en"],
        "base_model": "me/model",
    }


def test_other_tokens_have_their_own_files(tmp_path: Path) -> None:
    """The licence stays; ends and templates of tokens that the model no longer has do not."""
    theirs = instruct(tmp_path / "theirs")
    origin = begun(tmp_path / "run", theirs, str(theirs))
    files = companions(config_of(theirs), ByteTokenizer(), Bytes(), FORM, Sources(origin, ()))
    assert files["LICENSE"] == b"do no harm"
    assert "chat_template" not in files["tokenizer_config.json"].decode()
    assert json.loads(files["config.json"])["eos_token_id"] == 257
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 256, "eos_token_id": 257}
    (tmp_path / "card.md").write_bytes(card("x", {}, origin))
    assert card_head(tmp_path / "card.md")["base_model"] == "me/older", "a folder has no id of its own"


def test_a_text_ends_at_every_end_that_came_with_the_weights(tmp_path: Path) -> None:
    """As long as the tokens are theirs: what was typed, or other tokens, have one end; 5 is a letter, no mark."""
    theirs = instruct(tmp_path / "theirs")
    origin = begun(tmp_path / "run", theirs, str(theirs))
    cache = tmp_path / "cache"
    same, typed = (File(path=theirs, bos=None, eos=eos).open(cache, NO_DATA) for eos in (None, "<|begin|>"))
    assert ends_of(same, origin) == {257, 258, 259}
    assert ends_of(typed, origin) == {256}
    assert ends_of(same, None) == {257} == ends_of(ByteTokenizer(), origin)
    edit(theirs / "generation_config.json", eos_token_id=[5, 257, 259])
    assert ends_of(same, origin_of(tmp_path / "run")) == {257, 259}
    (theirs / "generation_config.json").unlink()
    edit(theirs / "config.json", eos_token_id=[257, 258])
    assert ends_of(same, origin_of(tmp_path / "run")) == {257, 258}


def test_a_place_that_is_gone_is_told(tmp_path: Path) -> None:
    theirs = instruct(tmp_path / "theirs")
    begun(tmp_path / "run", theirs, str(theirs))
    assert lost(tmp_path / "run") == []
    theirs.rename(tmp_path / "gone")
    (line,) = lost(tmp_path / "run")
    assert line.startswith(f"warning: {theirs} is gone, where the weights of this run came from")
    assert origin_of(tmp_path / "run") is None
    assert lost(tmp_path) == []


@pytest.mark.parametrize("text", ["", "no head", "---\nopen: 1", "---\n[\n---\n", "---\n- a\n---\n"])
def test_a_card_without_a_head_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    assert card_head(tmp_path / "README.md") == {}


@pytest.mark.parametrize("name", [each for each in MODELS if each not in ("llama-bytes", "qwen3-moe-unnormalised")])
def test_config_json_has_every_key_that_transformers_writes(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path / "theirs", shard="1GB")
    config = config_of(tmp_path / "theirs")
    files = companions(config, ByteTokenizer(), Bytes(), FORM, Sources(None, ()))
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    ours = json.loads(files["config.json"])
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    written = json.loads(again.to_json_string())
    assert written.keys() - ours.keys() == set()
    assert {key: ours[key] for key in written} == written | {"architectures": ours["architectures"]}


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "deepseek-v3"])
def test_import_and_export_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    """In bfloat16, through a model of float32."""
    saved(name, tmp_path / "theirs", torch.bfloat16, shard="1GB")
    config = config_of(tmp_path / "theirs")
    parts = held(tensors(imported(tmp_path / "theirs", config)))
    draft = save(Alone(), tmp_path / "ours", parts, config, FORM, {}, lambda each: each, torch.device("cpu"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (draft, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
        assert ours[key].dtype == tensor.dtype or key.endswith("correction_bias"), key
