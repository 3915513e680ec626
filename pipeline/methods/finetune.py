"""Fine-tuning with labels: all of a pretrained encoder and a linear layer on the mean of its patch tokens.

The recipe is MAE's (He et al., CVPR 2022, appendix A.1). With ``drop_ratio`` the encoder is compressed as PCAE's teacher is
(OpenReview 8T4qmZbTkW7, section on fine-tuning): after some of its blocks the patch tokens that are most like the mean of all
leave for good; the class token never does. Nothing of that is learned, so the ratio may be another one afterwards.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.costs import num_visible
from pipeline.keys import stream
from pipeline.methods.common import Draw, Method, Prediction, drop_path_rates, panels, rows_to_image
from pipeline.segments import drop_path_keep, gather_tokens, keep_least_redundant
from pipeline.vit import VisionTransformer, build_encoder, initialise, normalise, patchify, pixel_rows, sincos_2d

if TYPE_CHECKING:
    from pipeline.config import Config

HEAD_STD = 2e-5  # MAE's: the classifier starts with next to no opinion


@dataclass(frozen=True)
class LabelDraw(Draw):
    """``labels`` int64 [B]. Where images are mixed with their neighbours: ``weight`` fp32 [S, S] of an image's own pixels,
    and ``share`` fp32 [] of its own label.
    """

    labels: Tensor
    weight: Tensor | None = None
    share: Tensor | None = None


def mix_weight(key: int, size: int, mixup: float, cutmix: float) -> Tensor | None:
    """The weight fp32 [S, S] of an image's own pixels in a batch that is mixed: for mixup the same everywhere, for cutmix 0
    in a box and 1 outside (Zhang et al. 2018; Yun et al. 2019); None for neither. As in timm, one of the two a batch.

    ``key``: all randomness. The box may reach over the edge, where it is cut.
    """
    if not mixup and not cutmix:
        return None
    rng = np.random.default_rng(key & (2**63 - 1))
    boxed = bool(cutmix) and (not mixup or rng.random() < 0.5)  # noqa: PLR2004  even chance
    share = float(rng.beta(*[cutmix if boxed else mixup] * 2))
    if not boxed:
        return torch.full((size, size), share)
    half, (row, column) = round(size * (1 - share) ** 0.5) // 2, rng.integers(size, size=2)
    weight = torch.ones(size, size)
    weight[max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return weight


def neighbours(values: Tensor) -> Tensor:
    """Rows with each pair (2i, 2i + 1) exchanged: [B, ...], B even. A batch is in random order, so any partner is as good."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def classify(
    encoder: VisionTransformer, pixels: Tensor, keep: Tensor | None, drops: Collection[int], drop_ratio: float
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, C] of normalised images fp32 [B, 3, S, S], and the raster ids of the patches that are left after each drop.

    Without a drop it is timm's own forward pass. ``keep``: see ``KeyedBlock``. No gradient flows through the choice.
    """
    x = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(pixels.to(encoder.patch_embed.proj.weight.dtype))))
    prefix, stages = encoder.num_prefix_tokens, list[Tensor]()
    ids = torch.arange(x.shape[1] - prefix, device=x.device).expand(len(x), -1)
    for index, block in enumerate(encoder.blocks):
        x = block(x, factors=block.factors(None if keep is None else keep[index]))
        if index in drops:
            patches = x[:, prefix:]
            kept = keep_least_redundant(patches, num_visible(patches.shape[1], drop_ratio))
            ids = ids.gather(1, kept)
            x = torch.cat([x[:, :prefix], gather_tokens(patches, kept)], dim=1)
            stages.append(ids)
    return encoder.forward_head(encoder.norm(x)).float(), stages


class Average(VisionTransformer):
    """The encoder's twin whose weights are an average over training; its forward pass is ``classify``."""

    def forward(
        self, pixels: Tensor, keep: Tensor | None, drops: Collection[int], drop_ratio: float
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``classify``."""
        return classify(self, pixels, keep, drops, drop_ratio)


def soft_cross_entropy(prediction: Prediction) -> Tensor:
    """- sum of target x log softmax of the logits, [B, 1], in fp32."""
    return -(prediction.target * prediction.pred.log_softmax(-1)).sum(-1)


class Finetune(Method):
    """The classifier is ``encoder``, timm's with ``fc_norm`` and ``head``; there is no decoder."""

    token_loss = staticmethod(soft_cross_entropy)

    def __init__(self, cfg: "Config") -> None:
        """Empty weights."""
        super().__init__()
        self.cfg, self.settings, self.grid, self.patch_size = cfg, cfg.method, cfg.grid, cfg.shape.patch_size
        self.drops = self.settings.drops(cfg.shape.depth)
        self.encoder = self._build(cfg.model.drop_path, VisionTransformer)
        self.encoder.pos_embed.requires_grad_(True)

    def _build(self, drop_path: float, kind: type[VisionTransformer]) -> VisionTransformer:
        settings = self.settings
        return build_encoder(self.cfg.shape, self.cfg.data.image_size, class_token=settings.class_token, drop_path=drop_path,
                             kind=kind, num_classes=settings.num_classes)  # fmt: skip

    def reset_parameters(self) -> None:
        """Fill all weights from the seed; what was pretrained is loaded into them by the trainer."""
        encoder, grid = self.encoder, self.grid
        generator = torch.Generator().manual_seed(int(stream(self.cfg.train.seed, "init")[0]) & (2**63 - 1))
        head = torch.empty(encoder.head.weight.shape, device="cpu")
        initialise(self, self.cfg.train.seed, {
            "encoder.pos_embed": sincos_2d(grid, encoder.embed_dim, class_token=encoder.has_class_token,
                                           stretched_from=self.settings.position_grid or grid),
            "encoder.head.weight": nn.init.trunc_normal_(head, std=HEAD_STD, generator=generator),
        })  # fmt: skip

    def layers(self) -> list[nn.Module]:
        """The encoder's blocks."""
        return [*self.encoder.blocks]

    def draw(self, keys: Tensor, batch_key: Tensor | None = None, labels: Tensor | None = None) -> LabelDraw:
        """Which branches are dropped, from the keys of the images; how they are mixed, from the batch's.

        Without ``labels`` it is for looking only: there is no loss.
        """
        settings, size = self.settings, self.cfg.data.image_size
        first = int(stream((keys if batch_key is None else batch_key)[:1].numpy(), "mix")[0])
        weight = mix_weight(first, size, settings.mixup, settings.cutmix)
        keep, share = drop_path_keep(keys, drop_path_rates(self.encoder)), None if weight is None else weight.mean()
        return LabelDraw(keep, torch.full_like(keys, -1) if labels is None else labels, weight, share)

    def predict(self, images: Tensor, draw: LabelDraw, teacher: nn.Module | None = None) -> Prediction:
        """Logits [B, 1, C] and their smoothed, mixed targets. Images uint8 [B, 3, S, S]; mixed ones are an even number."""
        pixels, smoothing, classes = normalise(images), self.settings.smoothing, self.settings.num_classes
        target = F.one_hot(draw.labels, classes) * (1 - smoothing) + smoothing / classes
        if draw.weight is not None and draw.share is not None:
            pixels = draw.weight * pixels + (1 - draw.weight) * neighbours(pixels)
            target = draw.share * target + (1 - draw.share) * neighbours(target)
        logits, _ = classify(self.encoder, pixels, draw.drop_path, self.drops, self.settings.drop_ratio)
        place = torch.zeros_like(draw.labels)[:, None]
        return Prediction(logits[:, None], target[:, None], place, torch.ones_like(place, dtype=torch.float32))

    def classes(
        self, images: Tensor, draw: LabelDraw, teacher: nn.Module | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, C] of images as they are, and those of the averaged weights where there are any."""
        how = normalise(images), None, self.drops, self.settings.drop_ratio
        return classify(self.encoder, *how)[0], None if teacher is None else teacher(*how)[0]

    def build_teacher(self) -> Average | None:
        """With optim.ema a frozen twin of the encoder on the CPU, empty weights, no stochastic depth."""
        if self.cfg.optim.ema is None:
            return None
        average = self._build(0.0, Average)
        assert isinstance(average, Average)
        return average.requires_grad_(False).eval()

    @torch.no_grad()
    def figure(self, images: Tensor, draw: LabelDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, and the patches that are left of it after each drop."""
        rows = pixel_rows(patchify(normalise(images), self.patch_size))
        _, stages = classify(self.encoder, normalise(images), None, self.drops, self.settings.drop_ratio)
        columns = [("image", list(rows_to_image(rows)))]
        for block, ids in zip(self.drops, stages, strict=True):
            index = ids[..., None].expand(-1, -1, rows.shape[-1])
            picture = torch.full_like(rows, -10.0).scatter(1, index, rows.gather(1, index))
            columns.append((f"after block {block}", list(rows_to_image(picture))))
        return panels(columns)
