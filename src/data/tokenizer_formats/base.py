"""An opened tokenizer file of any form, and the tokens that begin and end a document."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]


@dataclass(frozen=True)
class Marks:
    """The tokens that begin and end a document, and whether each is added to a prompt. One token may be both; None:
    there is none.
    """

    bos: str | None
    eos: str | None
    add_bos: bool
    add_eos: bool


class TextCodec(ABC):
    """Ids of texts and back. Names of special tokens inside a text are plain text; other added tokens are found."""

    form: ClassVar[str]
    name: str
    """Of the file on the hub."""
    vocab_size: int
    """The largest id + 1, since a vocabulary may have holes."""
    own: Marks
    """What the file says by itself, or the vendor's code where the file says nothing."""

    @classmethod
    @abstractmethod
    def stored(cls, content: bytes, facts: dict[str, Any]) -> Self:
        """The codec of which `content()` and `facts()` were kept."""

    @abstractmethod
    def content(self) -> bytes:
        """The file, as it is stored and read again."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """JSON of all beside `content` that decides an id."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of the texts, without marks."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens and without ids that there are not."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...

    @abstractmethod
    def id_to_token(self, number: int) -> str | None: ...

    @abstractmethod
    def special_tokens(self) -> list[str]:
        """By their ids."""

    @abstractmethod
    def vocabulary(self) -> Iterable[str]:
        """All tokens that have a name, to find one that was misspelt."""
