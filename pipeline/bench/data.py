"""Loaders compared: CPU seconds per image of Patchmill's FFCV loader, FFCV's stock pipeline and Pillow, on one thread.

One process, the same images, rounds interleaved; see ``pipeline.bench.interleaved``.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from data_prep.scan import Manifest, load_manifest
from data_prep.verify import check_seal
from pipeline.bench.interleaved import Contestant, measure
from pipeline.config import UserError
from pipeline.crops import crop_boxes
from pipeline.data import open_loader, to_planes
from pipeline.keys import Int64
from pipeline.order import epoch_permutation, sample_keys

BATCH: Final = 64
SCALE: Final = (0.2, 1.0)


@dataclass(frozen=True)
class Row:
    """A contestant: CPU seconds per image (median of the rounds), A/A ratio, and how many times faster ours is."""

    name: str
    cpu_s_per_image: float
    a_over_a: float
    ours_is_faster: float

    def __str__(self) -> str:
        """One line of a table."""
        return (f"{self.name:<28}{1 / self.cpu_s_per_image:8.0f} images per CPU second   A/A {self.a_over_a:.3f}   "
                f"ours / this {self.ours_is_faster:.2f}")  # fmt: skip


def _order(epoch: int, num_samples: int) -> list[Int64]:
    ids = epoch_permutation(0, epoch, num_samples)
    return [ids[k : k + BATCH] for k in range(0, num_samples - BATCH + 1, BATCH)]


def _patchmill(kind: Literal["ffcv", "folder"], path: Path, image_size: int) -> Contestant:
    options: dict[str, Any] = {"image_size": image_size, "crop_scale": SCALE, "jit": "on"}
    loader = open_loader(kind, path, seed=0, threads=1, augment=True, **options)

    def read(epoch: int) -> int:
        order = ((epoch, ids) for ids in _order(epoch, loader.num_samples))
        with loader.batches(order) as batches:
            return sum(len(batch.ids) for batch in batches)

    return read


def _stock(beton: Path, image_size: int) -> Contestant:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((image_size, image_size), SCALE)
    # Its planes are a view of interleaved pixels, the cheapest that it offers; ours are laid out.
    image = [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    # Its temporary images are sized by the largest one times the batches ahead.
    loader = Loader(str(beton), BATCH, 1, True, OrderOption.RANDOM, seed=0, pipelines={"image": image}, batches_ahead=1)

    def read(epoch: int) -> int:
        return sum(len(images) for images, _ in loader)

    return read


def _pillow(manifest: Manifest, image_size: int, as_float: bool) -> Contestant:
    """The same boxes by Pillow, bicubic as in MAE's recipe, to uint8 or normalised float32 planes."""
    from PIL import Image

    paths = [manifest.root / path for path in manifest.paths]
    mean, std = (np.array(x, np.float32)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def read(epoch: int) -> int:
        count = 0
        for ids in _order(epoch, manifest.num_samples):
            images = np.empty((BATCH, 3, image_size, image_size), np.float32 if as_float else np.uint8)
            planes = np.empty((3, image_size, image_size), np.uint8)
            boxes = crop_boxes(sample_keys(0, epoch, ids), manifest.heights[ids], manifest.widths[ids], SCALE)
            for k, (top, left, height, width, flip) in enumerate(boxes.tolist()):
                with Image.open(io.BytesIO(paths[ids[k]].read_bytes())) as image:
                    crop = image.convert("RGB").crop((left, top, left + width, top + height))
                small = crop.resize((image_size, image_size), Image.Resampling.BICUBIC)
                to_planes(np.asarray(small), flip, planes)
                images[k] = (planes.astype(np.float32) / 255 - mean) / std if as_float else planes
            count += len(ids)
        return count

    return read


def run(beton: Path, manifest: Path, *, image_size: int = 224, rounds: int = 8) -> list[Row]:
    """Measure on a beton and the manifest of the same images; ``rounds`` is at least 8.

    Raises UserError when they are not the same image set, or when the machine is too restless to tell.
    """
    book = load_manifest(manifest)
    if check_seal(beton).image_set != book.image_set:
        raise UserError(
            f"{beton} and {manifest}: hold different images; give the manifest that the beton was written from"
        )

    def contestants() -> dict[str, Contestant]:
        return {
            "patchmill ffcv": _patchmill("ffcv", beton, image_size),
            "ffcv stock": _stock(beton, image_size),
            "patchmill folder": _patchmill("folder", manifest, image_size),
            "pillow, uint8": _pillow(book, image_size, False),
            "pillow, normalised float32": _pillow(book, image_size, True),
        }

    figures = measure(contestants, rounds)
    best = figures["patchmill ffcv"][0]
    return [Row(name, seconds, ratio, seconds / best) for name, (seconds, ratio) in figures.items()]
