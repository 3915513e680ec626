"""The pretraining loss on images that are not trained on: always the same crops and draws, so only the weights move it."""

from typing import Any

import numpy as np
import torch

from pipeline.config import Config, UserError
from pipeline.engine import Engine
from pipeline.launch import Portion, World
from pipeline.runs import open_images, spread


class HeldOut:
    """Images of data.val, spread evenly over it; whole global batches, so that any number of ranks has the same mean."""

    name = "held-out loss"

    def __init__(self, cfg: Config) -> None:
        """Raises UserError when data.val is not set, broken or smaller than a global batch."""
        batch = cfg.train.global_batch
        self._loader = open_images(cfg, "val", augment=False)
        images = min(max(cfg.eval.loss_images, batch), self._loader.num_samples) // batch * batch
        if not images:
            raise UserError(f"data.val = {cfg.data.val}: has {self._loader.num_samples} images, fewer than train.global_batch = "
                            f"{batch}, the least that eval.loss_every takes; leave eval.loss_every out")  # fmt: skip
        self._ids = spread(self._loader.num_samples, images)
        self.num_images, self._batch, self._every = images, batch, cfg.eval.loss_every

    def due(self, step: int) -> bool:
        """Whether it is taken after this step."""
        return self._every is not None and step % self._every == 0

    def observe(self, engine: Engine, portion: Portion, world: World) -> tuple[dict[str, Any], str]:
        """Fields for the log, and a line for people; all ranks call it and get the same."""
        loss = self.loss(engine, portion, world)
        fields = {"heldout_loss": loss, "heldout_images": self.num_images}
        return fields, f"loss {loss:.4f} on {self.num_images} held-out images"

    def loss(self, engine: Engine, portion: Portion, world: World) -> float:
        """Their mean loss with the weights of now; all ranks call it and get the same."""
        parts = ((0, ids) for ids in self._ids.reshape(-1, self._batch))
        losses = []
        with self._loader.batches(parts, None, portion.samples) as batches:
            for batch in batches:
                for start in range(0, portion.micro * portion.num_micro, portion.micro):
                    part = slice(start, start + portion.micro)
                    draw = engine.method.draw(batch.keys[part], batch.batch_key, batch.labels[part])
                    losses.append(engine.call("forward", batch.images[part], draw)[0].float())
        return float(np.mean(world.gather(torch.stack(losses).mean().item())))

    def close(self) -> None:
        """Close the images."""
        self._loader.close()
