"""Text to token ids and back: bytes, a tokenizer file, or a BPE trained on the corpus.

A file's own template for beginning and end of text is never used: we add both marks ourselves, so none is doubled.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from src.config.base import Config, PathField
from src.config.bounds import Count
from src.data.config import Data
from src.data.fingerprint import fingerprint, write_json
from src.data.sources import Source, divided
from src.data.tokenizer_files import CODECS, read_tokenizer
from src.data.tokenizer_formats.base import Ids, Marks, TextCodec
from src.data.tokenizer_formats.hub_files import read_facts
from src.data.tokenizer_formats.json_form import JsonCodec
from src.errors import DataError
from src.storage.atomic_write import atomic_write

if TYPE_CHECKING:
    import tokenizers

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
PADDING_IDS = 10_000  # so many that a model has beyond its tokenizer are a choice: special tokens, a round number


class Tokenizer(ABC):
    """An opened tokenizer; small to pickle."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    fingerprint: str

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of the texts without bos and eos; names of special tokens inside a text are encoded as plain text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are left out."""

    def documents(self, texts: Sequence[str]) -> list[Ids]:
        """[bos] + text + [eos] of each text. Where one token is both, it stands once, at the end."""
        bos = [] if self.bos_id in (None, self.eos_id) else [self.bos_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        head, tail = np.array(bos, np.uint32), np.array(eos, np.uint32)
        return [np.concatenate([head, ids, tail]) for ids in self.encode(texts)]

    def prompt(self, text: str, *, add_bos: bool | None = None, add_eos: bool | None = None) -> list[int]:
        """Ids of a text to continue. None: as tokenizer_config.json has it, else with bos and without eos."""
        (ids,) = self.encode([text])
        bos = [self.bos_id] if self.bos_id is not None and (self.add_bos if add_bos is None else add_bos) else []
        eos = [self.eos_id] if self.eos_id is not None and (self.add_eos if add_eos is None else add_eos) else []
        return [*bos, *ids.tolist(), *eos]


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are bytes of UTF-8, 256 begins and 257 ends a document."""

    vocab_size, bos_id, eos_id = 258, 256, 257
    add_bos, add_eos = True, False
    fingerprint = "bytes"

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.uint32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(number for number in ids if number < 256).decode(errors="replace")


@dataclass(frozen=True)
class StoredTokenizer(Tokenizer):
    """A tokenizer file and its marks.json in a folder of the cache."""

    folder: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    fingerprint: str

    @property
    def codec(self) -> TextCodec:
        """The opened file."""
        return _opened(self.folder)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        # Half of a surrogate pair is no text to any of the libraries.
        return self.codec.encode([text.encode(errors="replace").decode() for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        return self.codec.decode(ids)


@lru_cache(maxsize=4)  # a vocabulary of 128,256 takes 0.5 s to parse: once per process, not once per piece
def _opened(folder: Path) -> TextCodec:
    facts = read_facts(folder / "marks.json")
    codec = CODECS[facts.get("form", JsonCodec.form)]
    return codec.stored((folder / facts.get("file", JsonCodec.name)).read_bytes(), facts.get("facts", {}))


class TokenizerConfig(Config, ABC):
    """Base of the classes of the section `tokenizer`."""

    @abstractmethod
    def vocabulary(self) -> int:
        """Number of ids; known before any corpus is read, for the plan."""

    @abstractmethod
    def open(self, cache: Path, data: Data) -> Tokenizer:
        """The tokenizer, trained first where it needs a corpus. DataError when a file cannot be read."""


class Bytes(TokenizerConfig):
    def vocabulary(self) -> int:
        return ByteTokenizer.vocab_size

    def open(self, cache: Path, data: Data) -> Tokenizer:
        return ByteTokenizer()


class File(TokenizerConfig):
    path: PathField
    """A tokenizer.json, tokenizer.model, tiktoken.model or qwen.tiktoken, or a folder with one of them."""
    bos: str | None
    """Token that begins a document; null: as the files beside it or the file itself say."""
    eos: str | None
    """Token that ends a document; null: likewise."""

    def vocabulary(self) -> int:
        return self.read()[0].vocab_size

    def open(self, cache: Path, data: Data) -> Tokenizer:
        return keep(*self.read(), cache / "tokenizers")

    def read(self) -> tuple[TextCodec, Marks]:
        """What the path holds now. DataError where that is nothing that is read here."""
        return read_tokenizer(self.path, self.bos, self.eos)


class Kept(TokenizerConfig):
    """The tokenizer of an earlier run, in the folder where that run's cache has it."""

    path: PathField
    """Folder of the tokenizer in the cache of the earlier run."""

    def vocabulary(self) -> int:
        return open_kept(self.path).vocab_size

    def open(self, cache: Path, data: Data) -> Tokenizer:
        theirs, ours = open_kept(self.path), cache / "tokenizers" / self.path.name
        if not (ours / "marks.json").is_file():
            ours.mkdir(parents=True, exist_ok=True)
            for name in (theirs.codec.name, "marks.json"):  # marks last: they make the folder count
                atomic_write(ours / name, (theirs.folder / name).read_bytes())
        return open_kept(ours)


class Bpe(TokenizerConfig):
    """Byte-level BPE, which can encode every text. Trained without the held-out documents."""

    vocab_size: Annotated[int, Field(ge=258)]
    """Tokens of the vocabulary, the two document marks and the 256 bytes included."""
    sample_bytes: Count
    """Bytes of text to train on, taken evenly from the whole corpus."""

    def vocabulary(self) -> int:
        return self.vocab_size

    def open(self, cache: Path, data: Data) -> Tokenizer:
        sources = {name: [weight, source.fingerprint(cache)] for name, (weight, source) in data.parts().items()}
        key = fingerprint("bpe 1", self.vocab_size, self.sample_bytes, sources, *data.held_out_by)
        pointer = cache / "tokenizers" / f"trained-{key}.json"
        if not pointer.is_file():
            trained = keep(
                JsonCodec(self._train(data)), Marks(BEGIN, END, add_bos=True, add_eos=False), cache / "tokenizers"
            )
            write_json(pointer, trained.folder.name)
        return open_kept(cache / "tokenizers" / str(read_facts(pointer)))

    def _train(self, data: Data) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[BEGIN, END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(self._sample(data), trainer)
        return backend

    def _sample(self, data: Data) -> Iterator[str]:
        """Training documents, an equal number of bytes from each piece of a source, sources by their weights."""
        total = sum(weight for weight, _ in data.parts().values())
        found = 0
        for weight, source in data.parts().values():
            assert isinstance(source, Source), "source_problems says that token files have no text"
            pieces = source.pieces()
            for piece in pieces:
                budget = self.sample_bytes * weight / total / len(pieces)
                for text in source.texts(piece):
                    if budget <= 0:
                        break
                    split, trained = divided(text, data.validation_fraction, data.hold_out)[0]
                    if split == "train":
                        budget -= len(trained.encode(errors="replace"))
                        found += 1
                        yield trained
        if not found:
            where = "; ".join(source.whence() for _, source in data.parts().values())
            raise DataError(
                f"tokenizer=bpe: no training document to learn from ({where}); give text, or lower "
                "data.validation_fraction"
            )


def vocabulary_problems(tokenizer: TokenizerConfig, model_vocab_size: int) -> list[str]:
    """Why the vocabulary does not fit the model's; known before a text is read, empty when it fits."""
    try:
        needed = tokenizer.vocabulary()
    except DataError as error:
        return list(error.problems)
    if needed <= model_vocab_size:
        return []
    return [
        f"model.vocab_size={model_vocab_size} is less than the tokenizer's {needed}: ids beyond it have no embedding; "
        f"use model.vocab_size={needed} or more, or null, which follows the tokenizer"
    ]


def source_problems(tokenizer: TokenizerConfig, data: Data) -> list[str]:
    """What only text can do and is asked of tokens; known before either is read."""
    tokens = [name for name, (_, source) in data.parts().items() if not isinstance(source, Source)]
    found = []
    if tokens and isinstance(tokenizer, Bpe):
        found.append(
            f"tokenizer=bpe learns from text, and {', '.join(tokens)} holds tokens already: pass tokenizer=file "
            "tokenizer.path=<the tokenizer that made them>"
        )
    if tokens and data.hold_out == "ends":
        found.append(
            f"data.hold_out=ends cuts texts, and {', '.join(tokens)} holds tokens already: pass "
            "data.hold_out=documents, which holds out the last documents of each file, or data.validation_files"
        )
    return found


def vocabulary_warnings(tokenizer: TokenizerConfig, model_vocab_size: int) -> list[str]:
    """Where most rows of the model's embedding and head belong to no token: its own tokenizer was probably meant."""
    needed = tokenizer.vocabulary()
    unused = model_vocab_size - needed
    if unused <= max(needed, PADDING_IDS):
        return []
    return [
        f"tokenizer: {needed:,} ids under model.vocab_size={model_vocab_size}: {unused:,} rows of the embedding and "
        "of the head stand for no token and cost memory and time; pass tokenizer=bpe "
        f"tokenizer.vocab_size={model_vocab_size}, which learns so many from the text, tokenizer=file "
        "tokenizer.path=my/tokenizer.json, as a released model's, or model.vocab_size=null, which follows the tokenizer"
    ]


def keep(codec: TextCodec, marks: Marks, cache: Path) -> StoredTokenizer:
    """Write the tokenizer's file and marks.json to a folder named by their hash, so that tokens stay readable without
    the original, and are not found where anything that decides them is another.
    """
    content = codec.content()
    facts: dict[str, Any] = {
        "bos_id": None if marks.bos is None else codec.token_to_id(marks.bos),
        "eos_id": None if marks.eos is None else codec.token_to_id(marks.eos),
        "add_bos": marks.add_bos,
        "add_eos": marks.add_eos,
        "vocab_size": codec.vocab_size,
    }
    if codec.form != JsonCodec.form:  # whose folders keep the names that they had before there were others
        facts |= {"form": codec.form, "file": codec.name, "facts": codec.facts()}
    folder = cache / _named(content, facts)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "marks.json").is_file():
        atomic_write(folder / codec.name, content)
        write_json(folder / "marks.json", facts)
    return open_kept(folder)


def open_kept(folder: Path) -> StoredTokenizer:
    """Open a folder that `keep` wrote. DataError when a file has changed since."""
    facts = read_facts(folder / "marks.json")
    path = folder / (facts.get("file", JsonCodec.name) if isinstance(facts, dict) else JsonCodec.name)
    if not isinstance(facts, dict) or not path.is_file() or folder.name != _named(path.read_bytes(), facts):
        raise DataError(f"{folder}: its content is not what was written; delete the folder to make it again")
    marks = {key: facts[key] for key in ("vocab_size", "bos_id", "eos_id", "add_bos", "add_eos")}
    return StoredTokenizer(folder=folder, fingerprint=folder.name, **marks)


def _named(content: bytes, facts: dict[str, Any]) -> str:
    """Of text, or of the hash of a file that is none."""
    binary = "form" in facts
    return fingerprint(hashlib.blake2b(content).hexdigest() if binary else content.decode(errors="replace"), facts)
