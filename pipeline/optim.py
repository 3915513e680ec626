"""Parameter groups, AdamW and schedules. The schedules are pure functions of the step: nothing to save or restore."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.settings import OptimConfig


def takes_decay(name: str, parameter: Tensor) -> bool:
    """Weight decay is for matrices and tokens: not for biases, norms (MAE's rule) or RandSAC's skip weights."""
    return parameter.dim() > 1 and not name.endswith((".bias", ".skip"))


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], settings: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that are trained, its moments made at once so that the state always has one shape."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in trained if takes_decay(n, p)], "weight_decay": settings.weight_decay},
        {"params": [p for n, p in trained if not takes_decay(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)
    for _, parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def lr_at(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 over the warm-up, then half a cosine to 0; ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def momentum_at(step: int, total_steps: int, first: float, last: float) -> float:
    """The teacher's momentum, half a cosine from ``first`` to ``last``, once an optimizer step; ``step`` counts from 0."""
    return last - (last - first) * 0.5 * (1 + math.cos(math.pi * step / total_steps))
