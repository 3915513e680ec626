"""PCAE: progressively compressed auto-encoder (ICLR 2023, OpenReview 8T4qmZbTkW7).

The student encodes the visible patches. The teacher, an average of the student's encoder, encodes the masked ones
and drops, three times, the half of its tokens that is most like all others; the student's decoder predicts the
teacher's features at the positions that are left. No pixel is predicted.
"""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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
from pipeline.segments import drop_path_keep, gather_tokens, keep_least_redundant
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


def compress(
    encoder: VisionTransformer, patches: Tensor, ids: Tensor, drops: tuple[int, ...], keep_ratio: float
) -> tuple[Tensor, list[Tensor]]:
    """Features [B, K, D] of the tokens that survive, after the final norm, and the ids that are left after each stage.

    ``patches`` [B, M, C, p, p] stand at ``ids`` [B, M]. After each block in ``drops`` the floor(n x keep_ratio) tokens
    least like the mean stay (judged on the block's raw output); the others leave for good. No class token, no
    stochastic depth. Raises ValueError when a stage would leave no token.
    """
    x, stages = embed(encoder, patches, ids), []
    for index, block in enumerate(encoder.blocks):
        x = block(x)
        if index in drops:
            kept = keep_least_redundant(x, keep_count(x.shape[1], keep_ratio))
            x, ids = gather_tokens(x, kept), ids.gather(1, kept)
            stages.append(ids)
    return encoder.norm(x), stages


class Teacher(VisionTransformer):
    """The encoder's twin whose weights are an average over training; its forward pass is ``compress``."""

    def forward(
        self, patches: Tensor, ids: Tensor, drops: tuple[int, ...], keep_ratio: float
    ) -> tuple[Tensor, list[Tensor]]:
        """See ``compress``."""
        return compress(self, patches, ids, drops, keep_ratio)


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
        self.drops, self.keep_ratio = drop_blocks(shape.depth, method.stages), method.keep_ratio
        self.encoder = build_encoder(shape, cfg.data.image_size, class_token=True, drop_path=cfg.model.drop_path)
        self.decoder = Decoder(cfg.grid, shape.width, method.decoder_width, method.decoder_depth, method.decoder_heads,
                               shape.width)  # fmt: skip

    def reset_parameters(self) -> None:
        """Fill all weights from the seed."""
        initialise(self, self.cfg.train.seed, {
            "encoder.pos_embed": sincos_2d(self.grid, self.encoder.embed_dim, class_token=True),
            "decoder.pos_embed": sincos_2d(self.grid, self.decoder.pos_embed.shape[-1], class_token=True),
        })  # fmt: skip

    def draw(self, keys: Tensor) -> MaskDraw:
        """Visible and masked token ids for each key (int64 [B], CPU)."""
        keep = drop_path_keep(keys, drop_path_rates(self.encoder))
        return mask_draw(keys, self.grid**2, self.num_visible, keep)

    @torch.no_grad()
    def targets(self, patches: Tensor, masked_ids: Tensor, teacher: nn.Module | None) -> tuple[Tensor, list[Tensor]]:
        """The teacher's standardised features [B, K, D] in fp32 and the ids kept at each stage; patches of the whole image.

        Without a teacher the encoder's own weights stand in: what the teacher is before the first step.
        """
        masked = gather_tokens(patches, masked_ids)
        if teacher is None:
            features, stages = compress(self.encoder, masked, masked_ids, self.drops, self.keep_ratio)
        else:
            features, stages = teacher(masked, masked_ids, self.drops, self.keep_ratio)
        return standardise(features), stages

    def predict(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Prediction:
        """The teacher's features at the positions it kept. Images uint8 [B, 3, H, W]."""
        patches = patchify(normalise(images), self.patch_size)
        target, stages = self.targets(patches, draw.masked_ids, teacher)
        visible = gather_tokens(patches, draw.visible_ids)
        encoded = encode_visible(self.encoder, visible, draw.visible_ids, draw.drop_path)
        pred = self.decoder(encoded, draw.visible_ids, stages[-1])
        return Prediction(pred.float(), target, stages[-1], torch.ones(stages[-1].shape, device=pred.device))

    def build_teacher(self) -> Teacher:
        """A frozen twin of the encoder on the CPU, empty weights, no stochastic depth."""
        teacher = build_encoder(self.cfg.shape, self.cfg.data.image_size, class_token=True, drop_path=0.0, kind=Teacher)
        return teacher.requires_grad_(False).eval()

    @torch.no_grad()
    def figure(self, images: Tensor, draw: MaskDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, the student's visible patches, and the teacher's tokens at first and after each stage."""
        patches = patchify(normalise(images), self.patch_size)
        rows = pixel_rows(patches)
        _, stages = self.targets(patches, draw.masked_ids, teacher)
        columns = [("image", list(rows_to_image(rows)))]
        shown = {"student sees": draw.visible_ids, "teacher sees": draw.masked_ids}
        shown |= {f"kept at stage {index + 1}": ids for index, ids in enumerate(stages)}
        for title, ids in shown.items():
            index = ids[..., None].expand(-1, -1, rows.shape[-1])
            picture = torch.full_like(rows, -10.0).scatter(1, index, rows.gather(1, index))
            columns.append((title, list(rows_to_image(picture))))
        return panels(columns)
