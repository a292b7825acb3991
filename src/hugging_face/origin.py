"""Weights in Hugging Face layout that a run began from: what came with them goes out with its exports.

Files byte for byte where the tokens are the same, the keys of config.json that change no logit, licence and base model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from src.data.tokenizer import StoredTokenizer, Tokenizer
from src.hugging_face.archive import read_json
from src.hugging_face.hub import is_local
from src.hugging_face.load import begun_from
from src.models.stored import NEUTRAL

CARD = "README.md"
GENERATION = "generation_config.json"
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Of a card's head: what the next model's card must say too.
_LICENCE = ("license", "license_name", "license_link", "language")
# Neutral keys that an export says of itself.
_OWN = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map", "_name_or_path"),
        *("quantization_config", "num_nextn_predict_layers", "num_mtp_layers", "bos_token_id", "eos_token_id"),
    }
)


@dataclass(frozen=True)
class Origin:
    """A folder in Hugging Face layout, and where it came from: a hub id, or a path."""

    folder: Path
    source: str

    def config(self) -> Mapping[str, Any]:
        """The keys of its config.json that change no logit and that an export does not say of itself."""
        return {key: value for key, value in self._config_json.items() if key in NEUTRAL - _OWN}

    def end_ids(self) -> Any:
        """eos_token_id of its config.json, which may be a list; None where it says none."""
        return self._config_json.get("eos_token_id")

    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a generated text: of generation_config.json, else of config.json, as transformers has it."""
        path = self.folder / GENERATION
        said = read_json(path).get("eos_token_id") if path.is_file() else None
        said = self.end_ids() if said is None else said
        return tuple(each for each in (said if isinstance(said, list) else [said]) if type(each) is int)

    @cached_property
    def _config_json(self) -> Mapping[str, Any]:
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    def legal(self) -> dict[str, bytes]:
        """The files of its licence."""
        found = (path for pattern in LEGAL for path in sorted(self.folder.glob(pattern)))
        return {path.name: path.read_bytes() for path in found if path.is_file()}

    def head(self) -> dict[str, Any]:
        """What its card says of licence and languages, and the id of the model that this one is made of."""
        there = card_head(self.folder / CARD)
        named = there.get("base_model") if is_local(self.source) else self.source.partition("@")[0]
        return {key: there[key] for key in _LICENCE if key in there} | ({"base_model": named} if named else {})


def origin_of(folder: Path) -> Origin | None:
    """Of a run folder: where its weights came from; None where it began anew, or where that place is gone."""
    fetched = begun_from(folder)
    if fetched is None or not Path(fetched.folder).is_dir():
        return None
    return Origin(Path(fetched.folder), fetched.source)


def ends_of(tokenizer: Tokenizer, origin: Origin | None) -> frozenset[int]:
    """Ids that end a generated text: the tokenizer's end of a document and, where the weights came with several ends
    and it is one of them, the others that are special tokens of it, such as the end of a turn.
    """
    own: frozenset[int] = frozenset() if tokenizer.eos_id is None else frozenset((tokenizer.eos_id,))
    stops: tuple[int, ...] = () if origin is None else origin.stop_ids()
    if not isinstance(tokenizer, StoredTokenizer) or tokenizer.eos_id not in stops:
        return own  # of other tokens than those that the weights came with
    special = set(tokenizer.codec.special_tokens())
    return own | {each for each in stops if tokenizer.codec.id_to_token(each) in special}


def lost(folder: Path) -> list[str]:
    """A line for people where a run's weights came from a place that is gone."""
    fetched = begun_from(folder)
    if fetched is None or Path(fetched.folder).is_dir():
        return []
    return [
        f"warning: {fetched.folder} is gone, where the weights of this run came from: chat template, generation "
        "config, licence and other files of it cannot go out with them"
    ]


def card_head(path: Path) -> dict[str, Any]:
    """The YAML between two lines of three dashes at the top of a card; empty where there is none that can be read."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return {}
    try:
        found = yaml.safe_load("\n".join(_until_dashes(lines[1:])))
    except yaml.YAMLError:  # a card is for people: what it says is carried where it can be read
        return {}
    return found if isinstance(found, dict) else {}


def _until_dashes(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        if line.strip() == "---":
            return
        yield line
