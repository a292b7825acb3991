"""A tokenizer of the Hugging Face layout: which file of a folder is read, and which tokens mark a document."""

from pathlib import Path
from typing import Any

from src.data.tokenizer_formats.base import Marks, TextCodec
from src.data.tokenizer_formats.hub_files import HubFiles, marks_of
from src.data.tokenizer_formats.json_form import JsonCodec, read_json_form, read_word_lists
from src.data.tokenizer_formats.sentencepiece_form import SentencePieceCodec, read_sentencepiece
from src.data.tokenizer_formats.tiktoken_form import KIMI, QWEN, TiktokenCodec, is_tiktoken, read_tiktoken
from src.errors import DataError, some

CODECS = {codec.form: codec for codec in (JsonCodec, SentencePieceCodec, TiktokenCodec)}
# Of a folder the first one that is there is read; transformers has the same order.
ORDER = ("tokenizer.json", "tokenizer.model", "tiktoken.model", "qwen.tiktoken", "vocab.json", "vocab.txt")
UNREAD = {"tekken.json": "mistral-common's own form, which is not read here"}


def read_tokenizer(path: Path, bos: str | None, eos: str | None) -> tuple[TextCodec, Marks]:
    """Tokenizer and marks of a tokenizer file or its folder. `bos` and `eos`, where given, go before what the files
    say. DataError where there is none that is read here.
    """
    codec, files = _read(path)
    marks = marks_of(codec, files, bos, eos)
    if eos is None and marks.eos is not None and codec.token_to_id(marks.eos) in codec.encode([marks.eos])[0]:
        raise DataError(
            f"{files.folder / codec.name}: takes {marks.eos!r} inside a text for the end of its document; pass "
            "tokenizer.eos=<special token>"
        )
    return codec, marks


def read_codec(path: Path) -> TextCodec:
    """The tokenizer alone, of files that may say no end of a document. DataError where there is none."""
    return _read(path)[0]


def needs_vendor_code(folder: Path) -> bool:
    """Whether transformers opens the tokenizer of a folder only with code from the hub."""
    return _of_folder(folder).name in (KIMI.file, QWEN.file)


def _read(path: Path) -> tuple[TextCodec, HubFiles]:
    file = _of_folder(path) if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"tokenizer.path={path}: no such file or folder")
    if file.name in UNREAD:
        raise DataError(f"tokenizer.path={path}: {UNREAD[file.name]}; give its tokenizer.json")
    files = HubFiles.read(file.parent)
    return _opened(file, files), files


def _of_folder(folder: Path) -> Path:
    found = next((folder / name for name in ORDER if (folder / name).is_file()), None)
    if found is not None:
        return found
    there = some(entry.name for entry in folder.iterdir()) or "nothing"
    unread = "".join(f" ({name}: {why})" for name, why in UNREAD.items() if (folder / name).is_file())
    raise DataError(
        f"tokenizer.path={folder}: needs tokenizer.json, tokenizer.model, tiktoken.model, qwen.tiktoken, or vocab.json "
        f"and merges.txt; holds {there}{unread}. Pass tokenizer=file tokenizer.path=<folder with one>, or "
        "tokenizer=bytes"
    )


def _opened(file: Path, files: HubFiles) -> TextCodec:
    if file.name in ("vocab.json", "vocab.txt"):
        return read_word_lists(file, files)
    if file.suffix == ".json":
        return read_json_form(file, files)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer.path={file}: cannot be read ({error.strerror or error})") from error
    if is_tiktoken(content):
        return read_tiktoken(content, file.name, files)
    return read_sentencepiece(content, files, str(file))


def transformers_config(codec: TextCodec, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """tokenizer_config.json for a file of sentencepiece or tiktoken that has lost the one that lay beside it."""
    special = {str(codec.token_to_id(token)): token for token in codec.special_tokens()}
    return {
        "tokenizer_class": "LlamaTokenizer" if codec.form == SentencePieceCodec.form else "PreTrainedTokenizerFast",
        "bos_token": None if bos_id is None else codec.id_to_token(bos_id),
        "eos_token": None if eos_id is None else codec.id_to_token(eos_id),
        "add_bos_token": codec.own.add_bos,
        "add_eos_token": codec.own.add_eos,
        "added_tokens_decoder": {
            number: {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for number, token in special.items()
        },
        "clean_up_tokenization_spaces": False,
    }
