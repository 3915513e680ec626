"""Label fractions: which of the training images keep their labels when only 1 % or 10 % may be used."""

from typing import Final

import numpy as np

from pipeline.config import UserError
from pipeline.keys import Int64, hash_integers, text_key

SALT: Final = text_key("label fraction")


def label_subset(labels: Int64, fraction: float, seed: int) -> Int64:
    """Ids, int64 and sorted, of ``fraction`` of each class of ``labels`` [N]; rounded to whole images, one at least.

    A pure function of its arguments, whatever the order of the file's reading: a class keeps the images with the lowest
    hash of (seed, id), so the images of a smaller fraction are among those of a larger one. Raises UserError when a class
    between the first and the last label has no image at all.
    """
    if fraction == 1:
        return np.arange(len(labels), dtype=np.int64)
    counts = np.bincount(labels) if len(labels) else np.zeros(1, np.int64)
    if not counts.all():
        raise UserError(f"eval.label_fraction = {fraction:g}: class {int(np.argmin(counts))} has no image in data.train, and a "
                        "fraction of none is none; leave the setting out, or give each class an image")  # fmt: skip
    order = np.lexsort((hash_integers(SALT, seed, np.arange(len(labels))), labels))
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    kept = np.maximum(1, np.floor(fraction * counts + 0.5).astype(np.int64))
    return np.sort(order[place < np.repeat(kept, counts)])
