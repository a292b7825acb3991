"""What decides how rows are made of a token stream; src/data/packing/rows.py makes them."""

from dataclasses import dataclass
from typing import Literal

Packing = Literal["concatenate", "best_fit"]


@dataclass(frozen=True)
class RowRules:
    """How rows are made of a stream. `eos` and `bos`: ids; `bos`: in front of each row, None: of none."""

    packing: Packing = "concatenate"
    bos: int | None = None
    eos: int | None = None

    @property
    def facts(self) -> tuple[object, ...]:
        """For fingerprints: nothing for what every version did."""
        if self.packing == "concatenate" and self.bos is None:
            return ()
        return (self.packing, self.bos, self.eos if self.packing == "best_fit" else None)
