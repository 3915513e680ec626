"""The cost model: token counts and FLOPs of each method, from shapes alone. No torch.

FLOPs are 2 x multiply-adds of matrix products and attention scores; softmax, norms, activations, the optimizer
and the EMA are left out. Scores are counted dense: a mask saves nothing here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Final


@dataclass(frozen=True)
class ModelShape:
    """A vision transformer: width D, depth in blocks, attention heads, patch side in pixels. MLP ratio 4."""

    width: int
    depth: int
    heads: int
    patch_size: int
    timm_name: str


MODELS: Final[dict[str, ModelShape]] = {
    "vit_p": ModelShape(96, 4, 3, 4, "vit_tiny_patch16_224"),
    "vit_t": ModelShape(192, 12, 3, 4, "vit_tiny_patch16_224"),
    "vit_s": ModelShape(384, 12, 6, 16, "vit_small_patch16_224"),
    "vit_b": ModelShape(768, 12, 12, 16, "vit_base_patch16_224"),
    "vit_l": ModelShape(1024, 24, 16, 16, "vit_large_patch16_224"),
    "vit_h": ModelShape(1280, 32, 16, 14, "vit_huge_patch14_224"),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image: ``forward`` (teacher included) and a training ``step`` (forward and backward)."""

    forward: float
    step: float


def keep_count(total: int, ratio: float) -> int:
    """floor(total x ratio), exactly: the ratio is the decimal that was written, so 0.29 of 100 is 29."""
    return floor(total * Fraction(repr(ratio)))


def num_visible(num_tokens: int, mask_ratio: float) -> int:
    """Visible tokens, floor(N x (1 - mask ratio)) in exact arithmetic: 196 at 0.85 gives 29."""
    return floor(num_tokens * (1 - Fraction(repr(mask_ratio))))


def segment_quota(size: int, keep: float) -> int:
    """Tokens that stay of a segment of ``size``: floor(size x keep), at least one."""
    return max(1, keep_count(size, keep))


def padded_tokens(num_tokens: int, num_segments: int, keep: float) -> int:
    """The most tokens that can stay of an image whose segments have any sizes: each may round up to one."""
    return min(num_tokens, keep_count(num_tokens, keep) + num_segments) if keep < 1 else num_tokens


def drop_blocks(depth: int, stages: int, case: int = 0) -> tuple[int, ...]:
    """Block indices after which the PCAE teacher drops tokens, with per = depth // stages (the public code's drop_case).

    Case 0: per x i, the default; 1: per x (i + 1) - 1; 2: evenly from the first to the last block, rounded down; 3: the
    first blocks. Raises ValueError when there are more stages than blocks.
    """
    if not 1 <= stages <= depth:
        raise ValueError(f"{stages} drop stages do not fit {depth} blocks")
    per, last = depth // stages, depth - 1
    rules = (
        lambda i: per * i,
        lambda i: per * (i + 1) - 1,
        lambda i: last * i // max(1, stages - 1),
        lambda i: i,
    )
    return tuple(rules[case](i) for i in range(stages))


def teacher_schedule(
    num_masked: int, depth: int, stages: int, keep_ratio: float, case: int = 0
) -> tuple[list[int], int]:
    """(tokens that enter each block of the PCAE teacher, tokens that survive all stages)."""
    drops = drop_blocks(depth, stages, case)
    entering, tokens = [], num_masked
    for block in range(depth):
        entering.append(tokens)
        if block in drops:
            tokens = keep_count(tokens, keep_ratio)
    return entering, tokens


def block_flops(tokens: int, width: int) -> float:
    """A self-attention block: 4 D^2 attention and 8 D^2 MLP weights a token, two score products."""
    return 2 * (12 * tokens * width**2 + 2 * tokens**2 * width)


def embed_flops(tokens: int, width: int, patch_size: int) -> float:
    """The patch embedding of ``tokens`` RGB patches."""
    return 2 * tokens * 3 * patch_size**2 * width


def linear_flops(tokens: int, width_in: int, width_out: int) -> float:
    """A linear layer on ``tokens`` rows."""
    return 2 * tokens * width_in * width_out


def cross_block_flops(queries: int, memory: int, width: int, memory_width: int, *, self_attention: bool) -> float:
    """RandSAC's decoder block: self-attention unless left out, cross-attention to ``memory`` rows, MLP."""
    among = 4 * queries * width**2 + 2 * queries**2 * width if self_attention else 0
    cross = 2 * queries * width**2 + 2 * memory * memory_width * width + 2 * queries * memory * width
    return 2 * (among + cross + 8 * queries * width**2)


def randsac_flops(
    shape: ModelShape, encoded: int, queries: int, decoder_depth: int, decoder_width: int, *,
    self_attention: bool, mixed_layers: int, null_token: bool,
) -> Flops:  # fmt: skip
    """RandSAC: ``encoded`` tokens, ``queries`` predictions; each decoder block mixes ``mixed_layers`` encoder layers (0: none)."""
    embed = embed_flops(encoded, shape.width, shape.patch_size)
    encoder = shape.depth * block_flops(encoded, shape.width)
    block = cross_block_flops(queries, encoded + null_token, decoder_width, shape.width, self_attention=self_attention)
    decoder = decoder_depth * (block + 2 * mixed_layers * encoded * shape.width)
    head = linear_flops(queries, decoder_width, 3 * shape.patch_size**2)
    forward = embed + encoder + decoder + head
    return Flops(forward, 3 * forward - embed)


def mae_flops(shape: ModelShape, tokens: int, mask_ratio: float, decoder_depth: int, decoder_width: int) -> Flops:
    """MAE: visible tokens and the class token in the encoder, all tokens in the decoder, pixels for all patches."""
    visible = num_visible(tokens, mask_ratio)
    embed = embed_flops(visible, shape.width, shape.patch_size)
    encoder = shape.depth * block_flops(visible + 1, shape.width)
    bridge = linear_flops(visible + 1, shape.width, decoder_width)
    decoder = decoder_depth * block_flops(tokens + 1, decoder_width)
    head = linear_flops(tokens - visible, decoder_width, 3 * shape.patch_size**2)
    forward = embed + encoder + bridge + decoder + head
    return Flops(forward, 3 * forward - embed)


def pcae_flops(
    shape: ModelShape,
    tokens: int,
    mask_ratio: float,
    stages: int,
    keep_ratio: float,
    decoder_depth: int,
    decoder_width: int,
    drop_case: int = 0,
) -> Flops:
    """PCAE: student on visible tokens, compressing teacher without backward, short decoder."""
    visible = num_visible(tokens, mask_ratio)
    entering, kept = teacher_schedule(tokens - visible, shape.depth, stages, keep_ratio, drop_case)
    embed = embed_flops(visible, shape.width, shape.patch_size)
    encoder = shape.depth * block_flops(visible + 1, shape.width)
    bridge = linear_flops(visible + 1, shape.width, decoder_width)
    decoder = decoder_depth * block_flops(visible + 1 + kept, decoder_width)
    head = linear_flops(kept, decoder_width, shape.width)
    teacher = embed_flops(tokens - visible, shape.width, shape.patch_size)
    teacher += sum(block_flops(count, shape.width) for count in entering)
    trained = embed + encoder + bridge + decoder + head
    return Flops(trained + teacher, 3 * trained - embed + teacher)


def finetune_tokens(num_tokens: int, depth: int, drops: Collection[int], drop_ratio: float) -> list[int]:
    """Patch tokens that enter each block, and those that are left after the last: depth + 1 numbers.

    After a block in ``drops`` floor(n x (1 - drop ratio)) stay.
    """
    counts = [num_tokens]
    for block in range(depth):
        kept = num_visible(counts[-1], drop_ratio) if block in drops else counts[-1]
        counts.append(kept)
    return counts


def finetune_flops(shape: ModelShape, tokens: Sequence[int], num_classes: int, *, class_token: bool) -> Flops:
    """A classifier with so many patch ``tokens`` in each block (``finetune_tokens``), the class token beside them."""
    embed = embed_flops(tokens[0], shape.width, shape.patch_size)
    blocks = sum(block_flops(count + class_token, shape.width) for count in tokens[:-1])
    forward = embed + blocks + linear_flops(1, shape.width, num_classes)
    return Flops(forward, 3 * forward - embed)
