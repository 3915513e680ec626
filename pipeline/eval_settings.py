"""The settings of `patchmill eval`, and of what is evaluated during pretraining."""

from typing import Annotated

from pydantic import Field, Strict

from pipeline.section import Positive, Rate, Section


class EvalConfig(Section):
    """The probes: cosine kNN with weights exp(similarity / temperature), linear heads, softmax regression with an L2 penalty.

    A linear head is trained for ``linear_epochs`` of batches of ``linear_batch`` at each rate of ``linear_lrs``.
    During pretraining the loss on ``loss_images`` of data.val is taken every ``loss_every`` steps, always of the same crops
    and draws; in whole global batches, one at least.
    """

    loss_every: Positive | None = None
    loss_images: Positive = 4096
    batch_size: Positive = 256
    knn_k: Positive = 20
    knn_temperature: Annotated[float, Field(gt=0)] = 0.07
    linear_l2: Rate = 1e-3
    linear_epochs: Positive = 50
    linear_batch: Positive = 256
    linear_lrs: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Strict(False), Field(min_length=1)
    ] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
