"""What the small JSON files of a model's folder say of its tokenizer: marks, declared tokens, the vendor's class."""

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.tokenizer_formats.base import Marks, TextCodec
from src.errors import DataError, some

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
SHORT = 80  # characters of a name or a library's words in an error


@dataclass(frozen=True)
class Declared:
    """A token that tokenizer_config.json or added_tokens.json adds to a vocabulary."""

    number: int
    content: str
    special: bool


@dataclass(frozen=True)
class HubFiles:
    """Objects of the files in `folder`; an empty one where there is no such file."""

    folder: Path
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "HubFiles":
        """DataError where one is broken, or holds something else than an object."""
        names = ("tokenizer_config", "special_tokens_map", "added_tokens", "config", "generation_config")
        return cls(folder, **{name: _object(folder / f"{name}.json") for name in names})

    def role(self, role: str) -> str | None:
        """The token of a role, such as `eos`, by name."""
        for values in (self.tokenizer_config, self.special_tokens_map):
            if (found := content_of(values.get(f"{role}_token"))) is not None:
                return found
        return None

    def roles(self) -> list[str]:
        """Every token that has a role; all are special."""
        named = [found for role in ROLES if (found := self.role(role)) is not None]
        for values in (self.tokenizer_config, self.special_tokens_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = values.get(key)
                more = more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
                named += [found for entry in more if (found := content_of(entry)) is not None]
        return list(dict.fromkeys(named))

    def declared(self) -> list[Declared]:
        """Tokens with a fixed id, by their ids."""
        found = {}
        roles = set(self.roles())
        for content, number in self.added_tokens.items():
            if not isinstance(number, int):
                raise DataError(f"{self.folder / 'added_tokens.json'}: must map each token to its id")
            found[number] = Declared(number, content, content in roles)
        there = self.tokenizer_config.get("added_tokens_decoder", {})
        if not isinstance(there, dict):
            there = {"": there}
        for key, entry in there.items():
            if not str(key).isdecimal() or not isinstance(entry, dict) or content_of(entry) is None:
                raise DataError(
                    f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder must map ids to tokens with a "
                    f"content, not {key!r} to {str(entry)[:SHORT]!r}"
                )
            content = str(content_of(entry))
            found[int(key)] = Declared(int(key), content, bool(entry.get("special", True)) or content in roles)
        return [found[number] for number in sorted(found)]

    def tokenizer_class(self) -> str | None:
        """The vendor's class, without `Fast`, by name; None: none is named, or one that reads any file."""
        named = self.tokenizer_config.get("tokenizer_class") or self.config.get("tokenizer_class")
        if named is None and str(self.config.get("model_type", "")).startswith(("qwen2", "qwen3")):
            named = "Qwen2Tokenizer"  # transformers chooses by the model where no class is named
        name = str(named or "").removesuffix("Fast")
        return None if name in ("", "PreTrainedTokenizer", "TokenizersBackend") else name

    def ids(self, role: str) -> Iterator[int]:
        """Ids of a role in config.json and generation_config.json, which may have one, a list or none."""
        for values in (self.config, self.generation_config):
            there = values.get(f"{role}_token_id")
            yield from (each for each in (there if isinstance(there, list) else [there]) if type(each) is int)


def marks_of(codec: TextCodec, files: HubFiles, bos: str | None, eos: str | None) -> Marks:
    """Marks of a tokenizer; `bos` and `eos` were typed.

    The first that names a token: what was typed, tokenizer_config.json, special_tokens_map.json, config.json,
    generation_config.json, the tokenizer's own file. A bos_token that is null says that there is none. Ids count where
    they are special tokens: transformers writes 1 and 2 into every Llama's config.json.
    """
    special = set(codec.special_tokens())

    def found(role: str, own: str | None) -> str | None:
        named = files.role(role)
        if named is None and role == "bos" and "bos_token" in files.tokenizer_config:
            return None
        by_id = (codec.id_to_token(number) for number in files.ids(role))
        return named or next((token for token in by_id if token in special), None) or own

    marks = Marks(
        bos=_known(codec, "bos", bos) or found("bos", codec.own.bos),
        eos=_known(codec, "eos", eos) or found("eos", codec.own.eos),
        add_bos=_habit(files, "add_bos_token", default=codec.own.add_bos),
        add_eos=_habit(files, "add_eos_token", default=codec.own.add_eos),
    )
    for role, token in (("bos", marks.bos), ("eos", marks.eos)):
        if token is not None and codec.token_to_id(token) is None:
            raise DataError(f"{files.folder}: its {role}_token {token[:SHORT]!r} is not in the vocabulary")
    if marks.eos is None:
        names = some(special) or "none"
        raise DataError(
            f"{files.folder}: says no end of document; pass tokenizer.eos=... (its special tokens: {names})"
        )
    return marks


def read_facts(path: Path) -> Any:
    """Content of a JSON file. DataError when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error


def content_of(entry: object) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _object(path: Path) -> dict[str, Any]:
    content = read_facts(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, not an object")
    return content


def _habit(files: HubFiles, key: str, *, default: bool) -> bool:
    there = files.tokenizer_config.get(key)
    return default if there is None else bool(there)


def _known(codec: TextCodec, role: str, token: str | None) -> str | None:
    if token is None or codec.token_to_id(token) is not None:
        return token
    near = difflib.get_close_matches(token, list(codec.vocabulary()), 3)
    named = ", ".join(near) or some(codec.special_tokens()) or "nothing"
    raise DataError(f"tokenizer.{role}={token[:SHORT]}: not in the vocabulary; near it: {named}")
