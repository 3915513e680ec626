"""Label fractions: sizes, balance, purity, nesting, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import UserError
from pipeline.evaluate.subset import label_subset


def labels_of(counts: list[int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=8),
    st.sampled_from([0.001, 0.01, 0.1, 0.35, 1.0]),
    st.integers(0, 9),
)
def test_each_class_keeps_its_fraction_and_one_image_at_least(counts: list[int], fraction: float, seed: int) -> None:
    labels = labels_of(counts, seed)
    ids = label_subset(labels, fraction, seed)
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    expected = [max(1, int(fraction * count + 0.5)) for count in counts]
    assert np.bincount(labels[ids], minlength=len(counts)).tolist() == expected


def test_a_smaller_fraction_is_a_part_of_a_larger_one_and_all_is_all() -> None:
    labels = labels_of([500, 300, 7])
    small, large = (set(label_subset(labels, fraction, 3).tolist()) for fraction in (0.01, 0.1))
    assert small < large
    assert label_subset(labels, 1.0, 3).tolist() == list(range(807))


def test_the_choice_is_a_function_of_the_seed_and_no_image_is_preferred() -> None:
    labels = np.zeros(1000, np.int64)
    assert label_subset(labels, 0.1, 1).tolist() == label_subset(labels, 0.1, 1).tolist()
    assert len(set(label_subset(labels, 0.1, 1)) & set(label_subset(labels, 0.1, 2))) < 30
    often = np.bincount(np.concatenate([label_subset(labels, 0.1, seed) for seed in range(300)]), minlength=1000)
    assert often.min() >= 10 and often.max() <= 55  # 30 in the mean, deviation 5.2


def test_an_image_keeps_its_place_when_other_classes_grow() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    longer = np.concatenate([labels, np.ones(4, np.int64)])
    zeros = [ids[each[ids] == 0].tolist() for each in (labels, longer) for ids in [label_subset(each, 0.5, 0)]]
    assert zeros[0] == zeros[1]


def test_a_class_without_images_is_named() -> None:
    with pytest.raises(UserError, match=r"eval.label_fraction = 0.1: class 1 has no image in data.train"):
        label_subset(np.array([0, 0, 2, 2]), 0.1, 0)
    with pytest.raises(UserError, match="class 0 has no image"):
        label_subset(np.array([], np.int64), 0.1, 0)
    assert label_subset(np.array([0, 0, 2, 2]), 1.0, 0).tolist() == [0, 1, 2, 3]  # nothing is left out
