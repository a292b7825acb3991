"""Files beside the weights: config.json, generation_config.json, tokenizer files, a model card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.data.tokenizer import BEGIN, END, ByteTokenizer, File, StoredTokenizer, Tokenizer, TokenizerConfig
from src.data.tokenizer_files import transformers_config
from src.data.tokenizer_formats.json_form import JsonCodec
from src.errors import DataError
from src.hugging_face.check import E8M0
from src.hugging_face.origin import GENERATION, Origin
from src.hugging_face.save import Form
from src.hugging_face.write import BLOCK
from src.models.base import ModelConfig
from src.models.hugging_face import config_json

# As released tokenizers come; the folder that a run was given may have any of them.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "qwen.tiktoken"),
    *("chat_template.jinja", "chat_template.json"),
)


# What transformers writes of every model, and our models do not decide.
COMMON: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "pad_token_id": None,
    "transformers_version": "5.23.0",  # whose form of config.json this is
    "use_cache": True,
}


@dataclass(frozen=True)
class Sources:
    """Where an export finds what it passes on."""

    origin: Origin | None  # of the weights
    tokenizers: tuple[Path, ...]  # tokenizer.json or folders with one, which may have the very tokens of the run


def companions(
    config: ModelConfig, tokenizer: Tokenizer, tokenizers: TokenizerConfig, form: Form, sources: Sources
) -> dict[str, bytes]:
    """All files beside the weights but card and facts. CheckpointError where transformers has no such model.

    Tokenizer files, generation config and ids of the ends are those that came with the weights, byte for byte, if the
    tokens still are theirs.
    """
    origin = sources.origin
    folders = (*sources.tokenizers, *(() if origin is None else (origin.folder,)))
    places = (tokenizers, *(File(path=folder, bos=None, eos=None) for folder in folders))
    original = next((found for place in places if (found := _original(tokenizer, place)) is not None), None)
    same = origin is not None and original is not None and original.resolve() == origin.folder.resolve()
    legal = {} if origin is None else origin.legal()
    return {
        **legal,
        **describe(config, tokenizer, form, origin, same=same),
        **tokenizer_files(tokenizer, original, config.max_seq_len),
    }


def describe(
    config: ModelConfig, tokenizer: Tokenizer, form: Form, origin: Origin | None, *, same: bool
) -> dict[str, bytes]:
    """config.json and generation_config.json; `same`: the tokens are those of `origin`."""
    marks = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    generation = _text(marks)
    if origin is not None and same:
        ends = origin.end_ids()
        marks["eos_token_id"] = tokenizer.eos_id if ends is None else ends
        path = origin.folder / GENERATION
        generation = path.read_bytes() if path.is_file() else _text(marks)
    values = {**COMMON, **config_json(config), **({} if origin is None else origin.config()), **marks}
    values |= {"dtype": form.dtype, "torch_dtype": form.dtype}
    if form.fp8:
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            **({"scale_fmt": "ue8m0"} if form.scales == E8M0 else {}),
        }
    return {"config.json": _text(values), GENERATION: generation}


def tokenizer_files(tokenizer: Tokenizer, original: Path | None, max_seq_len: int) -> dict[str, bytes]:
    """The files of the folder `original`, which has these very tokens; None: made from what the run keeps."""
    made: dict[str, bytes] = {}
    if isinstance(tokenizer, StoredTokenizer) and not isinstance(tokenizer.codec, JsonCodec):
        codec = tokenizer.codec  # whose class transformers has to be told
        facts = transformers_config(codec, tokenizer.bos_id, tokenizer.eos_id) | {"model_max_length": max_seq_len}
        made = {codec.name: codec.content(), "tokenizer_config.json": _text(facts)}
    if original is not None:
        there = {name: original / name for name in TOKENIZER_FILES}
        return made | {name: path.read_bytes() for name, path in there.items() if path.is_file()}
    if made:
        return made
    backend = _byte_backend() if isinstance(tokenizer, ByteTokenizer) else _kept_backend(tokenizer)
    bos, eos = (None if mark is None else backend.id_to_token(mark) for mark in (tokenizer.bos_id, tokenizer.eos_id))
    if backend.post_processor is None and bos is not None and tokenizer.add_bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": backend.to_str(pretty=False).encode(), "tokenizer_config.json": _text(facts)}


def _original(tokenizer: Tokenizer, config: TokenizerConfig) -> Path | None:
    """The folder of tokenizer=file, if its tokenizer still is the very one of `tokenizer`."""
    if not isinstance(config, File) or not isinstance(tokenizer, StoredTokenizer):
        return None
    folder = config.path if config.path.is_dir() else config.path.parent
    try:
        codec, _ = config.read()
    except DataError:  # what the run keeps is not of this place
        return None
    ours = tokenizer.codec
    if not (folder / codec.name).is_file() or config.path.name not in (folder.name, codec.name):
        return None
    return folder if (codec.content(), codec.facts()) == (ours.content(), ours.facts()) else None


def _kept_backend(tokenizer: Tokenizer) -> Any:
    from tokenizers import Tokenizer as Backend

    assert isinstance(tokenizer, StoredTokenizer), "there are two kinds"
    return Backend.from_file(str(tokenizer.folder / JsonCodec.name))


def _byte_backend() -> Any:
    """tokenizer=bytes as a BPE without merges: every byte's letter has the byte as its id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The letters that byte-level BPE writes bytes with: printable ones stand for themselves.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    backend = Tokenizer(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in (BEGIN, END)])
    return backend


def card(name: str, facts: Mapping[str, Any], origin: Origin | None) -> bytes:
    """README.md of the folder, with licence and base model of the weights that the run began from."""
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {} if origin is None else origin.head()
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {name}\n\nPretrained weights, exported from a run:\n\n| | |\n|---|---|\n{rows}\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("<this folder>")\n```\n'
    ).encode()


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
