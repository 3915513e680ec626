"""MAE's linear recipe (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022, appendix A.1).

A linear head behind a BatchNorm without affine, trained by LARS on random crops and flips; the features of each crop are
computed at each step by the frozen encoder. MAE's published figures are of the class token and of bicubic images
(``eval.pooling=cls data.resample=bicubic``); its BatchNorm sees a GPU's images, this one the global batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data import Loader
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


class LinearHead(nn.Linear):
    """Logits [B, C] of the one token in [B, 1, D]; first weights N(0, 0.01), biases 0."""

    def __init__(self, width: int, num_classes: int, seed: int) -> None:
        """First weights are a function of the seed."""
        super().__init__(width, num_classes)
        with torch.no_grad():
            self.weight.normal_(std=0.01, generator=generator(seed, "linear_mae"))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x[:, 0])


def build_lars(parameters: Iterable[nn.Parameter], peak: float) -> torch.optim.Optimizer:
    """LARS (You et al., 2017) with momentum 0.9, no decay; matrices are adapted with trust 0.001, biases are not."""
    from timm.optim.lars import Lars

    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if (p.ndim > 1) == adapted], "peak": peak, "always_adapt": adapted}
        for adapted in (True, False)
    ]
    optimizer: torch.optim.Optimizer = Lars(groups, lr=peak, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)
    return optimizer


def _build(session: Session, loader: Loader, tested: Loader) -> tuple[Probe, Schedule, Int64]:
    """The probe, its schedule and the ids of its training images."""
    recipe, pooling, seed = session.cfg.eval.mae, session.cfg.eval.pooling, session.cfg.train.seed
    width = session.encoder.embed_dim
    tokens = block_tokens(session, [len(session.encoder.blocks)], pooling)
    ids = session.ids("train", loader)
    num_classes, schedule = plan(session, loader, tested, ids, recipe, "eval.mae")
    heads = nn.ModuleDict({"linear": LinearHead(width, num_classes, seed)}).to(session.device)
    peak = recipe.base_lr * schedule.batch / 256
    path = state_path(session, f"linear_mae{'_cls' if pooling == 'cls' else ''}_{session.weights}")
    key = depends_on(session, loader, schedule, peak=peak, pooling=pooling, classes=num_classes)
    norm, optimizer = TokenNorm(1, width).to(session.device), build_lars(heads.parameters(), peak)
    return Probe(tokens, norm, heads, {"linear": 0}, optimizer, path, key), schedule, ids


def mae_linear(session: Session) -> tuple[float, int, int]:
    """(top-1 in percent, training images, test images), on all ranks; goes on where it was saved.

    Raises UserError for settings that cannot be trained with, Stopped after a signal.
    """
    with session.images("train", augment=True) as loader, session.images("val") as tested:
        with session.world.together():
            probe, schedule, ids = _build(session, loader, tested)
        fit(probe, session, schedule, loader, ids)
        (top1,) = correct(probe, session, tested, session.ids("val", tested), "test").values()
    return top1, len(ids), tested.num_samples
