"""Tokenizer files of the Hugging Face layout: the backend, and which tokens begin and end a document."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.errors import DataError, some

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class Marks:
    """The tokens that begin and end a document, and whether each is added. One token may be both; None: there is
    none.
    """

    bos: str | None
    eos: str | None
    add_bos: bool
    add_eos: bool


def read_backend(path: Path, bos: str | None, eos: str | None) -> tuple["Tokenizer", Marks]:
    """Backend and marks of a tokenizer.json or its folder. `bos` and `eos` go before tokenizer_config.json, that
    before the file's template.
    """
    folder = path if path.is_dir() else path.parent
    backend = _from_folder(path) if path.is_dir() else _from_json(path)
    config = read_facts(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if not isinstance(config, dict):
        raise DataError(f"{folder / 'tokenizer_config.json'}: holds {type(config).__name__}, not an object")
    _register(backend, config, folder)
    first, last = _template(backend)
    marks = Marks(
        bos=_known(backend, "bos", bos) or _content(config.get("bos_token")) or first,
        eos=_known(backend, "eos", eos) or _content(config.get("eos_token")) or last,
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
    )
    if marks.eos is None:
        names = ", ".join(_special_tokens(backend)) or "none"
        raise DataError(f"{path}: says no end of document; pass tokenizer.eos=... (its special tokens: {names})")
    return backend, marks


def read_facts(path: Path) -> Any:
    """Content of a JSON file. DataError when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error


def _from_json(path: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    if not path.is_file():
        raise DataError(f"tokenizer.path={path}: no such file or folder")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"tokenizer.path={path}: not a tokenizer.json: {error}") from error


def _from_folder(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json")
    words = next((folder / name for name in ("vocab.json", "vocab.txt") if (folder / name).is_file()), None)
    if words is None:
        found = some(entry.name for entry in folder.iterdir()) or "nothing"
        raise DataError(
            f"tokenizer.path={folder}: needs tokenizer.json, or vocab.json and merges.txt; holds {found}. Pass "
            "tokenizer=file tokenizer.path=<folder with one>, or tokenizer=bytes"
        )
    vocabulary = _vocabulary(words)
    if not (folder / "merges.txt").is_file():
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return backend
    lines = (folder / "merges.txt").read_text().splitlines()
    # Only the first line is a comment: "# #" is a merge of GPT-2.
    pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    wrong = [" ".join(pair) for pair in pairs if len(pair) != 2]
    if wrong:
        raise DataError(f"{folder / 'merges.txt'}: a merge is two tokens and a space between, not {wrong[0]!r}")
    backend = Tokenizer(models.BPE(vocabulary, [(left, right) for left, right in pairs]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _vocabulary(path: Path) -> dict[str, int]:
    if path.suffix == ".txt":
        return {word: number for number, word in enumerate(path.read_text().splitlines())}
    facts = read_facts(path)
    if not isinstance(facts, dict) or not all(isinstance(number, int) for number in facts.values()):
        raise DataError(f"{path}: must map each token to its id")
    return facts


def _register(backend: "Tokenizer", config: dict[str, Any], folder: Path) -> None:
    """Adds what tokenizer_config.json declares; an id that it fixes must come out, or every embedding would be off."""
    from tokenizers import AddedToken

    declared = sorted((int(number), entry) for number, entry in config.get("added_tokens_decoder", {}).items())
    for number, entry in declared:
        token = AddedToken(entry["content"], special=bool(entry.get("special", True)), normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise DataError(
                f"{folder}: tokenizer_config.json gives {token.content!r} the id {number}, "
                f"its vocabulary gives {backend.token_to_id(token.content)}"
            )
    names = [_content(config.get(f"{role}_token")) for role in ROLES]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names if name])


def _content(entry: object) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _known(backend: "Tokenizer", role: str, token: str | None) -> str | None:
    if token is None or backend.token_to_id(token) is not None:
        return token
    near = difflib.get_close_matches(token, list(backend.get_vocab()), 3) or _special_tokens(backend)
    raise DataError(f"tokenizer.{role}={token}: not in the vocabulary; near it: {', '.join(near) or 'nothing'}")


def _special_tokens(backend: "Tokenizer") -> list[str]:
    return [token.content for _, token in sorted(backend.get_added_tokens_decoder().items()) if token.special]


def _template(backend: "Tokenizer") -> tuple[str | None, str | None]:
    """The tokens that the backend itself puts before and after a text, if it puts one there."""
    ids = backend.encode("a", add_special_tokens=True).ids
    inner = backend.encode("a", add_special_tokens=False).ids
    extra = len(ids) - len(inner)
    before = next((count for count in range(extra + 1) if ids[count : count + len(inner)] == inner), 0)
    first = backend.id_to_token(ids[0]) if extra and before == 1 else None
    last = backend.id_to_token(ids[-1]) if extra and extra - before == 1 else None
    return first, last
