"""The embedded image set of the quickstart: ten classes of drawn patterns and shapes that a short run can learn.

Five patterns fill the image and five shapes lie on a plain ground, all turned a little, recoloured and partly covered.
Colours are drawn independently of the class. An image is a pure function of (seed, split, index): it owns one numpy
generator. Coordinates x (right) and y (down) are in half-widths of the image, [-1, 1].
"""

import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.config import UserError

Plane = npt.NDArray[np.float32]

CLASSES: Final = ("horizontal_stripes", "vertical_stripes", "checks", "diagonal_stripes", "dots",
                  "disc", "square", "triangle", "plus", "ring")  # fmt: skip
NUM_PATTERNS: Final = 5
SIDES: Final = (32, 48)  # the smallest and the largest image side, pixels
SUPERSAMPLING: Final = 2
LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)
MARKER: Final = "drawn.json"


def _grid(side: int) -> tuple[Plane, Plane]:
    """x and y of the pixel centres, each [side, side]."""
    axis = ((np.arange(side, dtype=np.float32) + 0.5) * (2 / side)) - 1
    x, y = np.meshgrid(axis, axis)
    return x, y


def _rotated(x: Plane, y: Plane, angle: float) -> tuple[Plane, Plane]:
    """Coordinates along axes that are turned by ``angle`` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _pattern(label: int, rng: np.random.Generator, x: Plane, y: Plane) -> npt.NDArray[np.bool_]:
    """Where a pattern that fills the image has the foreground's colour."""
    x, y = _rotated(x, y, rng.uniform(-0.3, 0.3))
    pulse = 2 * math.pi / rng.uniform(0.45, 0.75)
    phase_x, phase_y = rng.uniform(0, 2 * math.pi, 2)
    match CLASSES[label]:
        case "horizontal_stripes":
            return np.sin(pulse * y + phase_y) > 0
        case "vertical_stripes":
            return np.sin(pulse * x + phase_x) > 0
        case "checks":
            return (np.sin(pulse * x + phase_x) > 0) ^ (np.sin(pulse * y + phase_y) > 0)
        case "diagonal_stripes":
            return np.sin(pulse * (x + y) * math.sqrt(0.5) + phase_x) > 0
        case _:
            return np.minimum(np.sin(pulse * x + phase_x), np.sin(pulse * y + phase_y)) > -0.1


def _shape(label: int, rng: np.random.Generator, x: Plane, y: Plane) -> npt.NDArray[np.bool_]:
    """Where a shape lies; some are cut by the image's edge."""
    scale, aspect = rng.uniform(0.4, 0.75), math.sqrt(rng.uniform(0.85, 1.15))
    centre_x, centre_y = rng.uniform(-1, 1, 2) * (1.15 - scale)
    x, y = _rotated(x - centre_x, y - centre_y, rng.uniform(-0.3, 0.3))
    x, y = x / (scale * aspect), y / scale * aspect
    match CLASSES[label]:
        case "disc":
            return np.hypot(x, y) < 0.9
        case "square":
            return np.maximum(abs(x), abs(y)) < 0.8
        case "triangle":
            return (y < 0.75) & (abs(x) < (y + 0.95) * 0.55)
        case "plus":
            return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 0.95)
        case _:
            return abs(np.hypot(x, y) - 0.725) < 0.225


def _colour(rng: np.random.Generator) -> Plane:
    """A random colour: RGB float32 [3] in [0, 1], hue uniform, saturation from 0.2, value from 0.15."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.2, 1), rng.uniform(0.15, 1)
    distance = (hue - np.array([0, 2, 4])) % 6
    return (value * (1 - saturation * np.clip(np.minimum(distance, 6 - distance) - 1, 0, 1))).astype(np.float32)


def _colour_pair(rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Two colours whose lightness differs enough to see; either may be the lighter."""
    while True:
        first, second = _colour(rng), _colour(rng)
        if abs(float((first - second) @ LUMA)) > 0.25:
            return first, second


def _shaded(rng: np.random.Generator, colour: Plane, x: Plane, y: Plane) -> Plane:
    """The colour mixed with another, from 0 to 35 % along a random direction: [side, side, 3]."""
    along, _ = _rotated(x, y, rng.uniform(0, 2 * math.pi))
    share = 0.35 * np.clip(0.5 + 0.5 * math.sqrt(0.5) * along, 0, 1)[..., None]
    return colour + share * (_colour(rng) - colour)


def _cover(rng: np.random.Generator, image: Plane, x: Plane, y: Plane) -> None:
    """Draw three small bars over the image, in place."""
    for _ in range(3):
        centre_x, centre_y = rng.uniform(-1, 1, 2)
        along, across = _rotated(x - centre_x, y - centre_y, rng.uniform(0, math.pi))
        image[(abs(along) < rng.uniform(0.1, 0.4)) & (abs(across) < rng.uniform(0.04, 0.12))] = _colour(rng)


def draw_image(seed: int, split: int, index: int) -> npt.NDArray[np.uint8]:
    """One image, RGB uint8 [side, side, 3] with side in [32, 48]; its class is ``index % 10``."""
    rng = np.random.default_rng([seed, split, index])
    label, side = index % len(CLASSES), int(rng.integers(SIDES[0], SIDES[1], endpoint=True))
    x, y = _grid(side * SUPERSAMPLING)
    foreground = (_pattern if label < NUM_PATTERNS else _shape)(label, rng, x, y)
    first, second = _colour_pair(rng)
    image = np.where(foreground[..., None], _shaded(rng, first, x, y), _shaded(rng, second, x, y))
    _cover(rng, image, x, y)
    image = image.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING, 3).mean((1, 3))
    image = image * rng.uniform(0.7, 1.1) + rng.normal(0, 0.015, image.shape)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _write_split(folder: Path, seed: int, split: int, num: int, report: Callable[[int], None]) -> None:
    from PIL import Image

    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for index in range(num):
        stream = io.BytesIO()
        # Full colour resolution: halved, the coloured edges of such small images would smear.
        Image.fromarray(draw_image(seed, split, index)).save(stream, "JPEG", quality=95, subsampling=0)
        (folder / CLASSES[index % len(CLASSES)] / f"{index:05d}.jpg").write_bytes(stream.getvalue())
        report(index + 1)


def _already_drawn(folder: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds this very set. Raises UserError when it holds anything else."""
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() == json.dumps(settings):
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} holds something else than the drawn images {settings}: remove it or name another")
    return False


def draw_images(
    folder: Path, *, num_train: int, num_test: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write ``folder/train/<class>/<index>.jpg`` and ``folder/test/...``, classes balanced; nothing if they are there.

    The folder appears complete or not at all. ``progress`` is called with (images done, images in all). Raises
    UserError when the folder holds something else.
    """
    settings = {"num_train": num_train, "num_test": num_test, "seed": seed}
    if _already_drawn(folder, settings):
        return
    report = progress or (lambda done, total: None)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_split(partial / "train", seed, 0, num_train, lambda done: report(done, num_train + num_test))
    _write_split(partial / "test", seed, 1, num_test, lambda done: report(num_train + done, num_train + num_test))
    (partial / MARKER).write_text(json.dumps(settings))
    partial.replace(folder)
