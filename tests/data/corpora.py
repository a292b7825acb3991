"""Small corpora, and what they should become, said again in plain Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.data.batches import Batches
from src.data.config import Data, Mixture, Synthetic, Text
from src.data.corpus import Corpus
from src.data.prepare import prepare
from src.data.sources import Source, SyntheticSource, TextSource, held_out
from src.data.tokenizer import Bytes

KEYS: dict[str, Any] = {
    "validation_fraction": 0.1,
    "hold_out": "documents",
    "packing": "concatenate",
    "bos_at_row_start": False,
    "mask_document_starts": False,
    "document_masks": False,
    "max_epochs": None,
    "processes": 1,
}


def text(*files: object, **changes: Any) -> Text:
    return Text.model_validate(
        {**KEYS, "files": tuple(map(str, files)), "field": "text", "separator": None, "bad_rows": "refuse", **changes},
        strict=True,
    )


def synthetic(documents: int = 300, words: int = 20, **changes: Any) -> Synthetic:
    return Synthetic.model_validate({**KEYS, "documents": documents, "words": words, "seed": 0, **changes})


def mixture(weights: dict[str, float], **changes: Any) -> Mixture:
    """Languages of the same words and other seeds, so that no two sources share a text."""
    sources = {name: SyntheticSource(documents=200, words=20, seed=seed) for seed, name in enumerate(weights)}
    return Mixture.model_validate({**KEYS, "sources": sources, "weights": weights, **changes})


def corpus(data: Data, cache: Path) -> Corpus:
    return prepare(data, Bytes(), cache, progress=False)


def batches(corpus: Corpus, data: Data, **changes: Any) -> Batches:
    keys = {"seq_len": 32, "seed": 0, "rank": 0, "ranks": 1, "micro_batch": 4, "micro_batches": 1}
    return Batches(corpus, data, **{**keys, **changes})


def texts_of(source: Source) -> list[str]:
    return [text for piece in source.pieces() for text in source.texts(piece)]


def stream(texts: Sequence[str], split: str, fraction: float) -> list[int]:
    """The tokens of a split: begin, bytes, end for each of its documents."""
    wanted = [text for text in texts if held_out(text, fraction) == (split == "validation")]
    return [token for text in wanted for token in (256, *text.encode(), 257)]


def write_lines(path: Path, *lines: str) -> TextSource:
    path.write_text("".join(f"{line}\n" for line in lines))
    return TextSource(files=(str(path),), field="text", separator=None, bad_rows="refuse")
