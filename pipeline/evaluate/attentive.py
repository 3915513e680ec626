"""The attentive probe of AIM (El-Nouby et al., "Scalable pre-training of large autoregressive image models", ICML 2024):
a learned query attends to the frozen tokens of a block, and a linear head classifies what it gathers.

Heads on several blocks and at several learning rates are trained in one pass over the images, and the best is chosen on a
tenth of the training images that no head is trained on, as the linear heads are. They see patch tokens only, so that
methods with and without a class token are compared on the same. AIM itself gives its head the mean of the last six layers
before the norm and trains it by another schedule: figures are near each other's, not the same probe's.
"""

import torch
from torch import Tensor, nn

from pipeline.config import UserError
from pipeline.data import Loader
from pipeline.evaluate.heads import HeadsReport, split
from pipeline.evaluate.session import Session
from pipeline.evaluate.trained import (
    Probe,
    Schedule,
    TokenNorm,
    block_tokens,
    correct,
    depends_on,
    fit,
    generator,
    plan,
    state_path,
)
from pipeline.keys import Int64


class AttentiveHead(nn.Module):
    """Logits [B, C] of normalised tokens [B, N, D]: cross-attention of learned queries, their mean, a linear layer.

    No biases and no output projection. As the queries are the same for all images, they are put through the keys' matrix once,
    and what a head of attention gathers through the values' matrix: equal to projecting every token, in far fewer FLOPs.
    """

    def __init__(self, width: int, num_heads: int, num_queries: int, num_classes: int, seed: int) -> None:
        """First values, a function of the seed: torch's of a linear layer, queries N(0, 0.02)."""
        super().__init__()
        self.num_heads = num_heads
        first = generator(seed, "attentive")
        bound = width**-0.5
        self.query = nn.Parameter(0.02 * torch.randn(num_queries, width, generator=first))
        self.key, self.value, self.linear = (
            nn.Parameter(torch.empty(rows, width).uniform_(-bound, bound, generator=first))
            for rows in (width, width, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        heads = self.num_heads
        width = self.query.shape[1]
        query = self.query.view(-1, heads, width // heads) * (width // heads) ** -0.5
        asked = torch.einsum("qhe,hed->qhd", query, self.key.view(heads, -1, width))
        weight = torch.einsum("bnd,qhd->bqhn", x, asked).softmax(-1)
        gathered = torch.einsum("bqhn,bnd->bhd", weight, x) / len(query)
        pooled = torch.einsum("bhd,hed->bhe", gathered, self.value.view(heads, -1, width))
        return pooled.flatten(1) @ self.linear.T


def swept_blocks(session: Session) -> tuple[int, ...]:
    """Numbers of the blocks, from 1: those of the setting, else the last and every quarter of the depth. Raises UserError."""
    depth, wanted = len(session.encoder.blocks), session.cfg.eval.attentive.blocks
    if wanted is None:
        return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3, 4)}))
    if len(set(wanted)) < len(wanted) or max(wanted) > depth:
        raise UserError(
            f"eval.attentive.blocks = {list(wanted)}: should be different numbers from 1 to {depth}, the encoder's depth"
        )
    return tuple(sorted(wanted))


def _build(
    session: Session, loader: Loader, tested: Loader, fitted: Int64, blocks: tuple[int, ...]
) -> tuple[Probe, Schedule]:
    """The probe of a head on each block at each rate, the last block's first, and its schedule."""
    recipe, seed, device = session.cfg.eval.attentive, session.cfg.train.seed, session.device
    width, num_heads = session.encoder.embed_dim, session.cfg.shape.heads
    places = [(block, index) for block in reversed(blocks) for index in range(len(recipe.lrs))]
    num_classes, schedule = plan(session, loader, tested, fitted, recipe, "eval.attentive")
    heads = nn.ModuleDict({f"{block}/{index}": AttentiveHead(width, num_heads, recipe.queries, num_classes, seed)
                           for block, index in places}).to(device)  # fmt: skip
    groups = [{"params": [p for block in blocks for p in heads[f"{block}/{index}"].parameters()], "peak": lr}
              for index, lr in enumerate(recipe.lrs)]  # fmt: skip
    key = depends_on(session, loader, schedule, lrs=[*recipe.lrs], blocks=[*blocks], queries=recipe.queries,
                     weight_decay=recipe.weight_decay, classes=num_classes)  # fmt: skip
    block_of = {f"{block}/{index}": blocks.index(block) for block, index in places}
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    path = state_path(session, f"attentive_{session.weights}")
    norm = TokenNorm(len(blocks), width).to(device)
    return Probe(block_tokens(session, blocks), norm, heads, block_of, optimizer, path, key), schedule


def attentive(session: Session) -> tuple[HeadsReport, int, int]:
    """(report, training images, test images), on all ranks; goes on where it was saved.

    Of equal heads the last block, then the first rate wins. Raises UserError for settings that cannot be trained with, Stopped
    after a signal.
    """
    lrs = session.cfg.eval.attentive.lrs
    with (
        session.images("train", augment=True) as loader,
        session.images("train") as whole,
        session.images("val") as tested,
    ):
        with session.world.together():
            blocks, ids = swept_blocks(session), session.ids("train", loader)
            fitted, held = (ids[some.numpy()] for some in split(len(ids), session.cfg.train.seed))
            probe, schedule = _build(session, loader, tested, fitted, blocks)
        fit(probe, session, schedule, loader, fitted)
        scores = correct(probe, session, whole, held, "held-out images")
        best = max(scores, key=lambda name: scores[name])  # of equal ones the first
        top1 = correct(probe, session, tested, session.ids("val", tested), "test")[best]
    held_out = {f"block {block}": [scores[f"{block}/{index}"] for index in range(len(lrs))] for block in blocks}
    block, index = best.split("/")
    report = HeadsReport(held_out, lrs, len(held), f"block {block}", lrs[int(index)], top1)
    return report, len(ids), tested.num_samples
