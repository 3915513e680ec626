"""What the features are like while a run trains: a kNN probe of some images, how far features spread, and whether they collapse.

A collapse is told and nothing else: a run that looked like one has had the best features (PCAE at a high rate), and the
probes decide.
"""

import logging
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.check import require_same_classes
from pipeline.config import Config, UserError
from pipeline.engine import Engine
from pipeline.evaluate.features import Features
from pipeline.evaluate.knn import knn_accuracy
from pipeline.launch import Portion, World
from pipeline.methods.common import Draw
from pipeline.order import Plan
from pipeline.runs import open_images, spread

log = logging.getLogger("patchmill")

# What a process computes at a time, always: the sums, and so the bits, are those of any number of processes.
CHUNK = 64
Part = dict[int, tuple[Tensor, Tensor]]
MIN_RANK, MIN_RANK_SHARE, MAX_COSINE = 2.0, 0.005, 0.999


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values over their sum, of rows [N, D] as they are: between 1 and min(N, D).

    Roy & Vetterli, "The effective rank", EUSIPCO 2007. Zeros have 1, what is not finite has NaN.
    """
    if not features.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def mean_cosine(features: Tensor) -> float:
    """The mean cosine of two different rows of [N, D], N at least 2: 1 when all point the same way; a row of zeros has 0."""
    unit, number = F.normalize(features.double()), len(features)
    return float((unit.sum(0).square().sum() - unit.square().sum()) / (number * (number - 1)))


def collapse(rank: float, cosine: float, width: int) -> str | None:
    """What says that features of ``width`` columns have collapsed, None when nothing does.

    That is an effective rank under 2 or 0.5 % of the width, a mean cosine of two images over 0.999, or values that are not
    finite. Untrained encoders have a rank of 12 to 25 (widths 96 to 1024) and a cosine of 0.70 to 0.91.
    """
    lowest = max(MIN_RANK, MIN_RANK_SHARE * width)
    if math.isnan(rank):
        return "they are not finite"
    if rank < lowest:
        return f"effective rank {rank:.2f} of {width} is under {lowest:.2f}"
    if cosine > MAX_COSINE:
        return f"mean cosine {cosine:.4f} of two images is over {MAX_COSINE}"
    return None


def my_chunks(chunks: int, world: World) -> list[int]:
    """The chunks that this rank computes: all ranks compute as many, since they gather weights together; the rest twice."""
    return [number % chunks for number in range(world.rank, -(-chunks // world.size) * world.size, world.size)]


def _joined(parts: list[Part]) -> Features:
    """What the ranks have, in the order of ids."""
    chunks = {number: chunk for part in parts for number, chunk in part.items()}
    features, labels = zip(*(chunks[number] for number in sorted(chunks)), strict=True)
    return Features(torch.cat(features), torch.cat(labels))


class Online:
    """``eval.online_images`` of data.train and of data.val, spread evenly over each: always the same, cut from the centre."""

    name = "online signals"

    def __init__(self, cfg: Config, plan: Plan) -> None:
        """Raises UserError when there are no labels that agree, or fewer training images than neighbours."""
        require_same_classes(cfg)
        self._cfg, self._plan = cfg, plan
        self._loaders = [open_images(cfg, which, augment=False) for which in ("train", "val")]
        self._ids = [spread(loader.num_samples, cfg.eval.online_images) for loader in self._loaders]
        if len(self._ids[0]) < cfg.eval.knn_k:
            self.close()
            raise UserError(f"eval.knn_k = {cfg.eval.knn_k}: is more than the {len(self._ids[0])} images of data.train; "
                            "lower it or leave eval.online_every out")  # fmt: skip

    def due(self, step: int) -> bool:
        """Whether it is their turn after this step: every ``eval.online_every`` epochs, and at the end."""
        every = self._cfg.eval.online_every
        return every is not None and (
            step % (every * self._plan.steps_per_epoch) == 0 or step == self._plan.total_steps
        )

    def observe(self, engine: Engine, portion: Portion, world: World) -> tuple[dict[str, Any], str]:
        """Fields for the log, with the weights of now, and a line for people. All ranks call it; only the main one gets them."""
        began = time.perf_counter()
        everyone = world.gather([self._part(which, engine, world) for which in (0, 1)])
        if not world.is_main:
            return {}, ""
        train, val = (_joined([parts[which] for parts in everyone]) for which in (0, 1))
        rank, eval_ = effective_rank(train.features), self._cfg.eval
        cosine = mean_cosine(train.features)
        fields: dict[str, Any] = {"effective_rank": rank, "mean_cosine": cosine, "online_images": len(train.labels)}
        try:
            classes = int(max(train.labels.max(), val.labels.max())) + 1
            fields["online_knn"] = knn_accuracy(train, val, num_classes=classes, k=eval_.knn_k,
                                                temperature=eval_.knn_temperature)  # fmt: skip
        except UserError as error:  # what a probe refuses is no reason to stop
            log.warning("no online kNN: %s", error)
        found = collapse(rank, cosine, train.features.shape[1])
        fields |= {"collapse": found} if found else {}
        fields |= {"online_s": time.perf_counter() - began}
        score = f"kNN {fields['online_knn']:.2f} %, " if "online_knn" in fields else ""
        return fields, (f"{score}effective rank {rank:.1f} of {train.features.shape[1]}, mean cosine {cosine:.3f} "
                        f"({len(train.labels)} images, {fields['online_s']:.1f} s)")  # fmt: skip

    def _part(self, which: int, engine: Engine, world: World) -> Part:
        """Features and labels of this rank's chunks, by their number."""
        loader, ids = self._loaders[which], self._ids[which]
        chunks = np.split(ids, range(CHUNK, len(ids), CHUNK))
        mine = my_chunks(len(chunks), world)
        with loader.batches(iter([(0, chunks[number]) for number in mine])) as batches:
            return {number: (engine.call("features", batch.images, Draw(None)).cpu(), batch.labels)
                    for number, batch in zip(mine, batches, strict=True)}  # fmt: skip

    def close(self) -> None:
        """Close the images."""
        for loader in self._loaders:
            loader.close()
