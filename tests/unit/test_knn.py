"""The nearest-neighbour probe against a plain reference and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from pipeline.config import UserError
from pipeline.evaluate import knn
from pipeline.evaluate.features import Features
from pipeline.evaluate.knn import knn_accuracies, knn_accuracy


def blobs(num: int, seed: int, *, width: int = 8, classes: int = 4, spread: float = 1.5, shift: float = 0) -> Features:
    """``classes`` overlapping Gaussian clouds around fixed centres, all moved by ``shift``."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (num,), generator=generator)
    labels[:classes] = torch.arange(classes)
    return Features(centres[labels] + spread * torch.randn(num, width, generator=generator) + shift, labels)


def reference(
    train: Features, test: Features, k: int, temperature: float, *, centre: bool, num_classes: int
) -> list[int]:
    """The predicted classes by loops over float64 values, one image at a time."""
    bank, queries = train.features.double().numpy(), test.features.double().numpy()
    if centre:
        bank, queries = bank - bank.mean(0), queries - bank.mean(0)
    predicted = []
    for query in queries:
        cosines = [float(row @ query / np.linalg.norm(row) / np.linalg.norm(query)) for row in bank]
        nearest = sorted(range(len(bank)), key=lambda index: (-cosines[index], index))[:k]
        votes = [0.0] * num_classes
        for index in nearest:
            votes[int(train.labels[index])] += math.exp(cosines[index] / temperature)
        predicted.append(votes.index(max(votes)))
    return predicted


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(1, 10**6),
    k=st.integers(1, 30),
    temperature=st.sampled_from([0.02, 0.07, 1.0]),
    centre=st.booleans(),
    shift=st.sampled_from([0.0, 2.0]),
)
def test_agrees_with_the_plain_reference(seed: int, k: int, temperature: float, centre: bool, shift: float) -> None:
    train, test = blobs(60, seed, shift=shift), blobs(25, seed + 1, shift=shift)
    expected = reference(train, test, k, temperature, centre=centre, num_classes=4)
    got = knn_accuracy(train, test, k=k, temperature=temperature, centre=centre, num_classes=4)
    assert got == pytest.approx(100 * np.mean(np.array(expected) == test.labels.numpy()))


def test_the_number_of_neighbours_and_the_temperature_matter() -> None:
    # One close neighbour of class 0 at cosine 1, three of class 1 at cosine 0.8.
    train = Features(torch.tensor([[1, 0], [0.8, 0.6], [0.8, -0.6], [0.8, 0.6]]), torch.tensor([0, 1, 1, 1]))
    test = Features(torch.tensor([[2.0, 0]]), torch.tensor([0]))
    assert knn_accuracy(train, test, k=1, num_classes=2) == 100
    assert knn_accuracy(train, test, k=4, temperature=0.07, num_classes=2) == 100  # exp(0.2 / 0.07) = 17 > 3
    assert knn_accuracy(train, test, k=4, temperature=0.3, num_classes=2) == 0  # exp(0.2 / 0.3) = 1.9 < 3


def test_the_defaults_are_the_usual_ones() -> None:
    train, test = blobs(200, 1), blobs(100, 2)
    assert knn_accuracy(train, test, num_classes=4) == knn_accuracy(
        train, test, k=20, temperature=0.07, centre=False, num_classes=4
    )


def test_centring_uses_the_training_mean_and_helps_shifted_features() -> None:
    # Far from the origin all cosines are near 1, and the differences that count drown.
    train, test = blobs(300, 1, spread=0.7, shift=30), blobs(200, 2, spread=0.7, shift=30)
    centred = knn_accuracy(train, test, centre=True, num_classes=4)
    assert centred > knn_accuracy(train, test, centre=False, num_classes=4) + 3
    mean = train.features.mean(0)
    by_hand = knn_accuracy(
        Features(train.features - mean, train.labels), Features(test.features - mean, test.labels), num_classes=4
    )
    assert centred == by_hand


def test_agrees_with_scikit_learn() -> None:
    train, test = blobs(500, 1, spread=0.8), blobs(300, 2, spread=0.8)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    model = KNeighborsClassifier(20, weights=weights, metric="cosine", algorithm="brute")
    model.fit(train.features.numpy(), train.labels.numpy())
    expected = 100 * model.score(test.features.numpy(), test.labels.numpy())
    assert 70 < expected < 100
    assert knn_accuracy(train, test, num_classes=4) == pytest.approx(expected, abs=0.34)  # one image of rounding


@pytest.mark.parametrize("k", [1, 3, 4, 10])
def test_agrees_with_scikit_learn_where_many_images_are_equally_near(k: int) -> None:
    """Each training image is there four times under different labels; scikit-learn is told that the lower index is nearer."""
    one, test = blobs(40, 1, spread=1), blobs(150, 2, spread=1)
    labels = torch.randint(4, (160,), generator=torch.Generator().manual_seed(3))
    train = Features(one.features.repeat(4, 1), labels)
    units = [torch.nn.functional.normalize(part.features.double()).numpy() for part in (train, test)]
    distance = 1 - units[1] @ units[0][:40].T
    distance = np.tile(distance, 4) + 1e-14 * np.arange(160)
    model = KNeighborsClassifier(k, weights=lambda far: np.exp((1 - far.round(6)) / 0.07), metric="precomputed")
    model.fit(np.zeros((160, 160)), labels.numpy())
    expected = 100 * model.score(distance, test.labels.numpy())
    assert knn_accuracy(train, test, num_classes=4, k=k) == pytest.approx(expected)
    backwards = Features(train.features.flip(0), labels.flip(0))
    if k in (1, 3):
        assert knn_accuracy(backwards, test, num_classes=4, k=k) != pytest.approx(expected)


def test_several_k_at_once_are_each_alone() -> None:
    train, test = blobs(300, 1), blobs(200, 2)
    found = knn_accuracies(train, test, num_classes=4, ks=(1, 5, 20, 100))
    assert found == {k: knn_accuracy(train, test, num_classes=4, k=k) for k in (1, 5, 20, 100)}
    assert len(set(found.values())) > 2
    with pytest.raises(UserError, match="eval.knn_k or --k = 301: is more than the 300 training images"):
        knn_accuracies(train, test, num_classes=4, ks=(1, 301))


def test_ties_go_to_the_lower_index() -> None:
    similarity = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.1], [0.3, 0.3, 0.3, 0.3, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]])
    assert knn._nearest(similarity, 3).tolist() == [[0, 1, 2], [0, 1, 2], [2, 3, 4]]
    assert knn._nearest(similarity, 5).tolist() == [[0, 1, 2, 3, 4]] * 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=8, max_size=40), st.integers(1, 8))
def test_nearest_is_a_stable_sort(values: list[int], k: int) -> None:
    expected = sorted(range(len(values)), key=lambda index: (-values[index], index))[:k]
    assert knn._nearest(torch.tensor([values]).float(), k).tolist() == [sorted(expected)]


def test_equal_votes_go_to_the_lower_class() -> None:
    train = Features(torch.tensor([[1.0, 1], [1.0, -1]]), torch.tensor([1, 0]))
    test = Features(torch.tensor([[1.0, 0]]), torch.tensor([0]))
    assert knn_accuracy(train, test, k=2, num_classes=2) == 100


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(200, 1), blobs(101, 2)
    whole = knn_accuracy(train, test, num_classes=4)
    assert 40 < whole < 100
    for chunk in (1, 7, 100):
        monkeypatch.setattr(knn, "CHUNK", chunk)
        assert knn_accuracy(train, test, num_classes=4) == whole


def test_length_of_the_features_does_not_matter() -> None:
    train, test = blobs(200, 1), blobs(100, 2)
    generator = torch.Generator().manual_seed(3)
    scaled = [
        Features(part.features * 2.0 ** torch.randint(-3, 4, (len(part.labels), 1), generator=generator), part.labels)
        for part in (train, test)
    ]
    assert knn_accuracy(*scaled, num_classes=4) == knn_accuracy(train, test, num_classes=4)


def test_an_all_zero_feature_is_like_nothing_and_not_an_error() -> None:
    train, test = blobs(50, 1), blobs(20, 2)
    test.features[0] = 0
    assert 0 <= knn_accuracy(train, test, num_classes=4) <= 100


def test_more_neighbours_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="eval.knn_k or --k = 20: is more than the 10 training images"):
        knn_accuracy(blobs(10, 1), blobs(10, 2), num_classes=4)


def test_shuffled_labels_give_chance() -> None:
    train, test = blobs(1000, 1), blobs(1000, 2)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(5))
    assert 18 < knn_accuracy(Features(train.features, train.labels[order]), test, num_classes=4) < 32


def test_a_low_temperature_leaves_the_vote_to_the_nearest() -> None:
    """exp(1 / temperature) alone is infinite in float32 below 0.0113, and all classes would be equal."""
    train, test = blobs(300, 0), blobs(100, 1)
    nearest = knn_accuracy(train, test, num_classes=4, k=1)
    assert knn_accuracy(train, test, num_classes=4, k=5, temperature=1e-4) == nearest > 40
