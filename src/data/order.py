"""Shuffling and mixing: a global sample index to (source, window). Pure functions of (seed, index): O(1) memory and
seek.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Unsigned = NDArray[np.uint64]
Signed = NDArray[np.int64]

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
ROUND_KEYS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * GOLDEN
LONGEST_PERIOD = 100_000


def key_of(*facts: object) -> np.uint64:
    digest = hashlib.blake2b("/".join(map(str, facts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def mix(value: Unsigned) -> Unsigned:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * FIRST
    value = (value ^ (value >> np.uint64(27))) * SECOND
    return value ^ (value >> np.uint64(31))


def sample_hashes(samples: Signed, sources: Signed, windows: Signed) -> Unsigned:
    """64 bits for each sample: its number in the global order, and the source and window that it is read from.

    Hashes of a set are added modulo 2^64 (a multiset hash): the sum does not depend on who adds what in which order,
    and a sample that is missing, there twice or another one leaves it as it is with a chance of 2^-64.
    """
    place = samples.astype(np.uint64) * GOLDEN + (sources.astype(np.uint64) + np.uint64(1)) * GOLDEN
    return mix(mix(place) ^ windows.astype(np.uint64))


class Permutation:
    """Pseudorandom bijection of range(size), another one in each epoch: a Feistel network on the next power of two.

    A result outside of the range is permuted again until it is inside (cycle walking, Black and Rogaway 2002): under
    two rounds each.
    """

    def __init__(self, size: int, key: np.uint64) -> None:
        assert size > 0, "a permutation of nothing"
        self.size = size
        bits = max((size - 1).bit_length(), 2)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << (bits // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._key = key

    def __call__(self, index: Signed) -> Signed:
        """Sample number (any epoch) -> element of range(size)."""
        epoch, place = np.divmod(index, self.size)
        epochs = epoch[:1] if len(epoch) and epoch[0] == epoch[-1] and epoch.min() == epoch.max() else epoch
        value = self._encrypt(place.astype(np.uint64), epochs.astype(np.uint64))
        while len(outside := np.flatnonzero(value >= np.uint64(self.size))):
            keys = epochs if len(epochs) == 1 else epochs[outside]
            value[outside] = self._encrypt(value[outside], keys.astype(np.uint64))
        return value.astype(np.int64)

    def _encrypt(self, value: Unsigned, epoch: Unsigned) -> Unsigned:
        low, high = value & self._low_mask, value >> self._low_bits
        base = mix(epoch * GOLDEN + self._key)
        for number in range(0, ROUNDS, 2):
            high = high ^ (_scramble(low, base + ROUND_KEYS[number]) & self._high_mask)
            low = low ^ (_scramble(high, base + ROUND_KEYS[number + 1]) & self._low_mask)
        return (high << self._low_bits) | low


def _scramble(value: Unsigned, key: Unsigned) -> Unsigned:
    value = (value + key) * FIRST
    value = (value ^ (value >> np.uint64(32))) * SECOND
    return value >> np.uint64(32)


class Interleave:
    """Global sample index -> (source, index within the source), so that every prefix holds the weights.

    All samples have one length, so weights in tokens are weights in samples. The order is periodic: within a period the
    earliest deadline is served first, which keeps every source strictly within one sample of its share at every moment
    (Baruah et al. 1996, proportionate progress). Weights whose common denominator is at most 100,000 are exact.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.quotas = _quotas(weights)
        self.period = sum(self.quotas)
        self._source = _schedule(self.quotas)
        self._local = np.zeros(self.period, np.int64)
        for source, quota in enumerate(self.quotas):
            self._local[self._source == source] = np.arange(quota)
        self._quota = np.array(self.quotas, np.int64)

    def __call__(self, index: Signed) -> tuple[Signed, Signed]:
        cycle, place = np.divmod(index, self.period)
        source = self._source[place]
        return source, cycle * self._quota[source] + self._local[place]

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` each source gives."""
        cycles, rest = divmod(samples, self.period)
        begun = np.bincount(self._source[:rest], minlength=len(self.quotas))
        return [cycles * quota + int(more) for quota, more in zip(self.quotas, begun, strict=True)]

    def longest(self, limits: Sequence[int]) -> int:
        """The largest number of samples that takes at most limits[i] from source i."""
        low, high = 0, sum(limits)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(count <= limit for count, limit in zip(self.counts(middle), limits, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole samples of each source per period; more than 100,000 would be needed -> rounded, none below 1."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = np.lcm.reduce([share.denominator for share in shares], dtype=object)
    if period > LONGEST_PERIOD:
        return [max(1, round(share * LONGEST_PERIOD)) for share in shares]
    return [int(share * period) for share in shares]


def _schedule(quotas: Sequence[int]) -> Signed:
    """Source of each place in a period: of the samples already released, the one with the earliest deadline; of those
    with one deadline, that of the first source.

    A sample is released when the share of those before it is due, and its deadline is when its own is. Each source has
    one in a heap or waits for its next: 100,000 places of 100 sources take 0.2 s, where looking at each took 1.3.
    """
    period = sum(quotas)
    given = [0] * len(quotas)
    # Sources by the place that their next sample waits for.
    released: list[list[int]] = [[] for _ in range(period + 1)]
    released[0] = [source for source, quota in enumerate(quotas) if quota]
    ready: list[tuple[int, int]] = []
    order = np.zeros(period, np.int64)
    for place in range(period):
        for source in released[place]:
            heappush(ready, (-(-(given[source] + 1) * period // quotas[source]), source))
        _, chosen = heappop(ready)
        order[place] = chosen
        given[chosen] += 1
        if given[chosen] < quotas[chosen]:
            due = -(-given[chosen] * period // quotas[chosen])
            released[max(due, place + 1)].append(chosen)
    return order
