"""The linear probe against scikit-learn, and at its extremes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pipeline.evaluate import linear
from pipeline.evaluate.features import Features
from pipeline.evaluate.linear import linear_accuracy


def blobs(num: int, seed: int, *, width: int = 20, classes: int = 10, spread: float = 1.5) -> Features:
    """Overlapping Gaussian clouds whose columns have very different scales and offsets."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % classes
    values = centres[labels] + spread * torch.randn(num, width, generator=generator)
    return Features(values * torch.logspace(-2, 2, width) + torch.linspace(-5, 5, width), labels)


def fit_scikit_learn(train: Features, l2: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(train.features.double().numpy())
    model = LogisticRegression(C=1 / (l2 * len(train.labels)), max_iter=2000, tol=1e-8)
    return scaler, model.fit(scaler.transform(train.features.double().numpy()), train.labels.numpy())


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1.0])
def test_agrees_with_scikit_learn(l2: float) -> None:
    train, test = blobs(1000, 1), blobs(1000, 2)
    scaler, model = fit_scikit_learn(train, l2)
    expected = 100 * model.score(scaler.transform(test.features.double().numpy()), test.labels.numpy())
    assert 50 < expected < 95
    assert linear_accuracy(train, test, num_classes=10, l2=l2) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("l2", [1e-2, 1.0])
def test_the_solution_is_scikit_learns(l2: float) -> None:
    """Not only the accuracy: the penalty means the same, and the bias carries none."""
    train = blobs(500, 1)
    train.labels[100:300] = 0  # classes of unequal size need biases
    scaler, model = fit_scikit_learn(train, l2)
    x = torch.from_numpy(scaler.transform(train.features.double().numpy())).float()
    weight, bias = linear._fit(x, train.labels, 10, l2, 300)
    np.testing.assert_allclose(weight.T - weight.mean(1), model.coef_ - model.coef_.mean(0), atol=2e-3)
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_ - model.intercept_.mean(), atol=5e-3)


def test_columns_that_are_nearly_equal_are_solved_too() -> None:
    """The loss after the default iterations is the optimum's, which single precision does not reach."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(500) % 10
    values = torch.randn(500, 200, generator=generator) + 30 * torch.randn(500, 1, generator=generator)
    scaler, model = fit_scikit_learn(Features(values, labels), 1e-3)
    x = torch.from_numpy(scaler.transform(values.double().numpy()))

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(x @ weight + bias, labels) + 5e-4 * weight.square().sum())

    weight, bias = linear._fit(x.float(), labels, 10, 1e-3, 60)
    best = loss(torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_))
    assert loss(weight, bias) < best + 1e-4


def test_a_separable_set_is_separated() -> None:
    train, test = blobs(500, 1, spread=0.05), blobs(500, 2, spread=0.05)
    assert linear_accuracy(train, test, num_classes=10) == 100


def test_shuffled_labels_give_chance() -> None:
    train, test = blobs(2000, 1), blobs(2000, 2)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(5))
    assert 5 < linear_accuracy(Features(train.features, train.labels[order]), test, num_classes=10) < 15


def test_scale_and_offset_of_a_column_do_not_matter() -> None:
    train, test = blobs(500, 1), blobs(500, 2)
    moved = [Features(part.features * 64 - 512, part.labels) for part in (train, test)]
    expected = linear_accuracy(train, test, num_classes=10)
    assert linear_accuracy(*moved, num_classes=10) == pytest.approx(expected, abs=0.5)


def test_the_test_set_is_standardised_by_the_training_set() -> None:
    train, test = blobs(500, 1), blobs(500, 2)
    each = [
        linear_accuracy(train, Features(test.features[i : i + 1], test.labels[i : i + 1]), num_classes=10)
        for i in range(20)
    ]
    several = Features(test.features[:20], test.labels[:20])
    assert np.mean(each) == pytest.approx(linear_accuracy(train, several, num_classes=10))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_a_constant_column_counts_for_nothing(value: float) -> None:
    train, test = blobs(500, 1), blobs(500, 2)
    column = torch.full((500, 1), value)
    wider = Features(torch.cat([train.features, column], 1), train.labels)
    # Even where it differs in the test set.
    other = Features(torch.cat([test.features, column + 1e-3 * abs(value)], 1), test.labels)
    assert linear_accuracy(wider, other, num_classes=10) == linear_accuracy(train, test, num_classes=10)


def test_a_column_of_small_values_still_counts() -> None:
    labels = torch.arange(200) % 2
    train = Features(1e-8 * (labels[:, None] + 0.1 * torch.randn(200, 1)), labels)
    assert linear_accuracy(train, train, num_classes=2) == 100


def test_a_class_without_training_images_is_never_predicted() -> None:
    train, test = blobs(500, 1, classes=5), blobs(500, 2, classes=5)
    assert linear_accuracy(train, test, num_classes=7) == pytest.approx(
        linear_accuracy(train, test, num_classes=5), abs=0.5
    )


def test_iterations_are_bounded() -> None:
    train = blobs(500, 1)
    assert linear_accuracy(train, train, num_classes=10, max_iter=1) < linear_accuracy(train, train, num_classes=10)


def test_two_runs_are_equal_and_leave_the_features_alone() -> None:
    train, test = blobs(500, 1), blobs(500, 2)
    before = train.features.clone()
    first = linear_accuracy(train, test, num_classes=10)
    with torch.no_grad():
        assert linear_accuracy(train, test, num_classes=10) == first
    assert torch.equal(train.features, before)
