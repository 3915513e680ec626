"""Which part of an image a visit sees: boxes as a pure function of keys and image sizes, the same for every loader.

A box is (top, left, height, width, flip) in pixels of the stored image, or of a scaled decode of it. Nothing here
depends on the other samples of the batch, and no transcendental function of a random number is taken, because numpy's
differ between CPU types.
"""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from pipeline.keys import Int64, stream, uniform

Int32 = npt.NDArray[np.int32]
Resample = Literal["area", "bicubic"]

RATIO: Final = (3 / 4, 4 / 3)
ATTEMPTS: Final = 10
EIGHTHS: Final = (4, 2, 1)  # JPEG also has scales between: they take longer than a full decode


def _aspect_table() -> npt.NDArray[np.float64]:
    """4096 aspect ratios, log-uniform over ``RATIO``; rounded far above exp's last bit, where C libraries differ."""
    low, high = map(math.log, RATIO)
    return np.array([round(math.exp(low + (k + 0.5) / 4096 * (high - low)) * 2**30) / 2**30 for k in range(4096)])


ASPECTS: Final = _aspect_table()


def _fallback(heights: Int64, widths: Int64) -> Int64:
    """The largest centred box whose aspect ratio lies in ``RATIO``: [B, 4]."""
    low, high = RATIO
    box_h = np.where(widths < low * heights, np.rint(widths / low), heights).astype(np.int64)
    box_w = np.where(widths > high * heights, np.rint(heights * high), widths).astype(np.int64)
    return np.stack([(heights - box_h) // 2, (widths - box_w) // 2, box_h, box_w], 1)


def crop_boxes(keys: Int64, heights: Int64, widths: Int64, scale: tuple[float, float], flip: bool = True) -> Int32:
    """Random resized crops by torchvision's rule: int32 [B, 5] from keys [B] and image sizes [B] in pixels.

    The area is uniform in ``scale`` (shares of the image), the aspect ratio log-uniform in 3/4 to 4/3; the first of ten
    attempts that fits is taken, else the largest centred box in that range. ``flip`` is a fair bit.
    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    boxes = np.zeros((len(keys), 5), np.int32)
    boxes[:, :4] = _fallback(heights, widths)
    if flip:
        boxes[:, 4] = stream(keys, "flip") & 1
    todo = np.arange(len(keys))
    for attempt in range(ATTEMPTS):
        area_u, aspect_u, top_u, left_u = uniform(keys[todo], "crop", 4 * attempt + np.arange(4)[:, None])
        h, w = heights[todo], widths[todo]
        area = h * w * (scale[0] + area_u * (scale[1] - scale[0]))
        aspect = ASPECTS[(aspect_u * len(ASPECTS)).astype(np.int64)]
        box_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        box_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (box_w > 0) & (box_w <= w) & (box_h > 0) & (box_h <= h)
        top, left = (top_u * (h - box_h + 1)).astype(np.int64), (left_u * (w - box_w + 1)).astype(np.int64)
        boxes[todo[fits], :4] = np.stack([top, left, box_h, box_w], 1)[fits]
        todo = todo[~fits]
        if not todo.size:
            break
    return boxes


def centre_boxes(heights: Int64, widths: Int64, eval_crop: float) -> Int32:
    """The centred square of ``eval_crop`` times the short side, never mirrored: int32 [B, 5] for image sizes [B]."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    side = np.maximum(np.rint(np.minimum(heights, widths) * eval_crop), 1).astype(np.int64)
    box = np.stack([(heights - side) // 2, (widths - side) // 2, side, side, np.zeros_like(side)], 1)
    return box.astype(np.int32)


def scaled_boxes(boxes: Int32, image_size: int) -> tuple[Int64, Int32]:
    """How small JPEGs may be decoded: int64 [B], eighths M of a side (8, 4, 2, 1), and their boxes on that scale.

    M is the smallest at which a box of ``boxes`` [B, 5] is still ``image_size`` on both sides, else 8. An image of
    height x width pixels becomes ceil(height M / 8) x ceil(width M / 8); a box's edges go to the nearest of its
    pixels, so each moves by 4 / M pixels of the stored image at most, and with M = 8 not at all.

    From whole decodes FFCV's pixels of ImageNet differ by 3.8 grey levels in the mean at 96 pixels (2.1 with the edges
    of both moved), and by 0.2 at 224, where few images are scaled.
    """
    eighths = np.full(len(boxes), 8, np.int64)
    for scale in EIGHTHS:
        eighths[boxes[:, 2:4].min(1) * np.int64(scale) >= 8 * image_size] = scale
    start = boxes[:, :2].astype(np.int64)
    first, last = ((edges * eighths[:, None] + 4) // 8 for edges in (start, start + boxes[:, 2:4]))
    return eighths, np.concatenate([first, last - first, boxes[:, 4:]], 1).astype(np.int32)


@dataclass(frozen=True)
class Crops:
    """How a loader cuts: square outputs of ``image_size`` pixels from random boxes (``augment``) or centred ones.

    Loaders of files besides: ``scaled`` decodes JPEGs no larger than needed, ``resample`` is as in ``pipeline.resample``.
    """

    image_size: int
    augment: bool
    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    eval_crop: float = 0.875
    scaled: bool = False
    resample: Resample = "area"

    def boxes(self, keys: Int64, heights: Int64, widths: Int64) -> Int32:
        """The boxes of a batch, int32 [B, 5], for its keys [B] and image sizes [B]."""
        if self.augment:
            return crop_boxes(keys, heights, widths, self.scale, self.flip)
        return centre_boxes(heights, widths, self.eval_crop)

    def on_scale(self, boxes: Int32) -> tuple[Int64, Int32]:
        """``scaled_boxes``, of which every image is whole (M = 8) unless ``scaled``."""
        if self.scaled:
            return scaled_boxes(boxes, self.image_size)
        return np.full(len(boxes), 8, np.int64), boxes
