"""PCAE: progressively compressed auto-encoder (ICLR 2023, OpenReview 8T4qmZbTkW7).

The student encodes the visible patches. The teacher, an average of the student's encoder, encodes the masked ones
and drops in stages (by default three times the half) the tokens that are most like all others; the student's decoder predicts the
teacher's features at the positions that are left. No pixel is predicted.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from pipeline.costs import drop_blocks, keep_count, num_visible
from pipeline.methods.common import (
    MaskDraw,
    Method,
    Prediction,
    cosine_loss,
    drop_path_rates,
    mask_draw,
    panels,
    rows_to_image,
)
from pipeline.segments import drop_path_keep, gather_tokens, keep_lowest, permutation, redundancy
from pipeline.vit import (
    Decoder,
    build_encoder,
    embed,
    encode_visible,
    initialise,
    normalise,
    patchify,
    pixel_rows,
    sincos_2d,
    standardise,
)

if TYPE_CHECKING:
    from pipeline.config import Config


class Score(Protocol):
    """Judges tokens [B, n, D] that stand at ids [B, n]: [B, n], the lowest are kept."""

    def __call__(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """No gradient flows through it."""


class Compression(NamedTuple):
    """After each block in ``drops`` the floor(n x ``keep_ratio``) tokens with the lowest ``score`` stay."""

    drops: tuple[int, ...]
    keep_ratio: float
    score: Score


def redundancy_score(tokens: Tensor, ids: Tensor, *, raw_mean: bool = False, sign: int = 1) -> Tensor:
    """How like the mean a token is; the control that keeps the most similar turns the ``sign``."""
    return sign * redundancy(tokens.detach(), raw_mean=raw_mean)


def compress(encoder: VisionTransformer, patches: Tensor, ids: Tensor, how: Compression) -> tuple[Tensor, list[Tensor]]:
    """Features [B, K, D] of the tokens that survive, after the final norm, and the ids that are left after each stage.

    ``patches`` [B, M, C, p, p] stand at ``ids`` [B, M]. Tokens are judged on a block's raw output; those that are
    dropped leave for good. No class token, no stochastic depth. Raises ValueError when a stage would leave no token.
    """
    x, stages = embed(encoder, patches, ids), []
    for index, block in enumerate(encoder.blocks):
        x = block(x)
        if index in how.drops:
            kept = keep_lowest(how.score(x, ids), keep_count(x.shape[1], how.keep_ratio))
            x, ids = gather_tokens(x, kept), ids.gather(1, kept)
            stages.append(ids)
    return encoder.norm(x), stages


class Teacher(VisionTransformer):
    """The encoder's twin whose weights are an average over training; its forward pass is ``compress``."""

    def forward(self, patches: Tensor, ids: Tensor, how: Compression) -> tuple[Tensor, list[Tensor]]:
        """See ``compress``."""
        return compress(self, patches, ids, how)


class PCAE(Method):
    """Student, decoder and loss; the teacher is handed in by the engine.

    The loss is 1 - cosine between prediction and target, averaged over the kept tokens; about 1 at first.
    """

    token_loss = staticmethod(cosine_loss)

    def __init__(self, cfg: "Config") -> None:
        """Empty weights; raises ValueError for more stages than blocks."""
        super().__init__()
        method, shape = cfg.method, cfg.shape
        self.cfg, self.grid, self.patch_size = cfg, cfg.grid, shape.patch_size
        self.num_visible = num_visible(cfg.grid**2, method.mask_ratio)
        self.drops = drop_blocks(shape.depth, method.stages, method.drop_case)
        self.encoder = build_encoder(shape, cfg.data.image_size, class_token=True, drop_path=cfg.model.drop_path)
        self.decoder = Decoder(cfg.grid, shape.width, method.decoder_width, method.decoder_depth, method.decoder_heads,
                               shape.width)  # fmt: skip

    def reset_parameters(self) -> None:
        """Fill all weights from the seed."""
        initialise(self, self.cfg.train.seed, {
            "encoder.pos_embed": sincos_2d(self.grid, self.encoder.embed_dim, class_token=True),
            "decoder.pos_embed": sincos_2d(self.grid, self.decoder.pos_embed.shape[-1], class_token=True),
        })  # fmt: skip

    def draw(self, keys: Tensor, batch_key: Tensor | None = None, labels: Tensor | None = None) -> MaskDraw:
        """Visible and masked token ids for each key (int64 [B], CPU), and the random control's priorities."""
        keep = drop_path_keep(keys, drop_path_rates(self.encoder))
        draw = mask_draw(keys, self.grid**2, self.num_visible, keep)
        if self.cfg.method.selection == "random":
            draw = replace(draw, priority=permutation(keys, "selection", self.grid**2))
        return draw

    def compression(self, priority: Tensor | None) -> Compression:
        """How the teacher drops tokens; ``priority`` [B, N] by raster id for the random control."""
        method = self.cfg.method
        score: Score = partial(redundancy_score, raw_mean=method.criterion == "raw_mean",
                               sign=-1 if method.selection == "most_similar" else 1)  # fmt: skip
        if priority is not None:
            score = lambda tokens, ids: priority.gather(1, ids)  # noqa: E731
        return Compression(self.drops, method.keep_ratio, score)

    @torch.no_grad()
    def targets(
        self, patches: Tensor, ids: Tensor, teacher: nn.Module | None, priority: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The teacher's features [B, K, D] of the tokens at ``ids``, in fp32, and the ids kept at each stage.

        ``patches`` of the whole image. Features are standardised with ``normalise_target`` (for the cosine only their
        centring matters). Without a teacher the encoder's own weights stand in: what it is before the first step.
        """
        seen, how = gather_tokens(patches, ids), self.compression(priority)
        features, stages = compress(self.encoder, seen, ids, how) if teacher is None else teacher(seen, ids, how)
        return standardise(features) if self.cfg.method.normalise_target else features.float(), stages

    def predict(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Prediction:
        """The teacher's features at the positions it kept. Images uint8 [B, 3, H, W]."""
        patches = patchify(normalise(images), self.patch_size)
        target, stages = self.targets(patches, draw.masked_ids, teacher, draw.priority)
        visible = gather_tokens(patches, draw.visible_ids)
        encoded = encode_visible(self.encoder, visible, draw.visible_ids, draw.drop_path)
        pred = self.decoder(encoded, draw.visible_ids, stages[-1])
        return Prediction(pred.float(), target, stages[-1], torch.ones(stages[-1].shape, device=pred.device))

    @torch.no_grad()
    def monitor(self, prediction: Prediction, losses: Tensor, draw: MaskDraw) -> dict[str, Tensor]:
        """Whether the targets collapse: to what extent they are all alike.

        ``target_std``: the mean over channels of the deviation of the unit targets, x sqrt(D): 1 when they spread over all
        directions, 0 when all are equal. ``target_cosine``: the mean cosine of targets of different images (two at least).
        """
        unit = F.normalize(prediction.target, dim=-1)
        spread = unit.flatten(0, 1).std(dim=0, correction=0).mean() * unit.shape[-1] ** 0.5
        batch, kept, _ = unit.shape
        if batch == 1:
            return {"target_std": spread}
        of_image = unit.sum(dim=1)
        across = of_image.sum(dim=0).square().sum() - of_image.square().sum()
        return {"target_std": spread, "target_cosine": across / (batch * (batch - 1) * kept**2)}

    def build_teacher(self) -> Teacher:
        """A frozen twin of the encoder on the CPU, empty weights, no stochastic depth."""
        teacher = build_encoder(self.cfg.shape, self.cfg.data.image_size, class_token=True, drop_path=0.0, kind=Teacher)
        return teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def figure(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, what student and teacher see, the tokens kept at each stage, and those of the whole image (as the paper shows)."""
        patches = patchify(normalise(images), self.patch_size)
        rows = pixel_rows(patches)
        _, stages = self.targets(patches, draw.masked_ids, teacher, draw.priority)
        everything = torch.arange(self.grid**2, device=images.device).expand(len(images), -1)
        _, whole = self.targets(patches, everything, teacher, draw.priority)
        columns = [("image", list(rows_to_image(rows)))]
        shown = {"student sees": draw.visible_ids, "teacher sees": draw.masked_ids}
        shown |= {f"kept at stage {index + 1}": ids for index, ids in enumerate(stages)}
        shown |= {f"whole, stage {index + 1}": ids for index, ids in enumerate(whole)}
        for title, ids in shown.items():
            index = ids[..., None].expand(-1, -1, rows.shape[-1])
            picture = torch.full_like(rows, -10.0).scatter(1, index, rows.gather(1, index))
            columns.append((title, list(rows_to_image(picture))))
        return panels(columns)
