"""The three dtypes of a run."""

from typing import Literal

from src.config.base import Config

Dtype = Literal["float32", "bfloat16"]

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


class Precision(Config):
    """Parameters rest in `storage`, matrices multiply in `compute`, gradients are summed over ranks in `reduce`."""

    storage: Dtype
    compute: Dtype
    reduce: Dtype
