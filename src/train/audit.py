"""Audit of samples: what ranks feed to the model is, step by step, what the data order gives to the step, each once.

A batch comes out of the loader with the checksum of what its rows were read from. The checksums of all ranks travel in
the all-reduce that counts a step's tokens, where the sum is exact (`limbs`); here it is compared with that of the place
of the step in the order, which follows from position, seed and corpus. No collective, no copy and no wait of its own.

The checksum is a sum of SplitMix64 hashes (Steele, Lea and Flood 2014; `sample_hashes`), so ranks and micro-batches may
come in any order, and a sample that is missing, there twice or another one shows but for a chance of 2^-64.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from src.data.batches import DIGEST_CHUNK, Batch, Batches
from src.errors import SampleError

# The launcher shows the error that came first: a rank that took what is its own lets those speak that did not.
BLAMELESS_SECONDS = 1.0


@dataclass(frozen=True)
class Fed:
    """Samples of a step: those that this rank was given, those of its place, and those of all ranks that are summed."""

    taken: list[int]
    own: list[int]
    due: range


class SampleAudit:
    """Steps are told as they come and compared together (`check`), which takes 0.5 ms, and 0.5 us a sample, at most."""

    def __init__(self, batches: Batches, *, rank: int, ranks: int, micro_batch: int, who: str) -> None:
        """`rank` of the `ranks` that read different samples: the layout's word, not the loader's. `who`: for errors."""
        self._batches, self._rank, self._ranks, self._micro_batch = batches, rank, ranks, micro_batch
        self._who = who
        self._fed: dict[int, Fed] = {}
        self._summed: list[tuple[int, int, Fed]] = []  # with step and checksum

    def feed(self, step: int, position: int, batches: Sequence[Batch], *, share: range, summed: range) -> None:
        """Step `step` starts at sample `position`, and these are the micro-batches `share` of this rank. The sum will
        be over the micro-batches `summed` of all data ranks.
        """
        size, together = self._micro_batch, self._ranks * self._micro_batch
        firsts = [position + number * together + self._rank * size for number in share]
        self._fed[step] = Fed(
            taken=[sample for batch in batches for sample in batch.samples],
            own=[sample for first in firsts for sample in range(first, first + size)],
            due=range(position + summed.start * together, position + summed.stop * together),
        )

    def summed(self, step: int, checksum: int) -> None:
        """The sum over all ranks of a step that counts."""
        self._summed.append((step, checksum, self._fed.pop(step)))
        if sum(len(fed.due) for _, _, fed in self._summed) >= DIGEST_CHUNK:
            self.check()

    def check(self) -> None:
        """Compare all steps since the last call, before anything of them is kept. The same on every rank.

        Raises `SampleError` for the first step whose samples are not its own.
        """
        summed, self._summed = self._summed, []
        if not summed:
            return
        due = [fed.due for _, _, fed in summed]
        hashes = self._batches.hashes(np.concatenate([np.arange(each.start, each.stop) for each in due]))
        starts = np.cumsum([0, *map(len, due[:-1])])
        expected = np.add.reduceat(hashes, starts).tolist()  # uint64: modulo 2^64
        for (step, checksum, fed), right in zip(summed, expected, strict=True):
            if checksum != right:
                raise self._error(step, fed, checksum, right)
            self._batches.taken(fed.due, checksum)

    def _error(self, step: int, fed: Fed, found: int, right: int) -> SampleError:
        which = f"step {step} is of samples {spans(fed.due)}, checksum {right:016x}; the ranks took {found:016x}"
        if sorted(fed.taken) != sorted(fed.own):
            return SampleError(f"{which}: {self._who} took {spans(fed.taken)} instead of {spans(fed.own)}")
        time.sleep(BLAMELESS_SECONDS)
        return SampleError(f"{which}: {self._who} took {spans(fed.own)}, all its own; so others did not")


def spans(samples: Iterable[int], most: int = 4) -> str:
    """In words: 3, 5 to 8 and 2 more."""
    found: list[list[int]] = []
    for sample in samples:
        if found and sample == found[-1][1] + 1:
            found[-1][1] = sample
        else:
            found.append([sample, sample])
    words = [str(first) if first == last else f"{first} to {last}" for first, last in found]
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")
