"""The pretraining loss on images that are not trained on: always the same crops and draws, so only the weights move it."""

import numpy as np
import torch

from pipeline.config import Config, UserError
from pipeline.engine import Engine
from pipeline.eval_settings import FinetuneConfig
from pipeline.evaluate.accuracy import Accuracy
from pipeline.launch import Portion, World
from pipeline.runs import open_images


class HeldOut:
    """Images of data.val, spread evenly over it; whole global batches, so that any number of ranks has the same mean."""

    at_end = False

    def __init__(self, cfg: Config) -> None:
        """Raises UserError when data.val is not set, broken or smaller than a global batch."""
        batch = cfg.train.global_batch
        self._loader = open_images(cfg, "val", augment=False)
        images = min(max(cfg.eval.loss_images, batch), self._loader.num_samples) // batch * batch
        if not images:
            raise UserError(f"data.val = {cfg.data.val}: has {self._loader.num_samples} images, fewer than train.global_batch = "
                            f"{batch}, the least that eval.loss_every takes; leave eval.loss_every out")  # fmt: skip
        self._ids = np.linspace(0, self._loader.num_samples - 1, images).round().astype(np.int64)
        self.num_images, self._batch = images, batch

    def measure(self, engine: Engine, portion: Portion, world: World) -> dict[str, float]:
        """Their mean loss with the weights of now; all ranks call it and get the same."""
        parts = ((0, ids) for ids in self._ids.reshape(-1, self._batch))
        losses = []
        with self._loader.batches(parts, None, portion.samples) as batches:
            for batch in batches:
                for start in range(0, portion.micro * portion.num_micro, portion.micro):
                    part = slice(start, start + portion.micro)
                    draw = engine.method.draw(batch.keys[part], batch.batch_key, batch.labels[part])
                    losses.append(engine.call("forward", batch.images[part], draw)[0].float())
        loss = float(np.mean(world.gather(torch.stack(losses).mean().item())))
        return {"heldout_loss": loss, "heldout_images": self.num_images}

    def close(self) -> None:
        """Close the images."""
        self._loader.close()


def open_heldout(cfg: Config) -> "HeldOut | Accuracy | None":
    """What is measured on data.val during training: the accuracy of a classifier, else with eval.loss_every the loss.

    Raises UserError where its images cannot be had.
    """
    if isinstance(cfg.method, FinetuneConfig):
        return Accuracy(cfg) if cfg.data.val or cfg.data.loader == "synthetic" else None
    return HeldOut(cfg) if cfg.eval.loss_every else None
