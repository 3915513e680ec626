"""Crop boxes: inside the image, by torchvision's rule, and each a function of its own key and size only."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from pipeline.crops import ASPECTS, Crops, centre_boxes, crop_boxes
from pipeline.keys import sample_key

SIDES = st.integers(1, 4000)


def boxes_of(count: int, height: int, width: int, scale: tuple[float, float], flip: bool = True) -> np.ndarray:
    keys = sample_key(7, 0, np.arange(count))
    return crop_boxes(keys, np.full(count, height), np.full(count, width), scale, flip)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from([(0.2, 1.0), (0.08, 1.0), (0.5, 0.5), (1.0, 1.0)]))
def test_inside_the_image_and_within_area_and_ratio(height, width, scale):
    top, left, box_h, box_w, flip = boxes_of(64, height, width, scale).astype(np.int64).T
    assert (top >= 0).all() and (left >= 0).all() and (box_h > 0).all() and (box_w > 0).all()
    assert (top + box_h <= height).all() and (left + box_w <= width).all()
    assert set(flip.tolist()) <= {0, 1}
    # Rounding moves each side by half a pixel at most.
    assert ((box_w + 0.5) / np.maximum(box_h - 0.5, 1e-9) >= 3 / 4).all()
    assert (np.maximum(box_w - 0.5, 0) / (box_h + 0.5) <= 4 / 3).all()
    if 3 / 4 <= width / height <= 4 / 3:
        assert ((box_h + 0.5) * (box_w + 0.5) >= scale[0] * height * width).all()


def torchvision_boxes(count: int, height: int, width: int, scale: tuple[float, float]) -> np.ndarray:
    import torch

    import pipeline.vit  # noqa: F401  makes torchvision importable beside a CPU-only torch

    from torchvision.transforms import RandomResizedCrop  # isort: skip

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(count)], float)


@pytest.mark.parametrize(
    ("size", "scale"),
    [((375, 500), (0.2, 1.0)), ((500, 375), (0.08, 1.0)), ((96, 96), (0.2, 1.0)), ((60, 300), (0.2, 1.0))],
)
def test_distribution_is_torchvisions(size, scale):
    ours = boxes_of(20_000, *size, scale)[:, :4].astype(float)
    theirs = torchvision_boxes(5_000, *size, scale)
    error = theirs.std(0) * math.sqrt(1 / 20_000 + 1 / 5_000) + 1e-9
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()
    assert min(ks_2samp(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True)) > 1e-3
    assert np.abs(np.corrcoef(ours.T) - np.corrcoef(theirs.T)).max() < 0.05


def test_flips_are_fair_and_independent_of_the_box():
    boxes = boxes_of(20_000, 375, 500, (0.2, 1.0))
    assert abs(boxes[:, 4].mean() - 0.5) < 0.015
    assert np.abs(np.corrcoef(boxes.T)[4, :4]).max() < 0.03
    assert not boxes_of(1000, 375, 500, (0.2, 1.0), flip=False)[:, 4].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=2, max_size=20), st.randoms())
def test_a_box_does_not_depend_on_the_batch(sizes, rng):
    keys = sample_key(1, 2, np.arange(len(sizes)))
    heights, widths = np.array(sizes).T
    whole = crop_boxes(keys, heights, widths, (0.2, 1.0))
    order = list(range(len(sizes)))
    rng.shuffle(order)
    for k in order[:5]:
        assert (crop_boxes(keys[[k]], heights[[k]], widths[[k]], (0.2, 1.0)) == whole[[k]]).all()
    assert (crop_boxes(keys[order], heights[order], widths[order], (0.2, 1.0)) == whole[order]).all()


@pytest.mark.parametrize(
    ("size", "box"), [((1, 1), (0, 0, 1, 1)), ((3, 500), (0, 248, 3, 4)), ((500, 3), (248, 0, 4, 3))]
)
def test_tiny_images_fall_back_to_the_centre(size, box):
    # No attempt on a strip fits with more than a fifth of its area.
    assert (boxes_of(50, *size, (0.2, 1.0))[:, :4] == box).all()


@pytest.mark.parametrize("size", [(100, 90), (90, 100)])
def test_what_fits_no_attempt_is_the_whole_of_a_nearly_square_image(size):
    boxes = boxes_of(200, *size, (1.0, 1.0))[:, :4].tolist()
    assert boxes.count([0, 0, *size]) > 150


def test_the_boxes_of_a_key_are_fixed():
    """The boxes are part of what a checkpoint continues: changing them changes every run."""
    sides = np.random.default_rng(0).integers(1, 3000, (2, 500))
    boxes = crop_boxes(sample_key(0, 3, np.arange(500)), *sides, (0.2, 1.0))
    assert boxes.dtype == np.int32
    assert hashlib.sha256(np.ascontiguousarray(boxes, "<i4").tobytes()).hexdigest()[:16] == "3fed8dfb2ee60ec1"
    assert len(np.unique(ASPECTS)) == 4096 and (np.diff(np.log(ASPECTS)) > 0).all()


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.floats(0.05, 1))
def test_centre_boxes_are_centred_squares(height, width, share):
    top, left, box_h, box_w, flip = centre_boxes(np.array([height]), np.array([width]), share)[0].tolist()
    assert box_h == box_w and flip == 0
    assert abs(box_h - share * min(height, width)) <= 0.5 or box_h == 1
    assert top >= 0 and left >= 0 and top + box_h <= height and left + box_w <= width
    assert 0 <= height - box_h - 2 * top <= 1 and 0 <= width - box_w - 2 * left <= 1


def test_crops_choose_by_augment():
    keys, sides = sample_key(0, 0, np.arange(9)), np.full(9, 300)
    random_crops, centred = Crops(64, True, (0.5, 0.5), False), Crops(64, False, eval_crop=0.5)
    assert (random_crops.boxes(keys, sides, sides) == crop_boxes(keys, sides, sides, (0.5, 0.5), False)).all()
    assert (centred.boxes(keys, sides, sides) == (75, 75, 150, 150, 0)).all()
