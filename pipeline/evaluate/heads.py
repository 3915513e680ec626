"""Many linear heads at once on frozen features: one for every pooling and learning rate, as DINOv2's linear evaluation
(Oquab et al., "DINOv2: Learning robust visual features without supervision", TMLR 2024) does on one backbone pass.

The head is chosen on a tenth of the training images that no head is trained on; only the chosen one sees the test images.
It is not trained again on all of them: what is tested is the very head that was chosen.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config import UserError
from pipeline.evaluate.features import Features, check_probe
from pipeline.evaluate.linear import standardiser
from pipeline.order import epoch_permutation

log = logging.getLogger("patchmill")
MOMENTUM = 0.9
HOLD_OUT = 10  # one image in so many
FEW = 50  # held-out images: heads are equal by chance
CHUNK = 4096  # images at a time: bounds the memory of all heads' logits


@dataclass(frozen=True)
class HeadsReport:
    """Held-out top-1 in percent of every head, ``held_out[pooling][i]`` at ``lrs[i]``; the chosen head and its test top-1."""

    held_out: dict[str, list[float]]
    lrs: tuple[float, ...]
    num_held_out: int
    pooling: str
    lr: float
    top1: float

    def __str__(self) -> str:
        """A table for people: a line a learning rate, a column a pooling."""
        lines = [f"held-out top-1 % of {len(self.lrs) * len(self.held_out)} heads on {self.num_held_out} training images; "
                 "* the chosen one",
                 f"{'lr':>10}" + "".join(f"{pooling:>11}" for pooling in self.held_out)]  # fmt: skip
        for index, lr in enumerate(self.lrs):
            cells = [f"{scores[index]:.2f}{'*' if (pooling, lr) == (self.pooling, self.lr) else ' '}"
                     for pooling, scores in self.held_out.items()]  # fmt: skip
            lines.append(f"{lr:>10g}" + "".join(f"{cell:>11}" for cell in cells))
        return "\n".join(lines)


def poolings(part: Features) -> dict[str, Tensor]:
    """What the heads see, [N, D] by name: mean, with a class token cls and cls+mean, and last4."""
    found = {"mean": part.features}
    if "cls" in part.others:
        found |= {"cls": part.others["cls"], "cls+mean": torch.cat([part.others["cls"], part.features], 1)}
    if "last4" in part.others:
        found["last4"] = part.others["last4"]
    return found


def split(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids, int64, of the images to train on and of the held-out tenth (rounded down). Raises UserError for fewer than ten."""
    if num_samples < HOLD_OUT:
        raise UserError(f"the probe chooses its head on a tenth of the training images, but data.train has {num_samples}: "
                        f"give it at least {HOLD_OUT}, or use eval linear --exact")  # fmt: skip
    order = torch.from_numpy(epoch_permutation(seed, -1, num_samples).copy())  # -1: the order of no epoch
    return order[num_samples // HOLD_OUT :], order[: num_samples // HOLD_OUT]


def _with_bias(x: Tensor) -> Tensor:
    """A column of ones behind [N, D]: its weights are the biases."""
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def train_heads(
    inputs: Mapping[str, Tensor], labels: Tensor, *, num_classes: int, lrs: Sequence[float], epochs: int, batch_size: int,
    seed: int, device: torch.device | str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Weights [D + 1, H, C] of H softmax heads, one a learning rate, for each pooling's inputs [N, D]; the last row: biases.

    Zero weights, the mean cross-entropy of a batch, SGD with momentum 0.9, rates that fall to 0 by a half-cosine. All heads
    see the same batches: an epoch's order, a function of (seed, epoch), cut into equal parts of at most ``batch_size``. They
    are computed on ``device``; the inputs stay where they are.
    """
    inputs = {pooling: _with_bias(x) for pooling, x in inputs.items()}
    weights = {pooling: torch.zeros(x.shape[1], len(lrs), num_classes, device=device) for pooling, x in inputs.items()}
    velocities = {pooling: torch.zeros_like(weight) for pooling, weight in weights.items()}
    per_epoch = math.ceil(len(labels) / batch_size)
    for epoch in range(epochs):
        order = torch.from_numpy(epoch_permutation(seed, epoch, len(labels)).copy()).to(labels.device)
        for batch, ids in enumerate(order.tensor_split(per_epoch)):
            progress = (epoch * per_epoch + batch) / (epochs * per_epoch)
            rates = [lr * (1 + math.cos(math.pi * progress)) / 2 for lr in lrs]
            truth = F.one_hot(labels[ids].to(device), num_classes)[:, None]
            for pooling, x in inputs.items():
                rows, weight, velocity = x[ids].to(device), weights[pooling], velocities[pooling]
                # The gradient by the logits [B, H, C]. Written out: a rate for each head is then a factor of its column.
                error = torch.einsum("bd,dhc->bhc", rows, weight).softmax(2) - truth
                velocity.mul_(MOMENTUM).add_(torch.einsum("bd,bhc->dhc", rows, error), alpha=1 / len(ids))
                weight.sub_(weight.new_tensor(rates)[:, None] * velocity)
    return weights


def _top1(x: Tensor, weights: Tensor, labels: Tensor) -> list[float]:
    """Accuracy in percent of each head [D + 1, H, C] on inputs [N, D]."""
    correct = torch.zeros(weights.shape[1], dtype=torch.int64, device=weights.device)
    for rows, truth in zip(_with_bias(x).split(CHUNK), labels.split(CHUNK), strict=True):
        logits = torch.einsum("bd,dhc->bhc", rows.to(weights.device), weights)
        correct += (logits.argmax(2) == truth.to(weights.device)[:, None]).sum(0)
    return [100 * int(count) / len(labels) for count in correct]


def heads_accuracy(
    train: Features, test: Features, *, num_classes: int, lrs: Sequence[float], epochs: int, batch_size: int, seed: int,
    device: torch.device | str = "cpu",
) -> HeadsReport:  # fmt: skip
    """Train a head for every pooling and learning rate, choose by the held-out tenth of ``train``, test the chosen one.

    Inputs are standardised by the images trained on. Of equal heads the first pooling, then the first rate wins. Raises
    UserError for fewer than ten training images and for features that ``check_probe`` refuses.
    """
    inputs, tested = poolings(train), poolings(test)
    for pooling, x in inputs.items():
        check_probe(Features(x, train.labels), Features(tested[pooling], test.labels), num_classes)
    fitted, held = (ids.to(train.labels.device) for ids in split(len(train.labels), seed))
    if len(held) < FEW:
        log.warning("the head is chosen by %d images only; --exact needs no choice", len(held))
    scales = {pooling: standardiser(x[fitted]) for pooling, x in inputs.items()}
    inputs = {pooling: (x - scales[pooling][0]) / scales[pooling][1] for pooling, x in inputs.items()}
    weights = train_heads({pooling: x[fitted] for pooling, x in inputs.items()}, train.labels[fitted],
                          num_classes=num_classes, lrs=lrs, epochs=epochs, batch_size=batch_size, seed=seed,
                          device=device)  # fmt: skip
    held_out = {pooling: _top1(x[held], weights[pooling], train.labels[held]) for pooling, x in inputs.items()}
    pooling = max(held_out, key=lambda name: max(held_out[name]))
    index = held_out[pooling].index(max(held_out[pooling]))
    mean, std = scales[pooling]
    chosen = weights[pooling][:, index : index + 1]
    top1 = _top1((tested[pooling] - mean) / std, chosen, test.labels)[0]
    return HeadsReport(held_out, tuple(lrs), len(held), pooling, lrs[index], top1)
