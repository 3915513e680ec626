"""How often a classifier is right about data.val: every image counted once, on any number of processes."""

from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.launch import Portion, World
from pipeline.order import Plan
from pipeline.runs import open_images

TOP: Final = 5


def count(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How many of [B, C] have their label first, and among the first five; and their summed cross-entropy, float64.

    Of equal logits the lower class comes first.
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    before = ((logits > own) | ((logits == own) & (classes < labels[:, None]))).sum(1)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return {"top1": (before < 1).sum(), "top5": (before < TOP).sum(), "loss": loss}


class Accuracy:
    """Top-1 and top-5 in percent and the cross-entropy of the validation images, of the weights and of their average.

    Top-5 is left out where there are no more classes.
    """

    name = "accuracy"

    def __init__(self, cfg: Config, plan: Plan) -> None:
        """Raises UserError when data.val is not set, broken or empty."""
        self._every, self._last = cfg.eval.loss_every, plan.total_steps
        self._loader, self._batch = open_images(cfg, "val", augment=False), cfg.eval.batch_size
        self._top5 = self._loader.num_classes > TOP

    def due(self, step: int) -> bool:
        """Every ``eval.loss_every`` steps, and after the last one."""
        return step == self._last or (self._every is not None and step % self._every == 0)

    def observe(self, engine: Engine, portion: Portion, world: World) -> tuple[dict[str, float], str]:
        """Fields for the log, and a line for people; all ranks call it and get the same."""
        found = self.measure(engine, world)
        told = {"top1": "{:.2f} % top-1", "top5": "{:.2f} % top-5", "loss": "loss {:.4f}"}
        words = [form.format(found[f"val_{name}{of}"]) + (" (average)" if of else "")
                 for of in ("", "_ema") for name, form in told.items() if f"val_{name}{of}" in found]  # fmt: skip
        return found, f"{', '.join(words)}; {found['val_images']} images"

    def measure(self, engine: Engine, world: World) -> dict[str, float]:
        """Of the weights of now; all ranks call it, make equally many calls, and get the same."""
        ids, sums = np.arange(self._loader.num_samples)[world.rank :: world.size], dict[str, Tensor]()
        calls = -(-self._loader.num_samples // (world.size * self._batch))
        parts = ((0, ids[k * self._batch : (k + 1) * self._batch]) for k in range(calls))
        filler = np.zeros(1, np.int64)  # for a rank that has no image left: it counts for nothing
        with self._loader.batches((epoch, part if len(part) else filler) for epoch, part in parts) as batches:
            for number, batch in enumerate(batches):
                draw = engine.method.draw(batch.keys, labels=batch.labels)
                own, average = engine.call("classes", batch.images, draw)
                if number * self._batch >= len(ids):
                    continue
                labels = batch.labels.to(own.device)
                for suffix, logits in (("", own), ("_ema", average)):
                    if logits is not None:
                        for name, value in count(logits, labels).items():
                            sums[name + suffix] = sums.get(name + suffix, torch.zeros((), device=own.device)) + value
        return self._means(world.gather({name: value.item() for name, value in sums.items()}))

    def _means(self, everyone: list[Mapping[str, float]]) -> dict[str, float]:
        total = self._loader.num_samples
        names = next(sums for sums in everyone if sums)  # a rank without an image has none
        shares = {name: sum(sums.get(name, 0) for sums in everyone) / total for name in names}
        means = {f"val_{name}": value * (100 if name.startswith("top") else 1) for name, value in shares.items()
                 if self._top5 or not name.startswith("top5")}  # fmt: skip
        return {**means, "val_images": total}

    def close(self) -> None:
        """Close the images."""
        self._loader.close()
