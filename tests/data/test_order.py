"""The order of samples: a permutation in every epoch, weights in every prefix, any index without the ones before."""

from fractions import Fraction

import numpy as np
import pytest

from src.data.order import Interleave, Permutation, _schedule, key_of


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1023, 1025, 4096, 50_000])
def test_every_epoch_is_a_permutation(size: int) -> None:
    order = Permutation(size, key_of(0, "train", "text"))
    epochs = order(np.arange(3 * size)).reshape(3, size)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(size))


def test_epochs_seeds_and_sources_differ() -> None:
    orders = [Permutation(1000, key_of(seed, name)) for seed in (0, 1) for name in ("a", "b")]
    drawn = {tuple(order(np.arange(1000) + 1000 * epoch)) for order in orders for epoch in (0, 1, 7)}
    assert len(drawn) == 4 * 3


def test_an_index_needs_no_other() -> None:
    """One by one, far out and in any company: the same element."""
    order = Permutation(777, key_of("seek"))
    indices = np.array([0, 776, 777, 5_000, 10**12, 10**12 + 1, 3])
    assert order(indices).tolist() == [int(order(np.array([index]))[0]) for index in indices]


def test_a_permutation_looks_shuffled() -> None:
    """Neighbours end up a third of the range apart on average, as independent draws do, and nothing stays in place."""
    size = 10_000
    drawn = Permutation(size, key_of("spread"))(np.arange(size))
    assert abs(np.abs(np.diff(drawn)).mean() / size - 1 / 3) < 0.01
    assert abs(np.corrcoef(np.arange(size), drawn)[0, 1]) < 0.03
    assert (drawn == np.arange(size)).sum() < 10


WEIGHTS = [[1.0], [0.5, 0.5], [0.9, 0.1], [3, 1.5], [0.7, 0.2, 0.1], [0.01, 0.01, 0.98], [5, 4, 3, 2, 1, 0.125]]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_holds_the_weights_within_one_sample(weights: list[float]) -> None:
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    interleave = Interleave(weights)
    sources, local = interleave(np.arange(5000))
    given = [0] * len(weights)
    for number, (source, index) in enumerate(zip(sources.tolist(), local.tolist(), strict=True)):
        assert index == given[source]
        given[source] += 1
        assert all(abs(count - (number + 1) * share) < 1 for count, share in zip(given, shares, strict=True))
        if number % 97 == 0:
            assert interleave.counts(number + 1) == given


def test_weights_without_a_small_common_denominator_are_rounded() -> None:
    interleave = Interleave([1 / 3, 2 / 3, 1e-9])
    assert interleave.quotas == [33333, 66667, 1]
    assert Interleave([0.33333, 0.66667]).quotas == [33333, 66667]


def test_far_samples_of_a_mixture_are_reached_at_once() -> None:
    interleave = Interleave([0.7, 0.2, 0.1])
    far = 10**15
    sources, local = interleave(np.arange(far, far + 10))
    before = interleave.counts(far)
    assert before == [far * 7 // 10, far * 2 // 10, far // 10]
    near_sources, near_local = interleave(np.arange(10))
    assert sources.tolist() == near_sources.tolist()
    assert local.tolist() == [index + before[source] for index, source in zip(near_local, sources, strict=True)]


@pytest.mark.parametrize("limits", [[0, 5], [70, 30], [1000, 3], [7, 1000]])
def test_the_longest_prefix_within_limits(limits: list[int]) -> None:
    interleave = Interleave([0.7, 0.3])
    longest = max(n for n in range(1100) if all(a <= b for a, b in zip(interleave.counts(n), limits, strict=True)))
    assert interleave.longest(limits) == longest


def looked_at_each(quotas: list[int]) -> list[int]:
    """The rule as it is written, one place after the other."""
    period, given, order = sum(quotas), [0] * len(quotas), []
    for place in range(period):
        released = [n for n, quota in enumerate(quotas) if given[n] < quota and given[n] * period <= place * quota]
        order.append(min(released, key=lambda n: -(-(given[n] + 1) * period // quotas[n])))
        given[order[-1]] += 1
    return order


@pytest.mark.parametrize(
    "quotas", [[1], [1, 1], [7, 2, 1], [1, 1, 98], [3, 3, 3], [500, 1, 250, 249], [*range(1, 30)], [40] * 25]
)
def test_the_earliest_deadline_is_served_first(quotas: list[int]) -> None:
    assert _schedule(quotas).tolist() == looked_at_each(quotas)
