"""tokenizer.json of the library `tokenizers`, and the older vocab.json with merges.txt, which become one."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from src.data.tokenizer_formats.base import Ids, Marks, TextCodec
from src.data.tokenizer_formats.hub_files import SHORT, HubFiles, read_facts
from src.data.tokenizer_formats.tiktoken_form import QWEN
from src.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"


class JsonCodec(TextCodec):
    form = "json"
    name = "tokenizer.json"

    def __init__(self, backend: "Tokenizer", *, bos: str | None = None, eos: str | None = None) -> None:
        """`bos`, `eos`: known of a backend that says nothing of them."""
        # A limit or a width for batches would cut or fill every document.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a document that spells "<|end_of_text|>" must not end itself
        self.backend = backend
        self._given = bos, eos

    @classmethod
    def stored(cls, content: bytes, facts: dict[str, Any]) -> Self:
        from tokenizers import Tokenizer

        assert not facts, "all is in the file"
        return cls(Tokenizer.from_str(content.decode()))

    def content(self) -> bytes:
        return self.backend.to_str().encode()

    def facts(self) -> dict[str, Any]:
        return {}  # all is in the file

    @cached_property
    def own(self) -> Marks:  # type: ignore[override]
        """The tokens that the backend's template puts before and after a text, if it puts one there.

        Whether a prompt begins with a token is the template's, as in transformers; none is made to end with one.
        """
        ids = self.backend.encode("a", add_special_tokens=True).ids
        inner = self.backend.encode("a", add_special_tokens=False).ids
        extra = len(ids) - len(inner)
        before = next((count for count in range(extra + 1) if ids[count : count + len(inner)] == inner), 0)
        first = self.backend.id_to_token(ids[0]) if extra and before == 1 else None
        last = self.backend.id_to_token(ids[-1]) if extra and extra - before == 1 else None
        return Marks(first or self._given[0], last or self._given[1], add_bos=first is not None, add_eos=False)

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(number) for number in ids])

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, number: int) -> str | None:
        return self.backend.id_to_token(number) if number >= 0 else None

    def special_tokens(self) -> list[str]:
        return [token.content for _, token in sorted(self.backend.get_added_tokens_decoder().items()) if token.special]

    def vocabulary(self) -> Iterable[str]:
        return self.backend.get_vocab()


def read_json_form(path: Path, files: HubFiles) -> JsonCodec:
    """A tokenizer.json, with what the files beside it declare. DataError where it is none."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise DataError(f"tokenizer.path={path}: not a tokenizer.json: {str(error)[:SHORT]}") from error
    _register(backend, files)
    return JsonCodec(backend)


def read_word_lists(words: Path, files: HubFiles) -> JsonCodec:
    """vocab.json with merges.txt beside it, or a list of whole words. DataError where the words are split in a way
    that is not known here.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary, merges, kind = _vocabulary(words), words.parent / "merges.txt", files.tokenizer_class()
    if not merges.is_file():
        _refuse_unless(kind, (None,), words)
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        _register(backend, files)
        return JsonCodec(backend)
    _refuse_unless(kind, (None, "GPT2Tokenizer", "Qwen2Tokenizer"), words)
    backend = Tokenizer(models.BPE(vocabulary, _merges(merges)))
    prefix = bool(files.tokenizer_config.get("add_prefix_space", False))
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN.pattern), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    end = END_OF_TEXT if END_OF_TEXT in vocabulary else None  # both classes' default
    _register(backend, files, *filter(None, [end]))
    return JsonCodec(backend, eos=end)


def _refuse_unless(kind: str | None, known: tuple[str | None, ...], words: Path) -> None:
    if kind not in known:
        raise DataError(f"{words}: {kind} splits words in a way that is not known here; give its tokenizer.json")


def _merges(path: Path) -> list[tuple[str, str]]:
    # Only the first line is a comment: "# #" is a merge of GPT-2.
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#version")]
    pairs = [line.split(" ") for line in lines]
    wrong = [" ".join(pair) for pair in pairs if len(pair) != 2]
    if wrong:
        raise DataError(f"{path}: a merge is two tokens and a space between, not {wrong[0][:SHORT]!r}")
    return [(left, right) for left, right in pairs]


def _vocabulary(path: Path) -> dict[str, int]:
    if path.suffix == ".txt":
        return {word: number for number, word in enumerate(path.read_text().splitlines())}
    facts = read_facts(path)
    if not isinstance(facts, dict) or not all(isinstance(number, int) for number in facts.values()):
        raise DataError(f"{path}: must map each token to its id")
    return facts


def _register(backend: "Tokenizer", files: HubFiles, *more: str) -> None:
    """Add what the files declare; an id that they fix must come out, or every embedding would be off."""
    from tokenizers import AddedToken

    for each in files.declared():
        token = AddedToken(each.content, special=each.special, normalized=False)
        (backend.add_special_tokens if each.special else backend.add_tokens)([token])
        if backend.token_to_id(each.content) != each.number:
            raise DataError(
                f"{files.folder}: declares {each.content[:SHORT]!r} with the id {each.number}, "
                f"its vocabulary gives {backend.token_to_id(each.content)}"
            )
    names = [*files.roles(), *more]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
