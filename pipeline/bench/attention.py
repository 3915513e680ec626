"""What RandSAC's attention mask costs: CPU seconds per image with no mask, one for all images, and one an image.

RandSAC sorts tokens by rank so that all images share one mask. Measured are all blocks of the encoder, and the bare
attention as many times as there are blocks; forward and backward, one thread.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.config import Config, load_config
from pipeline.methods import build_method
from pipeline.segments import block_masks, rank_mask

SEGMENT_TOKENS: Final = 4
PARTS: Final = ("encoder", "attention alone")
MASKS: Final = ("no mask", "shared mask", "mask per image")
GOAL: Final = 1.05


@dataclass(frozen=True)
class Row:
    """A contestant: CPU seconds per image (fastest round), A/A ratio, and the ratio to the same without a mask.

    ``goal``: what the ratio should be at most; None where none is set.
    """

    name: str
    cpu_s_per_image: float
    a_over_a: float
    to_no_mask: float
    goal: float | None

    def __str__(self) -> str:
        """One line of a table."""
        goal = "" if self.goal is None else f" (goal <= {self.goal:.2f})"
        return (f"{self.name:<32}{self.cpu_s_per_image:9.4f} CPU s an image   A/A {self.a_over_a:.3f}   "
                f"to no mask {self.to_no_mask:.3f}{goal}")  # fmt: skip


def config() -> Config:
    """RandSAC's ViT-B with 14 x 14 tokens, in fp32."""
    changes = ["data.image_size=224", "method.segment_size=2", "method.partition_size=7", "data.loader=synthetic",
               "engine.precision=fp32", "run.dir=."]  # fmt: skip
    return load_config(["imagenet/randsac_vit_b"], changes)


def masks(num_tokens: int, batch: int) -> dict[str, Tensor | None]:
    """No mask, a shared one of rank-sorted tokens bool [n, n], and one an image in raster order [B, 1, n, n]."""
    # The source mask lacks the last segment, which nothing is predicted from: one more than the tokens fill.
    sizes = (SEGMENT_TOKENS,) * (num_tokens // SEGMENT_TOKENS + 1)
    shared = block_masks(sizes, torch.device("cpu"))[0]
    ranks = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(0)).argsort(dim=1) // SEGMENT_TOKENS
    return dict(zip(MASKS, (None, shared, rank_mask(ranks, ranks)[:, None]), strict=True))


def _contestants(cfg: Config, batch: int) -> dict[str, Contestant]:
    shape, num_tokens, generator = cfg.shape, cfg.grid**2, torch.Generator().manual_seed(1)
    encoder = build_method(cfg).encoder
    tokens = torch.randn(batch, num_tokens, shape.width, generator=generator, requires_grad=True)
    head_shape = (batch, shape.heads, num_tokens, shape.width // shape.heads)
    heads = [torch.randn(head_shape, generator=generator, requires_grad=True) for _ in range(3)]  # q, k, v

    def whole(mask: Tensor | None) -> int:
        x = tokens
        for block in encoder.blocks:
            x = block(x, attn_mask=mask)
        x.backward(tokens.detach())
        encoder.zero_grad(set_to_none=True)
        tokens.grad = None
        return batch

    def alone(mask: Tensor | None) -> int:
        for _ in encoder.blocks:
            F.scaled_dot_product_attention(*heads, attn_mask=mask).backward(heads[0].detach())
            for tensor in heads:
                tensor.grad = None
        return batch

    return {f"{part}, {name}": lambda number, run=run, mask=mask: run(mask)
            for part, run in zip(PARTS, (whole, alone), strict=True)
            for name, mask in masks(num_tokens, batch).items()}  # fmt: skip


def compare(figures: Figures) -> list[Row]:
    """Rows of measured figures: each to the first of its part; the goal is for the encoder with a mask."""
    rows = []
    for part, goal in zip(PARTS, (GOAL, None), strict=True):
        base = figures[f"{part}, {MASKS[0]}"][0]
        for mask in MASKS:
            seconds, a_over_a = figures[f"{part}, {mask}"]
            rows.append(Row(f"{part}, {mask}", seconds, a_over_a, seconds / base, None if mask == MASKS[0] else goal))
    return rows


def run(*, batch: int = 4, rounds: int = 8, progress: Progress | None = None) -> list[Row]:
    """Measure at ViT-B's width and 196 tokens; ``rounds`` is at least 8.

    Raises UserError when the machine is too restless to tell.
    """
    return compare(measure(lambda: _contestants(config(), batch), rounds, progress))
