"""Which sample is seen when: permutations, epoch tails, resuming, left-out batches."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import keys, order

SOME = settings(max_examples=50, deadline=None)


def steps(seed: int, first: int, last: int, num: int, batch: int, skipped: tuple = ()) -> list[tuple[int, list[int]]]:
    return [(epoch, ids.tolist()) for epoch, ids in order.run_order(seed, first, last, num, batch, skipped)]


@SOME
@given(st.integers(0, 2**40), st.integers(0, 500), st.integers(1, 300))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, num: int) -> None:
    assert sorted(order.epoch_permutation(seed, epoch, num).tolist()) == list(range(num))


def test_the_permutation_is_the_stable_argsort_of_hashed_positions() -> None:
    scores = keys.stream(keys.hash_integers(9, 4), "order", np.arange(50)).tolist()
    assert order.epoch_permutation(9, 4, 50).tolist() == sorted(range(50), key=lambda i: (scores[i], i))


def test_seed_and_epoch_each_change_the_order() -> None:
    orders = {tuple(order.epoch_permutation(seed, epoch, 40)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_first_place_is_uniform_over_samples() -> None:
    first = np.bincount([order.epoch_permutation(1, epoch, 10)[0] for epoch in range(5000)], minlength=10)
    assert ((first - 500.0) ** 2 / 500).sum() < 45  # chi square with 9 degrees of freedom: p < 1e-6 beyond


def test_a_cached_permutation_cannot_be_damaged() -> None:
    with pytest.raises(ValueError):
        order.epoch_permutation(0, 0, 10)[0] = 3


@SOME
@given(st.integers(0, 99), st.integers(1, 60), st.integers(1, 60), st.integers(1, 4))
def test_epochs_have_whole_batches_and_no_sample_twice(seed: int, num: int, batch: int, epochs: int) -> None:
    if num < batch:
        with pytest.raises(ValueError, match="do not fill one global batch"):
            order.steps_per_epoch(num, batch)
        return
    per_epoch = order.steps_per_epoch(num, batch)
    assert per_epoch == num // batch
    walk = steps(seed, 0, epochs * per_epoch, num, batch)
    for epoch in range(epochs):
        part = walk[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert {number for number, _ in part} == {epoch}
        seen = [sample for _, ids in part for sample in ids]
        assert all(len(ids) == batch for _, ids in part)
        assert len(set(seen)) == len(seen) == per_epoch * batch
        assert seen == order.epoch_permutation(seed, epoch, num)[: len(seen)].tolist()


def test_the_samples_left_out_differ_between_epochs_and_all_get_their_turn() -> None:
    num, batch = 23, 8
    left = []
    for epoch in range(60):
        seen = {i for _, ids in steps(0, 2 * epoch, 2 * epoch + 2, num, batch) for i in ids}
        left.append(frozenset(range(num)) - seen)
    assert all(len(out) == num % batch for out in left)
    assert len(set(left)) > 50
    assert frozenset().union(*left) == frozenset(range(num))


@SOME
@given(st.integers(0, 40), st.integers(0, 40))
def test_resuming_at_any_step_gives_the_tail_of_the_whole(a: int, b: int) -> None:
    first, last = sorted((a, b))
    assert steps(3, first, last, 29, 4) == steps(3, 0, 40, 29, 4)[first:last]


def test_resuming_costs_one_permutation_whatever_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(order, "epoch_permutation", lambda seed, epoch, num: made.append(epoch) or np.arange(num))
    assert order.batch_ids(0, 10**12 + 1, 1000, 10)[0] == 10**10
    assert made == [10**10]


def test_the_order_does_not_know_the_world_size() -> None:
    _, whole = order.batch_ids(5, 7, 1000, 24)
    for world in (1, 2, 3, 4, 8):
        parts = [whole[rank * 24 // world : (rank + 1) * 24 // world] for rank in range(world)]
        joined = np.concatenate([order.sample_keys(5, 2, part) for part in parts])
        assert np.array_equal(joined, order.sample_keys(5, 2, whole))


def test_sample_keys_are_the_keys_of_the_generator() -> None:
    ids = np.array([0, 7, 7, 123456], np.int64)
    found = order.sample_keys(4, 9, ids)
    assert found.dtype == np.int64 and found.shape == (4,)
    assert np.array_equal(found, keys.hash_integers(4, 9, ids))
    assert not np.array_equal(found, order.sample_keys(4, 10, ids))
    assert not np.array_equal(found, order.sample_keys(5, 9, ids))


ranges = st.lists(st.integers(0, 60), max_size=8, unique=True).map(
    lambda ends: [(a, b) for a, b in zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False)]
)


@SOME
@given(ranges)
def test_skipped_ranges_leave_their_batches_out_and_no_others(skipped: list[tuple[int, int]]) -> None:
    out = {batch for start, stop in skipped for batch in range(start, stop)}
    expected = [batch for batch in range(200) if batch not in out][:60]
    assert [order.data_position(step, skipped) for step in range(60)] == expected


def test_adjacent_ranges_and_a_range_at_the_start() -> None:
    assert [order.data_position(step, [(0, 2), (3, 5), (5, 6)]) for step in range(3)] == [2, 6, 7]
    assert [order.data_position(step) for step in range(3)] == [0, 1, 2]


def test_a_run_with_skipped_ranges_reads_the_batches_after_them() -> None:
    whole = steps(1, 0, 30, 50, 5)
    assert steps(1, 0, 20, 50, 5, ((3, 7), (12, 14))) == [whole[i] for i in range(26) if i not in (3, 4, 5, 6, 12, 13)]
    # Steps before the first range are what they were: a roll-back does not rewrite the past.
    assert steps(1, 0, 3, 50, 5, ((3, 7),)) == whole[:3]


def test_too_few_samples_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="7 samples do not fill one global batch of 8"):
        list(order.run_order(0, 0, 1, 7, 8))


@pytest.mark.parametrize("ranges", [[], [(2, 4)], [(0, 1), (5, 9)], [(3, 4), (6, 7), (12, 20)]])
@pytest.mark.parametrize("first, last", [(0, 1), (2, 3), (3, 6), (4, 10)])
def test_batches_that_steps_have_read_are_left_out_and_all_others_stay(ranges, first, last):
    before = [order.data_position(step, ranges) for step in range(40)]
    after = [order.data_position(step, order.leave_out(ranges, first, last)) for step in range(40)]
    expected = before[:first] + before[last:]
    assert after[: len(expected)] == expected
