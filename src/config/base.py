"""The base of every object that a config section names with `_target_`."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, NonNegativeInt, Strict


class Config(BaseModel):
    """Frozen and strict: unknown keys, text where a number belongs and `true` for 1 are errors, not guesses.

    Constructing one opens no file, reads no environment and joins no process group, so that building every section on
    the login node is the check. Defaults live in conf/ only: fields have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


# YAML has no paths and no tuples; these are the only coercions.
PathField = Annotated[Path, Strict(strict=False)]
Names = Annotated[tuple[str, ...], Strict(strict=False)]
RankNumbers = Annotated[tuple[NonNegativeInt, ...], Strict(strict=False)]
