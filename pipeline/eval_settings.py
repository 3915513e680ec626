"""The settings of `patchmill eval`, and of what is evaluated during pretraining."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from pipeline.section import Fraction01, Interval, NonNegative, Positive, Rate, Ratio, Section

LearningRates = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Strict(False), Field(min_length=1)
]


class MAELinearConfig(Section):
    """MAE's linear recipe: LARS for ``epochs``, lr = base_lr x batch / 256, linear warm-up, half-cosine to 0."""

    epochs: Positive = 90
    warmup_epochs: NonNegative = 10
    batch: Positive = 16384
    base_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1


class AttentiveConfig(Section):
    """AIM's attentive pooling: a head at each rate of ``lrs`` on each block of ``blocks`` (from 1; by default every quarter).

    AdamW with ``weight_decay``, linear warm-up, half-cosine to 0. ``queries`` are averaged; attention has as many heads as the
    encoder's.
    """

    epochs: Positive = 90
    warmup_epochs: NonNegative = 5
    batch: Positive = 1024
    lrs: LearningRates = (1e-4, 3e-4, 1e-3)
    weight_decay: Rate = 0.1
    queries: Positive = 1
    blocks: Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)] | None = None


class EvalConfig(Section):
    """The probes: cosine kNN with weights exp(similarity / temperature), linear heads, softmax regression with an L2 penalty.

    A linear head is trained for ``linear_epochs`` of batches of ``linear_batch`` at each rate of ``linear_lrs``. ``mae``,
    ``attentive``: the recipes that train on crops of ``crop_scale`` (shares of the area) and flips, computing features at each
    step; ``pooling`` of mae: the mean of patch tokens, or the class token. ``label_fraction`` of each class of data.train is
    used, chosen by ``label_seed``, for fine-tuning too. A process's encoder computes ``batch_size`` images at a time, in
    ``precision``.
    During pretraining the loss on ``loss_images`` of data.val is taken every ``loss_every`` steps, always of the same crops
    and draws; in whole global batches, one at least. Every ``online_every`` epochs, and at the end, a kNN probe has
    ``online_images`` training images as its memory and tests as many of data.val, always the same, and the log says how far the
    features spread.
    """

    loss_every: Positive | None = None
    loss_images: Positive = 4096
    online_every: Positive | None = None
    online_images: Positive = 2048
    batch_size: Positive = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    label_fraction: Ratio = 1.0
    label_seed: NonNegative = 0
    crop_scale: Interval = (0.08, 1.0)
    pooling: Literal["mean", "cls"] = "mean"
    knn_k: Positive = 20
    knn_temperature: Annotated[float, Field(gt=0)] = 0.07
    linear_l2: Rate = 1e-3
    linear_epochs: Positive = 50
    linear_batch: Positive = 256
    linear_lrs: LearningRates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    mae: MAELinearConfig = MAELinearConfig()
    attentive: AttentiveConfig = AttentiveConfig()


class FinetuneConfig(Section):
    """Fine-tuning of a pretrained encoder with labels, on the mean of its patch tokens, a norm and a linear layer (MAE's recipe).

    ``init``: the run whose encoder it starts from, of its ``init_weights``; null is from scratch. ``num_classes``,
    ``class_token`` and ``position_grid``, the patches a side of the images that it was pretrained on (null: as here), are
    set by `patchmill eval finetune`. After each block of ``drop_after`` (from 0; null: the first and that at 7/12 of the depth)
    a share ``drop_ratio`` of the patch tokens leaves, those most like the mean (PCAE's compression). ``mixup`` and
    ``cutmix`` are the alphas of their Beta distributions, one of the two a batch; ``erase`` the probability of random erasing;
    ``rand_augment`` timm's name of a policy, such as rand-m9-mstd0.5-inc1.
    """

    name: Literal["finetune"]
    init: str | None = None
    init_weights: Literal["model", "ema"] = "model"
    num_classes: Annotated[int, Field(ge=2)]
    class_token: bool = True
    position_grid: Positive | None = None
    drop_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop_after: Annotated[tuple[NonNegative, ...], Strict(False), Field(min_length=1)] | None = None
    mixup: Rate = 0.0
    cutmix: Rate = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    erase: Fraction01 = 0.0
    rand_augment: str | None = None

    @property
    def decoder_depth(self) -> int:
        """There is no decoder."""
        return 0

    def drops(self, depth: int) -> tuple[int, ...]:
        """The blocks after which tokens leave, ascending."""
        placed = (0, 7 * depth // 12) if self.drop_after is None else self.drop_after
        return tuple(sorted(set(placed))) if self.drop_ratio else ()
