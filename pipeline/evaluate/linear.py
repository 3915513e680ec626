"""The linear probe: softmax regression on frozen features, solved by L-BFGS, so there is no learning rate to tune."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluate.features import Features, check_probe


def standardiser(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column, [D]; 1 for a constant column, whose deviation is exactly 0."""
    mean, std = features.mean(0), features.std(0, correction=0)
    return mean, std.where(std > 0, 1)


def _fit(x: Tensor, labels: Tensor, num_classes: int, l2: float, max_iter: int) -> tuple[Tensor, Tensor]:
    """Weights [D, C] and biases [C] that minimise the mean cross-entropy + l2 / 2 |weights|^2, float64, from zeros."""
    x = x.double()  # in fp32 the line search stalls short of the optimum where columns are nearly equal
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=max_iter, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return weight.detach(), bias.detach()


def linear_accuracy(
    train: Features, test: Features, *, num_classes: int, l2: float = 1e-3, max_iter: int = 60,
    device: torch.device | str = "cpu",
) -> float:  # fmt: skip
    """Top-1 accuracy in percent of softmax regression on features standardised by the training set.

    The penalty l2 / 2 is on the weights alone, scikit-learn's C = 1 / (l2 N). A column that is constant in the training
    set counts for nothing. Raises UserError for features that ``check_probe`` refuses.
    """
    check_probe(train, test, num_classes)
    mean, std = standardiser(train.features)
    x = ((train.features - mean) / std).to(device)
    weight, bias = (part.cpu() for part in _fit(x, train.labels.to(device), num_classes, l2, max_iter))
    predicted = (((test.features - mean) / std).double() @ weight + bias).argmax(1)
    return 100 * int((predicted == test.labels).sum()) / len(test.labels)
