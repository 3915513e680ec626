"""Methods compared: CPU seconds per image of a forward and backward pass beside the FLOPs it should cost, on one thread.

No optimizer and no loader: the images are random and every draw is made beforehand. A method's time ratio to MAE over its
FLOP ratio says whether anything but its FLOPs costs time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.bench.peer import load_peer
from pipeline.config import Config, load_config
from pipeline.estimate import flops_per_image
from pipeline.keys import sample_key
from pipeline.methods import build_method

METHODS: Final = ("mae", "pcae", "randsac")
PEER: Final = "facebookresearch/mae"
SGEMM: Final = "sgemm"
SGEMM_SIDE: Final = 2048
GOAL: Final = 1.05
PEER_GOAL: Final = 1.0


@dataclass(frozen=True)
class Row:
    """A contestant: CPU seconds per image (fastest round), A/A ratio, FLOPs per image and the share of sgemm's speed.

    ``ratio`` is ``time_ratio / flop_ratio`` to the contestant ``versus`` and should be at most ``goal``. For sgemm an
    image is one product; the peer is credited with MAE's FLOPs.
    """

    name: str
    cpu_s_per_image: float
    a_over_a: float
    flops_per_image: float
    cpu_mfu: float
    versus: str | None = None
    time_ratio: float | None = None
    flop_ratio: float | None = None
    ratio: float | None = None
    goal: float | None = None

    def __str__(self) -> str:
        """One line of a table."""
        line = (f"{self.name:<21}{self.cpu_s_per_image:9.4f} CPU s an image   A/A {self.a_over_a:.3f}   "
                f"{self.flops_per_image / 1e9:7.2f} GFLOPs   CPU MFU {self.cpu_mfu:4.0%}")  # fmt: skip
        if self.versus is None:
            return line
        return (f"{line}   to {self.versus}: time {self.time_ratio:.3f} / FLOPs {self.flop_ratio:.3f} = {self.ratio:.3f} "
                f"(goal <= {self.goal:.2f})")  # fmt: skip


def configs(model: str) -> dict[str, Config]:
    """The shipped recipes with another encoder, in fp32. Raises UserError for an encoder that they do not fit."""
    changes = [f"model.name={model}", "data.loader=synthetic", "engine.precision=fp32", "run.dir=."]
    return {name: load_config([f"imagenet/{name}_vit_b"], changes) for name in METHODS}


def random_images(batch: int, size: int) -> Tensor:
    """The same uint8 [B, 3, size, size] at each call."""
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _step(module: nn.Module, loss: Callable[[], Tensor], batch: int) -> Contestant:
    """A forward and backward pass; gradients are dropped, as before a trainer's next step."""

    def run(number: int) -> int:
        loss().backward()
        module.zero_grad(set_to_none=True)
        return batch

    return run


def _sgemm() -> Contestant:
    a, b = torch.randn(2, SGEMM_SIDE, SGEMM_SIDE, generator=torch.Generator().manual_seed(0))
    out, repeats = torch.empty_like(a), 8

    def run(number: int) -> int:
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        return repeats

    return run


def _contestants(cfgs: dict[str, Config], batch: int, peer: Path | None) -> dict[str, Contestant]:
    keys = torch.from_numpy(sample_key(0, 0, np.arange(batch)))
    found = {}
    for name, cfg in cfgs.items():
        method, images = build_method(cfg), random_images(batch, cfg.data.image_size)
        draw = method.draw(keys)
        # Ours are given uint8 images and normalise them, as in training; the peer's come normalised, as from its loader.
        found[name] = _step(method, lambda method=method, images=images, draw=draw: method(images, draw)[0], batch)
        if name == "mae" and peer is not None:
            theirs, loss = load_peer(peer, cfg, method, images, draw)
            found[PEER] = _step(theirs, loss, batch)
    return {**found, SGEMM: _sgemm()}


def compare(figures: Figures, flops: dict[str, float]) -> list[Row]:
    """Rows of measured figures: PCAE and RandSAC to MAE, MAE to the peer where there is one."""
    speed = flops[SGEMM] / figures[SGEMM][0]
    versus = {name: ("mae", GOAL) for name in METHODS if name != "mae"}
    if PEER in figures:
        versus["mae"] = (PEER, PEER_GOAL)
    rows = []
    for name, (seconds, a_over_a) in figures.items():
        row = partial(Row, name, seconds, a_over_a, flops[name], flops[name] / seconds / speed)
        if name in versus:
            other, goal = versus[name]
            time_ratio, flop_ratio = seconds / figures[other][0], flops[name] / flops[other]
            row = partial(row, other, time_ratio, flop_ratio, time_ratio / flop_ratio, goal)
        rows.append(row())
    return rows


def run(
    model: str = "vit_b", *, batch: int = 4, peer: Path | None = None, rounds: int = 8, progress: Progress | None = None
) -> list[Row]:
    """Measure MAE, PCAE and RandSAC with this encoder at equal batch; ``rounds`` is at least 8.

    ``peer`` is a checkout of facebookresearch/mae. Raises UserError when it is not, when its loss is not ours, for an
    encoder that does not fit the recipes, or when the machine is too restless to tell.
    """
    cfgs = configs(model)
    figures = measure(lambda: _contestants(cfgs, batch, peer), rounds, progress)
    flops = {name: flops_per_image(cfg).step for name, cfg in cfgs.items()}
    return compare(figures, flops | {PEER: flops["mae"], SGEMM: 2.0 * SGEMM_SIDE**3})
