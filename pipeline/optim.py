"""Parameter groups, AdamW and schedules. The schedules are pure functions of the step: nothing to save or restore."""

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from pipeline.memory import rate_scale, takes_decay
from pipeline.settings import OptimConfig

FIRST_SCALE: Final = 2.0**16
SCALES: Final = (1.0, 2.0**24)
GROWTH_STEPS: Final = 2000


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: OptimConfig, depth: int) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are trained, its moments made at once so that the state always has one shape.

    A group's ``scale`` is what its rate is multiplied by; ``depth`` of the encoder, in blocks.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        kind = not takes_decay(name, parameter.shape, settings), rate_scale(name, depth, settings)
        groups.setdefault(kind, []).append(parameter)
    described = [
        {"params": groups[kind], "weight_decay": 0.0 if kind[0] else settings.weight_decay, "scale": kind[1]}
        for kind in sorted(groups)
    ]
    optimizer = torch.optim.AdamW(described, lr=0.0, betas=settings.betas, fused=True)
    for _, parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class LossScale:
    """What fp16's loss is multiplied by, so that small gradients are not lost: a power of 2 on the device, in ``scale``.

    A step that is not finite halves it, ``GROWTH_STEPS`` good ones in a row double it (Micikevicius et al. 2018, section 3.2);
    it stays within ``SCALES``, so a run whose loss is not finite for another reason does not end with a scale of 0.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts at ``FIRST_SCALE``."""
        self.scale = torch.tensor(FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, skipped: Tensor) -> None:
        """After a step; ``skipped`` is its 1.0 or 0.0. In place, and without a wait for the device."""
        good = (self.good_steps + 1) * (1 - skipped)
        grows = (good >= GROWTH_STEPS).float()
        self.scale.mul_((1 + grows) * (1 - skipped / 2)).clamp_(*SCALES)
        self.good_steps.copy_(good * (1 - grows))


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0; ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def momentum_at(step: int, total_steps: int, first: float, last: float) -> float:
    """The teacher's momentum, half a cosine from ``first`` to ``last``, once an optimizer step; ``step`` counts from 0."""
    return last - (last - first) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
