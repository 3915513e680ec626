"""The weighted nearest-neighbour probe (Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018, with DINO's settings): nothing is fitted, so it shows the features as they are."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import UserError
from pipeline.evaluate.features import Features, check_probe

CHUNK = 512  # test images at a time: bounds the memory of the similarities


def _nearest(similarity: Tensor, k: int) -> Tensor:
    """Columns of the k largest values of each row, int64 [B, k]; of equal values the lower column, as topk need not."""
    smallest = similarity.topk(k, dim=1).values[:, -1:]
    above, equal = similarity > smallest, similarity == smallest
    chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, k)


def knn_accuracies(
    train: Features, test: Features, *, num_classes: int, ks: Sequence[int], temperature: float = 0.07,
    centre: bool = False, device: torch.device | str = "cpu",
) -> dict[int, float]:  # fmt: skip
    """Top-1 accuracy in percent for each k of ``ks``: the k most similar training images by cosine vote, exp(cosine / temperature).

    One pass: the similarities are computed once, on ``device``. ``centre`` subtracts the training mean from both sets first.
    Of equal similarities the lower index is nearer, of classes with equal votes the lower wins. Raises UserError for fewer
    training images than the largest k and for features that ``check_probe`` refuses.
    """
    check_probe(train, test, num_classes)
    if max(ks) > len(train.labels):
        raise UserError(
            f"eval.knn_k or --k = {max(ks)}: is more than the {len(train.labels)} training images; lower it"
        )
    mean = train.features.mean(0) if centre else 0
    bank, labels = F.normalize(train.features - mean).to(device), train.labels.to(device)
    correct = dict.fromkeys(ks, 0)
    for queries, truth in zip(test.features.split(CHUNK), test.labels.split(CHUNK), strict=True):
        similarity = F.normalize(queries - mean).to(device) @ bank.T
        for k in ks:
            nearest = _nearest(similarity, k)
            near = similarity.gather(1, nearest)
            weights = (
                (near - near.amax(1, keepdim=True)) / temperature
            ).exp()  # against the nearest: exp(1 / T) may overflow
            votes = similarity.new_zeros(len(queries), num_classes).scatter_add_(1, labels[nearest], weights)
            correct[k] += int((votes.argmax(1) == truth.to(device)).sum())
    return {k: 100 * count / len(test.labels) for k, count in correct.items()}


def knn_accuracy(train: Features, test: Features, *, k: int = 20, **options: Any) -> float:
    """``knn_accuracies`` of one k."""
    return knn_accuracies(train, test, ks=(k,), **options)[k]
