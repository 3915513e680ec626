"""The weighted nearest-neighbour probe (Wu et al., "Unsupervised feature learning via non-parametric instance
discrimination", CVPR 2018, with DINO's settings): nothing is fitted, so it shows the features as they are."""

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


def knn_accuracy(
    train: Features, test: Features, *, num_classes: int, k: int = 20, temperature: float = 0.07, centre: bool = False
) -> float:
    """Top-1 accuracy in percent: the k most similar training images by cosine vote, exp(cosine / temperature) each.

    ``centre`` subtracts the training mean from both sets first. Of classes with equal votes the lower wins. Raises
    UserError for fewer than k training images and for features that ``check_probe`` refuses.
    """
    check_probe(train, test, num_classes)
    if k > len(train.labels):
        raise UserError(f"eval.knn_k={k} is more than the {len(train.labels)} training images: lower it")
    mean = train.features.mean(0) if centre else 0
    bank, queries = F.normalize(train.features - mean), F.normalize(test.features - mean)
    correct = 0
    for start in range(0, len(queries), CHUNK):
        similarity = queries[start : start + CHUNK] @ bank.T
        nearest = _nearest(similarity, k)
        weights = (similarity.gather(1, nearest) / temperature).exp()
        votes = (F.one_hot(train.labels[nearest], num_classes) * weights[:, :, None]).sum(1)
        correct += int((votes.argmax(1) == test.labels[start : start + CHUNK]).sum())
    return 100 * correct / len(queries)
