"""Ranks of byte-level BPE, a line each, for the library `tiktoken`: Llama 3, the first Qwen, Kimi and Moonlight.

The file has neither the pattern that splits words nor the special tokens: both are the vendor's code, so a file is read
only where it is known whose it is.
"""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from src.data.tokenizer_formats.base import Ids, Marks, TextCodec
from src.data.tokenizer_formats.hub_files import SHORT, HubFiles
from src.errors import DataError, some

if TYPE_CHECKING:
    from tiktoken import Encoding

LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
# tiktoken 0.14 overflows its stack on a million spaces, and takes 60 s for a million letters without one. Both vendors
# that cut a text do it after so many characters of either kind.
LONGEST_RUN = 25_000


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Kimi: Chinese signs apart from other letters, and a word ends where capitals begin again.
_CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_BEFORE}{_CAPITAL}*{_SMALL}+{_CONTRACTION}?|{_BEFORE}{_CAPITAL}+{_SMALL}*{_CONTRACTION}?"


@dataclass(frozen=True)
class Vendor:
    """What a vendor's code adds to its ranks."""

    name: str
    file: str
    ranks: int | None
    """Lines of the file; None: any number, since no other vendor calls a file so."""
    pattern: str
    """Of the words that BPE joins bytes within."""
    specials: tuple[str, ...]
    """Names of the first special tokens, whose ids follow the ranks."""
    reserved: str
    """Name of the others: {} counts on from the `specials` of that name, {id} is the id."""
    count: int
    """Special tokens."""
    bos: str | None
    eos: str
    add_bos: bool
    nfc: bool
    """Whether text is composed (Unicode's NFC) first."""
    longest: int | None
    """Characters after which a text is cut, whatever stands there."""


LLAMA3 = Vendor(
    name="Llama 3",
    file="tokenizer.model",
    ranks=128_000,
    pattern=rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",
    specials=(
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    ),
    reserved="<|reserved_special_token_{}|>",
    count=256,
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    add_bos=True,
    nfc=False,
    longest=400_000,
)
QWEN = Vendor(
    name="Qwen",
    file="qwen.tiktoken",
    ranks=None,
    pattern=rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_REST}",
    specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    reserved="<|extra_{}|>",
    count=208,
    bos=None,
    eos="<|endoftext|>",
    add_bos=False,
    nfc=True,
    longest=None,
)
KIMI = Vendor(
    name="Kimi",
    file="tiktoken.model",
    ranks=None,
    pattern=rf"[\p{{Han}}]+|{_CASED}|\p{{N}}{{1,3}}|{_REST}",
    specials=("[BOS]", "[EOS]"),
    reserved="<|reserved_token_{id}|>",
    count=256,
    bos="[BOS]",
    eos="[EOS]",
    add_bos=False,
    nfc=False,
    longest=400_000,
)
VENDORS = (LLAMA3, QWEN, KIMI)


class TiktokenCodec(TextCodec):
    form = "tiktoken"

    def __init__(self, content: bytes, facts: dict[str, Any]) -> None:
        """`facts`: file, pattern, nfc, longest; `special` and `found` map tokens to ids, `found` where a text has
        them.
        """
        self.name = facts["file"]
        self._content, self._facts = content, facts
        self._names: dict[int, str] = {
            number: token for token, number in {**facts["special"], **facts["found"]}.items()
        }
        self._silent = frozenset(facts["special"].values())
        self._ranks = _ranks(content, self.name)
        self.size = len(self._ranks)
        self.vocab_size = 1 + max([self.size - 1, *self._names])
        self.own = Marks(facts["bos"], facts["eos"], add_bos=facts["add_bos"], add_eos=False)

    @classmethod
    def stored(cls, content: bytes, facts: dict[str, Any]) -> Self:
        return cls(content, facts)

    def content(self) -> bytes:
        return self._content

    def facts(self) -> dict[str, Any]:
        return self._facts

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._ids(text), np.uint32) for text in texts]

    def _ids(self, text: str) -> list[int]:
        found = set(self._facts["found"])
        if self._facts["nfc"]:
            text = unicodedata.normalize("NFC", text)
        pieces = _cut(text, self._facts["longest"])
        return [
            number
            for piece in pieces
            for number in self._encoding.encode(piece, allowed_special=found, disallowed_special=())
        ]

    def decode(self, ids: Iterable[int]) -> str:
        there = (int(number) for number in ids)
        shown = [each for each in there if each not in self._silent and (each < self.size or each in self._names)]
        return self._encoding.decode(shown)

    @cached_property
    def _encoding(self) -> "Encoding":
        from tiktoken import Encoding

        specials = {**self._facts["special"], **self._facts["found"]}
        return Encoding(self.name, pat_str=self._facts["pattern"], mergeable_ranks=self._ranks, special_tokens=specials)

    def token_to_id(self, token: str) -> int | None:
        known: int | None = self._facts["special"].get(token, self._facts["found"].get(token))
        return self._ranks.get(token.encode(errors="replace")) if known is None else known

    def id_to_token(self, number: int) -> str | None:
        if number in self._names:
            return self._names[number]
        return self._texts[number] if 0 <= number < self.size else None

    def special_tokens(self) -> list[str]:
        return [self._names[number] for number in sorted(self._silent)]

    def vocabulary(self) -> Iterable[str]:
        return [*self._texts, *self._names.values()]

    @cached_property
    def _texts(self) -> list[str]:
        return [token.decode(errors="replace") for token in self._ranks]


def is_tiktoken(content: bytes) -> bool:
    return LINE.match(content) is not None


def read_tiktoken(content: bytes, name: str, files: HubFiles) -> TiktokenCodec:
    """Ranks of a known vendor, by the file's name. DataError where they are not, or are damaged."""
    ranks = len(_ranks(content, str(files.folder / name)))
    vendor = next((each for each in VENDORS if each.file == name and each.ranks in (None, ranks)), None)
    theirs = files.config.get("model_type")
    if vendor is LLAMA3 and theirs not in (None, "llama"):
        vendor = None
    if vendor is None:
        known = ", ".join(each.file + (f" of {each.ranks:,}" if each.ranks else "") for each in VENDORS)
        raise DataError(
            f"{files.folder / name}: {ranks:,} ranks of tiktoken{f' of a {theirs}' if theirs else ''}; which words it "
            f"joins is known of Llama 3, Qwen and Kimi ({known}). Pass tokenizer=file tokenizer.path=<its "
            "tokenizer.json>"
        )
    special, found = _specials(vendor, ranks, files)
    facts = {
        "file": name,
        "pattern": vendor.pattern,
        "nfc": vendor.nfc,
        "longest": vendor.longest,
        "bos": vendor.bos,
        "eos": vendor.eos,
        "add_bos": vendor.add_bos,
        "special": special,
        "found": found,
    }
    return TiktokenCodec(content, facts)


def _specials(vendor: Vendor, ranks: int, files: HubFiles) -> tuple[dict[str, int], dict[str, int]]:
    """Tokens behind the ranks, and those among them that a text may have: tokenizer_config.json's names go first."""
    declared = {each.number: each for each in files.declared()}
    if wrong := [each.content[:SHORT] for each in declared.values() if each.number < ranks]:
        raise DataError(f"{files.folder}: declares ids of the ranks in {vendor.file} anew: {some(wrong)}")
    special = {each.content: each.number for each in declared.values() if each.special}
    found = {each.content: each.number for each in declared.values() if not each.special}
    kept = len(vendor.specials)
    for place in range(vendor.count):
        if (number := ranks + place) in declared:
            continue
        name = vendor.specials[place] if place < kept else _reserved(vendor, place, number)
        # Another version of the vendor may have the name elsewhere.
        special[name if name not in special and name not in found else f"<|unnamed_{number}|>"] = number
    return special, found


def _reserved(vendor: Vendor, place: int, number: int) -> str:
    begun = sum("reserved" in name for name in vendor.specials)
    return vendor.reserved.format(place - len(vendor.specials) + begun, id=number)


def _ranks(content: bytes, shown: str) -> dict[bytes, int]:
    """Token -> rank, in the order of the ranks. DataError where a line is no token and rank, or a rank is missing."""
    found: dict[bytes, int] = {}
    for place, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{shown}, line {place}: is no token in base64 and its rank") from error
    if sorted(found.values()) != list(range(len(found))) or any(bytes([byte]) not in found for byte in range(256)):
        raise DataError(
            f"{shown}: is cut off or damaged: its {len(found):,} ranks are not 0, 1, 2 ... with all 256 bytes"
        )
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _cut(text: str, longest: int | None) -> Iterator[str]:
    """A text in pieces without a longer run than tiktoken can bear; almost always the text itself."""
    for start in range(0, len(text), longest or max(len(text), 1)):
        part = text[start : start + longest] if longest else text
        if len(part) <= LONGEST_RUN or not _runs_on(part):
            yield part
            continue
        begun = 0
        for run in re.finditer(r"\s+|\S+", part):
            for place in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield part[begun:place]
                begun = place
        yield part[begun:]


def _runs_on(text: str) -> bool:
    words = max(map(len, text.split()), default=0)
    return words > LONGEST_RUN or re.search(rf"\s{{{LONGEST_RUN + 1}}}", text) is not None
