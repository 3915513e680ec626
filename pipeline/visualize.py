"""Pictures of what a run's method does with images."""

from pathlib import Path

import numpy as np

from pipeline.runs import open_images, restore


def visualize(run_dir: Path, num_images: int, out: Path | None = None) -> Path:
    """Draw the method's figure for the first images of data.val, or of data.train when there is none; returns the file.

    Raises UserError for a folder that is not a run or holds no checkpoint.
    """
    run_dir = Path(run_dir).resolve()
    restored = restore(run_dir)
    cfg, method = restored.cfg, restored.method
    loader = open_images(cfg, "val" if cfg.data.val else "train", augment=False)
    # Files lie class by class: an even spread over the set shows several classes.
    ids = np.linspace(0, loader.num_samples - 1, min(num_images, loader.num_samples)).astype(np.int64)
    with loader.batches(iter([(0, ids)])) as batches:
        batch = next(batches)
    loader.close()
    path = out or run_dir / "figures" / f"{cfg.method.name}_step{restored.step:08d}_images.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    method.eval().figure(batch.images, method.draw(batch.keys), restored.teacher).save(path)
    return path
