"""RandSAC: random segments with autoregressive coding (Hua et al., ICLR 2023, arXiv 2203.12054).

Tokens are grouped in segments, segments get a random order, and each segment's pixels are predicted from all
segments before it: a mask keeps every token from seeing its own segment's future in the encoder, and its own
segment in the decoder's memory.
"""

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.costs import padded_tokens, segment_quota
from pipeline.methods.common import (
    Method,
    Prediction,
    RankDraw,
    drop_path_rates,
    panels,
    restore_pixels,
    rows_to_image,
)
from pipeline.segments import (
    Layout,
    blob_partition,
    blob_segments,
    drop_in_segments,
    drop_path_keep,
    gather_tokens,
    merge_prefix,
    padded_layout,
    segment_ranks,
    shuffled_segments,
    sorted_layout,
    square_segments,
)
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
    from pipeline.settings import RandSACConfig

RANK_BINS = 15  # at most so many losses by rank in the log


class SegmentDecoder(nn.Module):
    """Queries are positions and one learned token; each block reads its own mix of the encoder's layers.

    ``skip`` [L_dec, L_enc] holds the scalar weights of the paper's trainable skip connections: block l's memory is
    sum_k skip[l, k] H^k, raw block outputs with a norm of the decoder block's own. One-hot on the last layer is the plain
    decoder. Without skip connections the memory is the encoder's output after its final norm.
    """

    def __init__(self, grid: int, encoder_width: int, encoder_depth: int, method: "RandSACConfig", out: int) -> None:
        """``out`` channels are predicted for each of grid x grid tokens."""
        super().__init__()
        depth, width, skips = method.decoder_depth, method.decoder_width, method.skip != "none"
        self.mask_token = nn.Parameter(torch.empty(1, 1, width)) if method.query_token else None
        self.null_token = nn.Parameter(torch.empty(1, 1, encoder_width)) if method.predict_first else None
        self.pos_embed = nn.Parameter(torch.empty(1, grid**2, width), requires_grad=False)
        self.skip = nn.Parameter(torch.empty(depth, encoder_depth)) if skips else None
        self.blocks = nn.ModuleList(
            CrossBlock(width, encoder_width, method.decoder_heads, self_attention=method.decoder_self_attention,
                       norm_memory=skips) for _ in range(depth))  # fmt: skip
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, out)

    def memories(self, layers: list[Tensor]) -> list[Tensor]:
        """What each block reads, [B, n_s, D], with the null token in front where the first segment is predicted."""
        if self.skip is None:
            memories = [layers[-1]] * len(self.blocks)
        else:
            stacked = torch.stack(layers)
            memories = [torch.einsum("k,kbnd->bnd", weights, stacked) for weights in self.skip]
        if self.null_token is None:
            return memories
        null = self.null_token.expand(len(layers[-1]), -1, -1)
        return [torch.cat([null, memory], dim=1) for memory in memories]

    def forward(self, layers: list[Tensor], target_ids: Tensor, self_mask: Tensor, memory_mask: Tensor) -> Tensor:
        """Encoder layers L x [B, n_s, D] and query ids [B, n_t] to predictions [B, n_t, out]."""
        y = self.pos_embed[0][target_ids]
        if self.mask_token is not None:
            y = self.mask_token + y
        for memory, block in zip(self.memories(layers), self.blocks, strict=True):
            y = block(y, memory, self_mask, memory_mask)
        return self.head(self.norm(y))


class RandSAC(Method):
    """The method with every segmentation, order, decoder and option of ``RandSACConfig``."""

    def __init__(self, cfg: "Config") -> None:
        """Empty weights; raises ValueError when squares do not tile the grid or there is only one."""
        super().__init__()
        method, shape = cfg.method, cfg.shape
        self.method, self.seed, self.grid, self.patch_size = method, cfg.train.seed, cfg.grid, shape.patch_size
        self.num_segments, self.partition = method.num_segments, None
        if method.segments == "square":
            self.squares = square_segments(cfg.grid, method.segment_size)
            per_side = cfg.grid // method.segment_size
            self.num_segments = per_side**2
            if per_side < 2:
                raise ValueError(
                    "RandSAC needs at least two segments (K >= 2): make method.segment_size smaller than the grid"
                )
            if method.order == "hierarchical":
                self.partition = square_segments(per_side, method.partition_size)
        num_tokens = cfg.grid**2
        self.num_padded = padded_tokens(num_tokens, self.num_segments, method.token_keep)
        sizes = range(num_tokens + 1)
        self.quota = torch.tensor([segment_quota(n, method.token_keep) for n in sizes], device="cpu")
        self.encoder = build_encoder(shape, cfg.data.image_size, class_token=False, drop_path=cfg.model.drop_path)
        # With skip connections the decoder reads the blocks' raw outputs: the final norm has no gradient and stays the identity's.
        self.encoder.norm.requires_grad_(method.skip == "none")
        self.decoder = SegmentDecoder(cfg.grid, shape.width, shape.depth, method, 3 * shape.patch_size**2)

    def reset_parameters(self) -> None:
        """Fill all weights from the seed."""
        fixed = {
            "encoder.pos_embed": sincos_2d(self.grid, self.encoder.embed_dim, class_token=False),
            "decoder.pos_embed": sincos_2d(self.grid, self.method.decoder_width, class_token=False),
        }
        if self.method.skip == "last":
            fixed["decoder.skip"] = torch.eye(len(self.encoder.blocks))[-1].expand(self.decoder.skip.shape)
        elif self.method.skip == "uniform":
            fixed["decoder.skip"] = torch.full(self.decoder.skip.shape, 1 / len(self.encoder.blocks))
        initialise(self, self.seed, fixed)

    def _ranks(self, keys: Tensor) -> Tensor:
        """Ranks [B, N] with dropped tokens as -1."""
        method, partition = self.method, self.partition
        if method.segments == "square":
            segments = self.squares.expand(len(keys), -1)
            partition = None if partition is None else partition.expand(len(keys), -1)
        else:
            segments = blob_segments(keys, self.grid, method.num_segments, method.blob_std)
            if method.order == "hierarchical":
                partition = blob_partition(
                    keys, segments, self.grid, method.num_segments, method.num_partitions, method.blob_std
                )
        if method.shuffled:
            segments = shuffled_segments(keys, segments)
        ranks = segment_ranks(keys, segments, self.num_segments, raster=method.order == "raster", partition=partition)
        if method.token_keep < 1:
            ranks = drop_in_segments(keys, ranks, self.quota)
        return merge_prefix(keys, ranks) if method.prefix else ranks

    def draw(self, keys: Tensor, batch_key: Tensor | None = None, labels: Tensor | None = None) -> RankDraw:
        """A rank for each token, another order for each key (int64 [B], CPU), or one for all with ``share_segments``."""
        keep = drop_path_keep(keys, drop_path_rates(self.encoder))
        if self.method.share_segments:
            shared = keys[:1] if batch_key is None else batch_key
            return RankDraw(keep, self._ranks(shared).expand(len(keys), -1).contiguous())
        return RankDraw(keep, self._ranks(keys))

    def layout(self, draw: RankDraw) -> Layout:
        """Tokens and masks: sorted by rank under one mask where all images have the same sizes, else at a fixed shape."""
        first = self.method.predict_first
        if draw.sizes is not None and not self.method.ragged:
            return sorted_layout(draw.ranks, draw.sizes, predict_first=first)
        shared = self.method.share_segments and draw.shared
        return padded_layout(draw.ranks, self.num_padded, predict_first=first, shared=shared)

    def encode(self, patches: Tensor, source_ids: Tensor, mask: Tensor, keep: Tensor | None) -> list[Tensor]:
        """The output of every block, L x [B, n_s, D], for patches [B, n_s, C, p, p] under ``mask``; normed without skips."""
        x, layers = embed(self.encoder, patches, source_ids), []
        for index, block in enumerate(self.encoder.blocks):
            x = block(x, attn_mask=mask, factors=block.factors(None if keep is None else keep[index]))
            layers.append(x)
        return layers if self.decoder.skip is not None else [self.encoder.norm(x)]

    def predict(self, images: Tensor, draw: RankDraw, teacher: nn.Module | None = None) -> Prediction:
        """Pixels of all tokens but the first segment's, standardised with ``normalise_target``. Images uint8 [B, 3, H, W]."""
        patches = patchify(normalise(images), self.patch_size)
        layout = self.layout(draw)
        source = gather_tokens(patches, layout.source_ids)
        layers = self.encode(source, layout.source_ids, layout.source_mask, draw.drop_path)
        pred = self.decoder(layers, layout.target_ids, layout.target_mask, layout.memory_mask)
        rows = pixel_rows(gather_tokens(patches, layout.target_ids))
        target = standardise(rows) if self.method.normalise_target else rows
        return Prediction(pred.float(), target, layout.target_ids, layout.weight)

    def monitor(self, prediction: Prediction, losses: Tensor, draw: RankDraw) -> dict[str, Tensor]:
        """Mean loss of the tokens of each rank, in at most 15 bins of equal width; the name says a bin's first rank.

        A predicted first segment, which sees nothing, has a bin of its own. NaN where this batch has no such token
        (blobs have fewer segments at times).
        """
        width = -(-(self.num_segments - 1) // RANK_BINS)
        first = [0] if self.method.predict_first else []
        bins = [*first, *range(1, self.num_segments, width)]
        ranks = draw.ranks.gather(1, prediction.token_ids)
        index = ((ranks - 1) // width + len(first)).clamp(0, len(bins) - 1)
        total, count = losses.new_zeros(2, len(bins)).unbind(0)
        total.index_add_(0, index.flatten(), (losses * prediction.weight).flatten())
        count.index_add_(0, index.flatten(), prediction.weight.flatten())
        means = total / count
        return {f"loss_rank_{start:02d}": means[place] for place, start in enumerate(bins)}

    @torch.no_grad()
    def figure(self, images: Tensor, draw: RankDraw, teacher: nn.Module | None = None) -> Image.Image:
        """Image, its segments in the order of generation, what is given, and the predictions; dropped tokens stay blank."""
        rows = pixel_rows(patchify(normalise(images), self.patch_size))
        prediction = self.predict(images, draw)
        true = gather_tokens(rows, prediction.token_ids)
        restored = restore_pixels(prediction.pred, true) if self.method.normalise_target else prediction.pred
        index = prediction.token_ids[..., None].expand_as(restored)
        blank = torch.full_like(rows, -10.0)
        given = rows.where((draw.ranks == 0)[..., None], blank)
        painted = blank if self.method.predict_first else given
        painted = painted.scatter(1, index, restored.where(prediction.weight[..., None] > 0, painted.gather(1, index)))
        order = draw.ranks.where(draw.ranks >= 0, torch.nan).cpu().view(-1, self.grid, self.grid).numpy()
        columns = [("image", list(rows_to_image(rows))), ("generation, dark first", list(order))]
        if not self.method.predict_first:
            columns.append(("given", list(rows_to_image(given))))
        return panels([*columns, ("predicted", list(rows_to_image(painted)))])
