"""Micro-batches of one data rank, from a global position alone: no loader state, nothing to replay."""

import hashlib
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from src.data.config import Data
from src.data.corpus import Corpus
from src.data.order import Permutation, Unsigned, key_of, sample_hashes
from src.storage.patience import Patience

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
DIGEST_CHUNK = 1 << 16  # fits the cache of a core: 10 million samples take about a second
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """tokens and labels: int64 (micro_batch, seq_len); the others as docs/architecture.md says."""

    tokens: "Tensor"
    labels: "Tensor"
    positions: "Tensor | None"
    documents: "Tensor | None"
    samples: tuple[int, ...]
    checksum: int = 0  # sum modulo 2^64 of the `sample_hashes` of what the rows were read from

    def pinned(self) -> "Batch":
        """A copy in page-locked memory, from which copies to a GPU are asynchronous."""
        moved = {
            name: tensor.pin_memory()
            for name in ("tokens", "labels", "positions", "documents")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


class Batches:
    """Micro-batches of one data rank: row i of micro-batch m is sample position + (m * ranks + rank) * micro_batch +
    i.
    """

    def __init__(
        self,
        corpus: Corpus,
        data: Data,
        *,
        seq_len: int,
        seed: int,
        rank: int,
        ranks: int,
        micro_batch: int,
        micro_batches: int,
        read_before: Sequence[int] = (),
        patience: Patience | None = None,
    ) -> None:
        """`read_before`: samples of each source that the run has used up in other orders, behind which this one goes
        on; empty: none. `patience`: for faults of the disk that pass, with those of other rooms counted in it.
        """
        assert 0 <= rank < ranks, "a data rank outside its group"
        self._corpus = corpus
        self._data = data
        self._patience = patience or Patience()
        self._seq_len = seq_len
        self._rank = rank
        self._ranks = ranks
        self._micro_batch = micro_batch
        self._micro_batches = micro_batches
        self._read_before = np.array(read_before or [0] * len(corpus.parts), np.int64)
        self._name = "/".join(map(str, [corpus.fingerprint, seed, seq_len, *(read_before if any(read_before) else ())]))
        self._train = _permutations(corpus, "train", seq_len, seed)
        self._held_out = _permutations(corpus, "validation", seq_len, 0)  # the same rows for every seed: runs compare
        self._summed = (0, 0)  # a position, and the checksum of all samples before it
        self._marks = [(0, 0)]  # the same at the last borders of windows, at most two

    @property
    def global_batch(self) -> int:
        return self._micro_batches * self._ranks * self._micro_batch

    def step(self, position: int, share: range | None = None) -> list[Batch]:
        """The micro-batches of the optimizer step that starts at global sample `position`; with `share`, only those
        numbers.
        """
        rows = np.arange(self._micro_batch)
        numbers = range(self._micro_batches) if share is None else share
        firsts = [position + (m * self._ranks + self._rank) * self._micro_batch for m in numbers]
        return [self._batch("train", first + rows) for first in firsts]

    def prefetch(self, position: int, steps: int) -> Generator[list[Batch], None, None]:
        """The next `steps` results of `step`, made in a thread and pinned when this process uses CUDA.

        An error of the thread is raised here; closing the iterator ends the thread.
        """
        import torch

        # A new thread is on GPU 0, whatever GPU its rank has; a rank on the CPU leaves the GPUs of its host alone.
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(STEPS_AHEAD)
        stop = threading.Event()
        arguments = (ready, stop, position, steps, device)
        thread = threading.Thread(target=self._fill, args=arguments, name="prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(steps):
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                yield made
        finally:
            stop.set()
            thread.join()

    def digest(self, position: int) -> str:
        """Hash of corpus, seed, seq_len and the ids of all samples [0, position); the same for every layout.

        Continues from what is known where it can, so that asking at every checkpoint costs only the new samples.
        """
        known = [each for each in (*self._marks, self._summed) if each[0] <= position]
        self._summed = max(known, default=(0, 0))
        self._marks = [each for each in self._marks if each[0] <= position] or [self._summed]
        self._count_to(position)
        return hashlib.blake2b(f"{self._name}/{position}/{self._summed[1]}".encode(), digest_size=8).hexdigest()

    @property
    def mark(self) -> tuple[int, int]:
        """A sample one to two windows (65,536) before the last that was summed, or the first one, and the sum up to
        it: who recalls it need not count from the start.
        """
        return self._marks[0]

    def recall(self, mark: tuple[int, int]) -> None:
        """Digests are counted from this `mark` of a checkpoint on; (0, 0): from the start."""
        self._summed, self._marks = mark, [mark]

    def taken(self, samples: range, checksum: int) -> None:
        """Ranks took these samples, of this checksum: where the last digest ended with them, the next goes on there."""
        position, total = self._summed
        if position != samples.start:
            return
        if (border := samples.stop // DIGEST_CHUNK * DIGEST_CHUNK) > position:
            self._count_to(border)
        self._summed = (samples.stop, (total + checksum) % 2**64)

    def _count_to(self, position: int) -> None:
        """From what is summed to `position`, which is behind it; the sums at the last two borders of windows stay."""
        at, total = self._summed
        while at < position:
            stop = min((at // DIGEST_CHUNK + 1) * DIGEST_CHUNK, position)
            at, total = stop, (total + self.checksum(np.arange(at, stop))) % 2**64
            if at % DIGEST_CHUNK == 0:
                self._marks = [*self._marks, (at, total)][-2:]
        self._summed = (at, total)

    def hashes(self, samples: NDArray[np.int64]) -> Unsigned:
        """Of training samples, from their numbers, the corpus and the seed alone."""
        return sample_hashes(samples, *self._locate(self._train, samples))

    def checksum(self, samples: NDArray[np.int64]) -> int:
        """What `digest` adds up, modulo 2^64: a sum over ranks and steps in any order equals the sum over a range."""
        return _sum(self.hashes(samples))

    def realised(self, position: int) -> dict[str, dict[str, float]]:
        """By source: tokens so far, their share of all, the weight asked for, and epochs read."""
        counts = self._corpus.interleave.counts(position)
        weights = sum(part.weight for part in self._corpus.parts)
        return {
            part.name: {
                "tokens": count * self._seq_len,
                "share": count / max(position, 1),
                "target": part.weight / weights,
                "epochs": count / max(self._corpus.rows(number, "train", self._seq_len).count, 1),
            }
            for number, (part, count) in enumerate(zip(self._corpus.parts, counts, strict=True))
        }

    def validation(self, samples: int | None) -> Iterator[Batch]:
        """The rank's share of the first `samples` held-out rows (None or more than there are: all), in a fixed order.

        Every rank gets equally many batches of micro_batch rows; what fills the last ones has no valid label.
        """
        return self.fixed("validation", samples)

    def fixed(self, split: str, samples: int | None, source: int | None = None) -> Iterator[Batch]:
        """As `validation`, of any split; with `source`, only the rows of the source of that number."""
        available = self._corpus.windows(split, self._seq_len)
        chosen = np.arange(available if samples is None else min(samples, available))
        if source is not None:
            chosen = chosen[self._corpus.interleave(chosen)[0] == source]
        together = self._ranks * self._micro_batch
        for first in range(self._rank * self._micro_batch, -(-len(chosen) // together) * together, together):
            yield self._batch(split, chosen[first : first + self._micro_batch])

    def _fill(
        self,
        ready: "queue.Queue[list[Batch] | BaseException]",
        stop: threading.Event,
        at: int,
        steps: int,
        device: int | None,
    ) -> None:
        import torch

        try:
            if device is not None:
                torch.cuda.set_device(device)
            for number in range(steps):
                made = self.step(at + number * self.global_batch)
                _put(ready, made if device is None else [batch.pinned() for batch in made], stop)
                if stop.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  the training thread must hear of it instead of waiting
            _put(ready, error, stop)

    def _locate(
        self, permutations: list[Permutation | None], samples: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and window of each sample."""
        sources, local = self._corpus.interleave(samples)
        if permutations is self._train:
            local = local + self._read_before[sources]
        windows = np.empty_like(local)
        for number, permutation in enumerate(permutations):
            chosen = sources == number
            if chosen.any():
                assert permutation is not None, "the plan refuses a source without one window"
                windows[chosen] = permutation(local[chosen])
        return sources, windows

    def _batch(self, split: str, samples: NDArray[np.int64]) -> Batch:
        sources, windows = self._locate(self._train if split == "train" else self._held_out, samples)
        filler = 0 if self._corpus.eos_id is None else self._corpus.eos_id
        tokens = np.full((self._micro_batch, self._seq_len), filler, np.int64)
        labels = np.full_like(tokens, IGNORED)
        for row, (source, window) in enumerate(zip(sources.tolist(), windows.tolist(), strict=True)):
            read = self._patience(partial(self._corpus.rows(source, split, self._seq_len).read, window))
            tokens[row, : len(read) - 1] = read[:-1]
            labels[row, : len(read) - 1] = read[1:]
        checksum = _sum(sample_hashes(samples, sources, windows))
        return self._pack(tokens, labels, tuple(samples.tolist()), checksum)

    def _pack(
        self, tokens: NDArray[np.int64], labels: NDArray[np.int64], samples: tuple[int, ...], checksum: int
    ) -> Batch:
        import torch

        ends = tokens == (-1 if self._corpus.eos_id is None else self._corpus.eos_id)
        if self._corpus.rules.bos is not None and self._corpus.rules.bos == self._corpus.eos_id:
            ends[:, 0] = False  # the one mark of such a tokenizer begins the row here, and ends nothing
        if self._data.mask_document_starts:
            labels[ends] = IGNORED
        positions, documents = _within_documents(ends) if self._data.document_masks else (None, None)
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            positions=None if positions is None else torch.from_numpy(positions),
            documents=None if documents is None else torch.from_numpy(documents),
            samples=samples,
            checksum=checksum,
        )


def _sum(hashes: Unsigned) -> int:
    """Modulo 2^64."""
    return int(hashes.sum(dtype=np.uint64))


def _within_documents(ends: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions that restart after each end of document, and documents: the number of ends strictly before."""
    starts = np.zeros_like(ends)
    starts[:, 1:] = ends[:, :-1]
    places = np.broadcast_to(np.arange(ends.shape[1]), ends.shape)
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    return positions, np.cumsum(starts, axis=1, dtype=np.int32)


def _permutations(corpus: Corpus, split: str, seq_len: int, seed: int) -> list[Permutation | None]:
    sizes = [corpus.rows(number, split, seq_len).count for number in range(len(corpus.parts))]
    keys = [key_of(seed, split, part.name) for part in corpus.parts]
    return [Permutation(size, key) if size else None for size, key in zip(sizes, keys, strict=True)]


def _put(
    ready: "queue.Queue[list[Batch] | BaseException]", made: list[Batch] | BaseException, stop: threading.Event
) -> None:
    """Waits for room, but not for a reader that is gone."""
    while not stop.is_set():
        try:
            ready.put(made, timeout=0.1)
        except queue.Full:
            continue
        return
