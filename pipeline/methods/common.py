"""What the methods share: the draws, the prediction, the loss over tokens, and figures."""

import copy
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.segments import segment_sizes, split_tokens
from pipeline.vit import IMAGE_MEAN, IMAGE_STD, encode_visible, normalise, patchify, unpatchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Draw:
    """All randomness of a batch. ``drop_path``: bool [L, 2, B], the residual branches that are kept, or None for all."""

    drop_path: Tensor | None

    def to(self, device: torch.device | str) -> Self:
        """The same draw with its tensors on ``device``."""
        moved = copy.copy(self)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                object.__setattr__(moved, entry.name, value.to(device, non_blocking=True))
        return moved


@dataclass(frozen=True)
class RankDraw(Draw):
    """RandSAC: ``ranks`` int64 [B, N] in raster order; -1 for a token that is dropped."""

    ranks: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError for ranks that cannot be trained on (see ``segment_sizes``); on the CPU, where draws are made."""
        if self.ranks.device.type == "cpu":
            _ = self.sizes, self.shared

    @cached_property
    def sizes(self) -> tuple[int, ...] | None:
        """Tokens of each rank, None where images differ. Computed before the draw moves to a device: no step waits for it."""
        return segment_sizes(self.ranks)

    @cached_property
    def shared(self) -> bool:
        """Whether all images have the same ranks; computed as ``sizes`` is."""
        return bool((self.ranks == self.ranks[:1]).all())


@dataclass(frozen=True)
class MaskDraw(Draw):
    """MAE and PCAE: ``visible_ids`` int64 [B, V] and ``masked_ids`` int64 [B, M], together a permutation of the tokens.

    ``priority`` int64 [B, N], for PCAE's random control: tokens of low priority value are kept.
    """

    visible_ids: Tensor
    masked_ids: Tensor
    priority: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """``pred`` and ``target`` [B, T, C], the raster ids [B, T] they stand at, and a ``weight`` [B, T] of 0 or 1 in the loss."""

    pred: Tensor
    target: Tensor
    token_ids: Tensor
    weight: Tensor


def drop_path_rates(encoder: nn.Module) -> list[float]:
    """The stochastic-depth rate of each block."""
    return [block.drop_rate for block in encoder.blocks]


def mask_draw(keys: Tensor, num_tokens: int, num_visible: int, drop_path: Tensor | None) -> MaskDraw:
    """The draw of MAE and PCAE."""
    visible, masked = split_tokens(keys, num_tokens, num_visible)
    return MaskDraw(drop_path, visible, masked)


def token_mean(losses: Tensor, weight: Tensor) -> Tensor:
    """Mean over images of (sum of weight x loss / sum of weight): the same however a batch is split. Both [B, T].

    An image without a weighted token divides zero by zero and gives NaN, which the guard reports.
    """
    return ((losses * weight).sum(dim=1) / weight.sum(dim=1)).mean()


def pixel_loss(prediction: Prediction) -> Tensor:
    """Mean squared error over channels of each token, [B, T], in fp32."""
    return (prediction.pred.float() - prediction.target).square().mean(dim=-1)


def cosine_loss(prediction: Prediction) -> Tensor:
    """1 - cosine over channels of each token, [B, T], in fp32 (PCAE). In [0, 2]."""
    return 1 - F.cosine_similarity(prediction.pred.float(), prediction.target, dim=-1)


class Method(nn.Module, ABC):
    """What the trainer needs of a method. A method gives it an encoder, a decoder with blocks, and the four functions below.

    ``token_loss`` turns a ``Prediction`` into the loss of each token, [B, T].
    """

    encoder: nn.Module
    decoder: nn.Module
    patch_size: int
    token_loss: Callable[[Prediction], Tensor] = staticmethod(pixel_loss)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fill all weights from the seed; ``__init__`` only builds shapes."""

    @abstractmethod
    def draw(self, keys: Tensor, batch_key: Tensor | None = None, labels: Tensor | None = None) -> Draw:
        """All randomness of a batch from its per-sample keys, int64 [B] on the CPU.

        ``batch_key`` [1]: the key of the global batch's first sample (default: of ``keys``), for what images share.
        ``labels`` int64 [B]: for fine-tuning alone.
        """

    @abstractmethod
    def predict(self, images: Tensor, draw: Any, teacher: nn.Module | None = None) -> Prediction:
        """Predictions and targets of images uint8 [B, 3, H, W]."""

    @abstractmethod
    def figure(self, images: Tensor, draw: Any, teacher: nn.Module | None = None) -> Image.Image:
        """A picture of what the method does with these images."""

    def forward(self, images: Tensor, draw: Any, teacher: nn.Module | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and detached scalars for the log."""
        prediction = self.predict(images, draw, teacher)
        losses = self.token_loss(prediction)
        loss = token_mean(losses, prediction.weight)
        return loss, {"loss": loss.detach(), **self.monitor(prediction, losses.detach(), draw)}

    def features(self, images: Tensor, draw: Any, teacher: nn.Module | None = None) -> Tensor:
        """The mean of the encoder's patch tokens after its final norm, nothing masked: what the probes see, fp32 [B, D].

        Images uint8 [B, 3, H, W]; ``draw`` and ``teacher`` are not used.
        """
        patches = patchify(normalise(images), self.patch_size)
        ids = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
        tokens = encode_visible(self.encoder, patches, ids, None)
        return tokens[:, self.encoder.num_prefix_tokens :].float().mean(dim=1)

    def monitor(self, prediction: Prediction, losses: Tensor, draw: Any) -> dict[str, Tensor]:
        """Further scalars for the log; ``losses`` [B, T] are the tokens'. The log has their mean over micro-batches."""
        return {}

    def layers(self) -> list[nn.Module]:
        """The modules that checkpointing, compilation and sharding wrap: encoder blocks, then decoder blocks."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def build_teacher(self) -> nn.Module | None:
        """A module shaped like the part of the encoder that the EMA follows, same names; None without a teacher."""
        return None


def restore_pixels(rows: Tensor, like: Tensor) -> Tensor:
    """Standardised pixel rows [B, n, p*p*C] with the mean and deviation of the true rows ``like``: the inverse of the target."""
    deviation = (like.var(-1, keepdim=True) + 1e-6).sqrt()
    return rows.float() * deviation + like.mean(-1, keepdim=True)


def rows_to_image(rows: Tensor, channels: int = 3) -> np.ndarray:
    """Normalised pixel rows [B, N, p*p*C] of whole images as displayable float arrays [B, H, W, 3] in 0..1."""
    size = round((rows.shape[-1] // channels) ** 0.5)
    images = unpatchify(rows.detach().float().cpu().unflatten(-1, (size, size, channels)).permute(0, 1, 4, 2, 3))
    mean, std = torch.tensor(IMAGE_MEAN).view(3, 1, 1), torch.tensor(IMAGE_STD).view(3, 1, 1)
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def render(figure: "Figure") -> Image.Image:
    """A figure as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def panels(columns: list[tuple[str, list[np.ndarray]]], title: str = "") -> Image.Image:
    """A grid of pictures: one titled column a stage, one row an image. Maps [H, W] are drawn in a colour scale, each in its own.

    ``title`` stands above all, in as many lines as it needs.
    """
    from matplotlib.figure import Figure

    rows, width = len(columns[0][1]), len(columns)
    lines = textwrap.wrap(title, 22 * width)
    figure = Figure(figsize=(1.6 * width, 1.6 * rows + 0.4 + 0.16 * len(lines)), dpi=120, layout="constrained")
    if lines:
        figure.suptitle("\n".join(lines), fontsize=8)
    axes = figure.subplots(rows, width, squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.set_axis_off()
            axis.imshow(picture, interpolation="nearest", cmap="viridis" if picture.ndim == 2 else None)
    return render(figure)
