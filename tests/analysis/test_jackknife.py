"""Standard errors over pictures and seeds: equal to formulas for what has one, paired, and exact in any order."""

import random
from statistics import stdev

import numpy as np
import pytest
import torch

from doublehead.analysis.jackknife import CLUSTERS, Estimate, Samples, estimate, sample
from doublehead.analysis.moments import Moments, MomentTable

PICTURES = 30


def mean(moments):
    return moments.y_mean


def steps(moments):
    """The mean of y in steps."""
    return moments.y / moments.count if moments.count else None


def difference(a, b):
    return a.y_mean - b.y_mean


@pytest.fixture(scope="module")
def pictures():
    """For two heads a picture's pairs: what the picture has in common is far larger than what one box adds."""
    draw = np.random.default_rng(0)
    shared, own = draw.random(PICTURES), draw.random((2, PICTURES))
    numbers = draw.integers(5, 60, PICTURES)
    return [
        [
            (draw.random(n), np.clip(0.8 * shared[k] + 0.05 * head + 0.1 * own[head, k] + 0.02 * draw.random(n), 0, 1))
            for k, n in enumerate(numbers)
        ]
        for head in range(2)
    ]


def table(pictures, order=range(PICTURES)):
    found = MomentTable((2, 3, CLUSTERS))
    for k in order:
        for head, every in enumerate(pictures):
            x, y = (torch.from_numpy(values) for values in every[k])
            found.add((head, k % 3, k), x, y)
    return found


def ratio_error(sums, counts):
    """The linearised standard error of a ratio of totals over clusters (Cochran, Sampling Techniques, 1977, ch. 6)."""
    ratio, n = sums.sum() / counts.sum(), len(counts)
    return np.sqrt(n / (n - 1) * ((sums - ratio * counts) ** 2).sum()) / counts.sum()


def test_a_mean_over_boxes_has_the_standard_error_of_a_ratio_over_pictures(pictures):
    samples = Samples(table(pictures))
    y = [values for _, values in pictures[0]]
    found = estimate([(samples.total(0, range(3)),)], mean)
    assert found.value == pytest.approx(np.concatenate(y).mean(), abs=1e-7) and found.seed_error is None
    sums, counts = np.array([values.sum() for values in y]), np.array([len(values) for values in y])
    assert found.error == pytest.approx(ratio_error(sums, counts), rel=0.05)  # equal but for terms of second order
    assert found.error > 5 * np.concatenate(y).std() / np.sqrt(counts.sum())  # as if the boxes were independent


def test_equal_numbers_of_boxes_give_the_textbook_error_of_the_mean():
    parts = [Moments(4, 0, 4 * k, 0, 4 * k * k, 0) for k in (3, 8, 1, 9)]
    found = estimate([(sample([*parts, Moments()]),)], steps)
    assert found == Estimate(5.25, pytest.approx(stdev((3, 8, 1, 9)) / 2, rel=1e-12), None)


def test_the_error_of_a_difference_is_paired(pictures):
    samples = Samples(table(pictures))
    ours, theirs = samples.total(1, range(3)), samples.total(0, range(3))
    found = estimate([(ours, theirs)], difference)
    counts = np.array([len(y) for _, y in pictures[0]])
    sums = np.array([b.sum() - a.sum() for (_, a), (_, b) in zip(*pictures, strict=True)])
    assert found.value == pytest.approx(sums.sum() / counts.sum(), abs=1e-7)
    assert found.error == pytest.approx(ratio_error(sums, counts), rel=0.05)
    assert found.error < estimate([(ours,)], mean).error / 3  # the pictures' share cancels


def test_a_correlation_has_numpys_jackknife(pictures):
    found = estimate([(Samples(table(pictures)).total(0, range(3)),)], lambda m: m.pearson)

    def without(k):
        return np.corrcoef(*(np.concatenate([p[i] for j, p in enumerate(pictures[0]) if j != k]) for i in range(2)))

    left = np.array([without(k)[0, 1] for k in range(PICTURES)])
    assert found.value == pytest.approx(without(None)[0, 1], abs=1e-6)
    expected = np.sqrt((PICTURES - 1) / PICTURES * ((left - left.mean()) ** 2).sum())
    assert found.error == pytest.approx(expected, rel=1e-4)


def test_any_order_gives_the_same_bits(pictures):
    expected = estimate([(Samples(table(pictures)).total(0, range(3)),)], lambda m: m.pearson)
    order = list(range(PICTURES))
    random.Random(1).shuffle(order)
    merged = table(pictures, order[:11])
    merged.merge(table(pictures, order[11:]))
    assert estimate([(Samples(merged).total(0, range(3)),)], lambda m: m.pearson) == expected


def test_seeds_are_averaged_and_have_their_own_error():
    seeds = [(sample([Moments(1, 0, y), Moments(1, 0, y + 2)]),) for y in (1, 4, 10)]
    found = estimate(seeds, steps)
    assert found == Estimate(6.0, pytest.approx(1.0), pytest.approx(stdev((2, 5, 11)) / 3**0.5))
    assert found.shown == found.seed_error and estimate(seeds[:1], steps).shown == pytest.approx(1)


def test_what_has_no_error_says_so():
    one = sample([Moments(), Moments(5, 0, 5)])
    assert estimate([(one,)], steps) == Estimate(1.0, None, None)  # one picture
    two = sample([Moments(2, 1, 1), Moments(1, 1, 2)])
    assert estimate([(two,)], lambda m: m.y / m.count if m.count > 1 else None).error is None
    assert estimate([(sample([Moments()]),)], mean) == Estimate()
    assert estimate([(two,), (sample([Moments()] * 2),)], mean) == Estimate()  # a seed without a value


def test_totals_take_what_is_asked_for(pictures):
    samples = Samples(table(pictures))
    chosen = samples.total(1, (0, 2))
    assert chosen.whole.count == sum(len(x) for k, (x, _) in enumerate(pictures[1]) if k % 3 != 1)
    assert [k for k, left in enumerate(chosen.without) if left is not None] == [k for k in range(30) if k % 3 != 1]
    assert chosen.without[3].merge(table(pictures).cells[1, 0, 3]) == chosen.whole
    assert samples.total(0, ()).whole == Moments()
