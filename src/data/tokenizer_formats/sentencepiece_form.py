"""tokenizer.model of the library `sentencepiece`: Llama 1 and 2, Mistral 7B, Gemma.

Ids are the library's own, as the vendors' code asks for them. Where a text begins with a space, transformers 5 leaves
out the one that goes before every text.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from src.data.tokenizer_formats.base import Ids, Marks, TextCodec
from src.data.tokenizer_formats.hub_files import SHORT, HubFiles
from src.errors import DataError, some


class SentencePieceCodec(TextCodec):
    form = "sentencepiece"
    name = "tokenizer.model"

    def __init__(self, content: bytes, added: dict[str, int]) -> None:
        """`added`: special tokens behind the model's own, by id. RuntimeError where `content` is no model."""
        from sentencepiece import SentencePieceProcessor

        self._content, self._added = content, added
        self._model = SentencePieceProcessor(model_proto=content)
        self._names = {number: token for token, number in added.items()}
        self.size = len(self._model)
        self.vocab_size = max([self.size, *(number + 1 for number in added.values())])
        bos, eos = (self._piece(number) for number in (self._model.bos_id(), self._model.eos_id()))
        self.own = Marks(bos, eos, add_bos=bos is not None, add_eos=False)

    @classmethod
    def stored(cls, content: bytes, facts: dict[str, Any]) -> Self:
        return cls(content, facts["added"])

    def content(self) -> bytes:
        return self._content

    def facts(self) -> dict[str, Any]:
        return {"added": self._added}

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        # One thread: the processes that tokenize are as many as the cores.
        return [np.array(ids, np.uint32) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        there = (int(number) for number in ids)
        return str(self._model.decode([number for number in there if number < self.size and not self._silent(number)]))

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        number = int(self._model.piece_to_id(token))  # that of the unknown piece, where there is no such piece
        return number if self._piece(number) == token else None

    def id_to_token(self, number: int) -> str | None:
        return self._names.get(number) or self._piece(number)

    def special_tokens(self) -> list[str]:
        control = [token for number in range(self.size) if self._silent(number) and (token := self._piece(number))]
        return [*control, *self._added]

    def vocabulary(self) -> Iterable[str]:
        return [*(self._model.id_to_piece(number) for number in range(self.size)), *self._added]

    def _piece(self, number: int) -> str | None:
        return str(self._model.id_to_piece(number)) if 0 <= number < self.size else None

    def _silent(self, number: int) -> bool:
        """Whether no text becomes this id."""
        return bool(self._model.is_control(number))


def read_sentencepiece(content: bytes, files: HubFiles, shown: str) -> SentencePieceCodec:
    """The model, with the special tokens that the files beside it declare. DataError where it is none, or where its
    ids would not be those of the vendor. `shown`: its path, for errors.
    """
    try:
        bare = SentencePieceCodec(content, {})
        if bare.size == 0:
            raise RuntimeError("an empty file is a model without a piece")
    except RuntimeError as error:
        raise DataError(
            f"{shown}: neither a sentencepiece model nor lines of tiktoken, a token and its rank"
        ) from error
    inside = [each for each in files.declared() if each.number < bare.size]
    for each in inside:
        if bare.id_to_token(each.number) != each.content:
            raise DataError(
                f"{files.folder}: declares {each.content[:SHORT]!r} with the id {each.number}, which is "
                f"{bare.id_to_token(each.number)!r} in {shown}"
            )
    behind = [each for each in files.declared() if each.number >= bare.size]
    if plain := [each.content for each in behind if not each.special]:
        raise DataError(
            f"{files.folder}: adds tokens that are not special ({some(plain)}); how a text is split at them is not "
            f"known without its tokenizer.json"
        )
    return SentencePieceCodec(content, {each.content: each.number for each in behind})
