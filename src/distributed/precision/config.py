"""The dtypes of a run."""

from typing import Literal

from pydantic import model_validator

from src.config.base import Config
from src.distributed.precision.float8 import Float8

Dtype = Literal["float32", "bfloat16"]

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


class Precision(Config):
    """Parameters rest in `storage`, matrices multiply in `compute`, gradients are summed over ranks in `reduce`."""

    storage: Dtype
    """Dtype of the weights that the optimizer updates."""
    compute: Dtype
    """Dtype of weights and activations in forward and backward."""
    reduce: Dtype
    """Dtype of the gradients while ranks add them up."""
    float8: Float8 | None
    """float8 products for the matrices of the blocks; null: none; precision=fp8 has the keys."""

    @model_validator(mode="after")
    def _float8_multiplies_into_bfloat16(self) -> "Precision":
        if self.float8 is not None and self.compute != "bfloat16":
            raise ValueError(f"compute={self.compute} with float8; its kernels make compute=bfloat16")
        return self

    @property
    def arithmetic(self) -> str:
        """Name of the dtype that matrices multiply in, for people."""
        if self.float8 is None:
            return self.compute
        return f"float8 {self.float8.recipe}" + (" with experts" if self.float8.experts else "")
