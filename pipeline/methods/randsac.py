"""RandSAC: random segments with autoregressive coding (Hua et al., ICLR 2023, arXiv 2203.12054).

Tokens are grouped in segments, segments get a random order, and each segment's pixels are predicted from all
segments before it: a mask keeps every token from seeing its own segment's future in the encoder, and its own
segment in the decoder's memory. Section numbers in comments are the paper's where given.
"""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.methods.common import (
    Method,
    Prediction,
    RankDraw,
    drop_path_rates,
    panels,
    restore_pixels,
    rows_to_image,
)
from pipeline.segments import block_masks, drop_path_keep, gather_tokens, hierarchical_ranks, square_segments
from pipeline.vit import (
    CrossBlock,
    LayerNorm,
    build_encoder,
    embed,
    initialise,
    normalise,
    patchify,
    pixel_rows,
    sincos_2d,
    standardise,
)

if TYPE_CHECKING:
    from pipeline.config import Config


class SegmentDecoder(nn.Module):
    """Queries are positions and one learned token; each block reads its own mix of the encoder's layers.

    ``skip`` [L_dec, L_enc] holds the scalar weights of the paper's trainable skip connections: block l's memory is
    sum_k skip[l, k] H^k. It starts as one-hot on the last layer, which is the plain decoder.
    """

    def __init__(
        self, grid: int, encoder_width: int, encoder_depth: int, depth: int, width: int, heads: int, out: int
    ) -> None:
        """``out`` channels are predicted for each of grid x grid tokens."""
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2, width), requires_grad=False)
        self.skip = nn.Parameter(torch.empty(depth, encoder_depth))
        self.blocks = nn.ModuleList(CrossBlock(width, encoder_width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, out)

    def forward(self, layers: list[Tensor], target_ids: Tensor, self_mask: Tensor, memory_mask: Tensor) -> Tensor:
        """Encoder layers L x [B, n_s, D] and query ids [B, n_t] to predictions [B, n_t, out]."""
        stacked = torch.stack(layers)
        y = self.mask_token + self.pos_embed[0][target_ids]
        for weights, block in zip(self.skip, self.blocks, strict=True):
            memory = torch.einsum("k,kbnd->bnd", weights, stacked)
            y = block(y, memory, self_mask, memory_mask)
        return self.head(self.norm(y))


class RandSAC(Method):
    """The method with square segments, hierarchical order and skip connections."""

    def __init__(self, cfg: "Config") -> None:
        """Empty weights; raises ValueError when the segments do not tile the grid or there is only one."""
        super().__init__()
        method, shape = cfg.method, cfg.shape
        self.seed, self.grid, self.patch_size = cfg.train.seed, cfg.grid, shape.patch_size
        self.segments = square_segments(cfg.grid, method.segment_size)
        per_side = cfg.grid // method.segment_size
        self.partition = square_segments(per_side, method.partition_size)
        if per_side < 2:
            raise ValueError(
                "RandSAC needs at least two segments (K >= 2): make method.segment_size smaller than the grid"
            )
        self.encoder = build_encoder(shape, cfg.data.image_size, class_token=False, drop_path=cfg.model.drop_path)
        # The decoder reads the blocks' raw outputs, so the final norm has no gradient here: it stays the identity's.
        self.encoder.norm.requires_grad_(False)
        self.decoder = SegmentDecoder(cfg.grid, shape.width, shape.depth, method.decoder_depth, method.decoder_width,
                                      method.decoder_heads, 3 * shape.patch_size**2)  # fmt: skip

    def reset_parameters(self) -> None:
        """Fill all weights from the seed."""
        width = self.decoder.pos_embed.shape[-1]
        skip = torch.zeros(self.decoder.skip.shape)
        skip[:, -1] = 1
        initialise(self, self.seed, {
            "encoder.pos_embed": sincos_2d(self.grid, self.encoder.embed_dim, class_token=False),
            "decoder.pos_embed": sincos_2d(self.grid, width, class_token=False),
            "decoder.skip": skip,
        })  # fmt: skip

    def draw(self, keys: Tensor) -> RankDraw:
        """A rank for each token, another order for each key (int64 [B], CPU)."""
        ranks = hierarchical_ranks(keys, self.segments, self.partition)
        return RankDraw(drop_path_keep(keys, drop_path_rates(self.encoder)), ranks)

    def encode(self, patches: Tensor, source_ids: Tensor, mask: Tensor, keep: Tensor | None) -> list[Tensor]:
        """The output of every block, L x [B, n_s, D], for patches [B, n_s, C, p, p] under ``mask`` [n_s, n_s]."""
        x, layers = embed(self.encoder, patches, source_ids), []
        for index, block in enumerate(self.encoder.blocks):
            x = block(x, attn_mask=mask, keep=None if keep is None else keep[index])
            layers.append(x)
        return layers

    def predict(self, images: Tensor, draw: RankDraw, teacher: nn.Module | None = None) -> Prediction:
        """Standardised pixels of all tokens but the first segment's, in order of rank. Images uint8 [B, 3, H, W]."""
        patches = patchify(normalise(images), self.patch_size)
        by_rank = draw.ranks.sort(dim=1, stable=True).indices
        source_ids = by_rank[:, : by_rank.shape[1] - draw.sizes[-1]]
        target_ids = by_rank[:, draw.sizes[0] :]
        source_mask, target_mask, memory_mask = block_masks(draw.sizes, images.device)
        layers = self.encode(gather_tokens(patches, source_ids), source_ids, source_mask, draw.drop_path)
        pred = self.decoder(layers, target_ids, target_mask, memory_mask)
        target = standardise(pixel_rows(gather_tokens(patches, target_ids)))
        return Prediction(pred.float(), target, target_ids, torch.ones_like(target_ids, dtype=torch.float32))

    @torch.no_grad()
    def figure(self, images: Tensor, draw: RankDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, its segments and their order, and the predictions (the first segment is given, not predicted)."""
        rows = pixel_rows(patchify(normalise(images), self.patch_size))
        prediction = self.predict(images, draw)
        restored = restore_pixels(prediction.pred, gather_tokens(rows, prediction.token_ids))
        index = prediction.token_ids[..., None].expand_as(restored)
        painted = rows.scatter(1, index, restored)
        given = torch.full_like(rows, -10.0).where((draw.ranks > 0)[..., None], rows)
        order = draw.ranks.cpu().view(-1, self.grid, self.grid).numpy()
        return panels([
            ("image", list(rows_to_image(rows))),
            ("order of segments", list(order)),
            ("first segment", list(rows_to_image(given))),
            ("predicted", list(rows_to_image(painted))),
        ])  # fmt: skip
