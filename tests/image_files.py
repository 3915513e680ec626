"""Small image files of every kind, for the tests of data preparation."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.beton import CRC, SEAL, beside


def pixels(seed: int, width: int = 48, height: int = 32) -> np.ndarray:
    """A smooth picture with a little noise, uint8 [height, width, 3]; no two seeds and no two corners are alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """The bytes of a file of Pillow's format ``kind``."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def rotated_jpeg(seed: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels(seed), "JPEG", quality=95, exif=exif)


def of_every_kind() -> dict[str, bytes]:
    """File name -> bytes; all are good images."""
    gray = pixels(1)[..., 0]
    palette = Image.fromarray(pixels(2)).quantize(64)
    return {
        "plain.JPEG": encoded(pixels(3), "JPEG", quality=95),
        "gray.jpg": encoded(gray, "JPEG", quality=95),
        "turned.jpg": rotated_jpeg(4, 6),
        "upside_down.jpg": rotated_jpeg(11, 3),
        "upright.jpg": rotated_jpeg(5, 1),
        "cmyk.jpg": encoded(Image.fromarray(pixels(6)).convert("CMYK"), "JPEG", quality=95),
        "progressive.jpg": encoded(pixels(7), "JPEG", quality=95, progressive=True),
        "really_png.jpeg": encoded(pixels(8), "PNG"),
        "palette.png": encoded(palette, "PNG", transparency=3),
        "alpha.png": encoded(Image.fromarray(np.dstack([pixels(9), gray])), "PNG"),
        "sixteen.png": encoded(gray.astype(np.uint16) * 256 + 77, "PNG"),
        "bilevel.png": encoded(Image.fromarray(gray).convert("1"), "PNG"),
        "stereo.jpg": encoded(
            Image.fromarray(pixels(10)), "MPO", save_all=True, append_images=[palette.convert("RGB")]
        ),
        "moving.gif": encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(180)]),
    }


def plain_set(root: Path, count: int, width: int = 48, height: int = 32, classes: int = 3) -> Path:
    """``count`` JPEGs of one size, in turn in the class folders; the last is gray."""
    for i in range(count):
        image = pixels(100 + i, width, height)
        put(root / f"class{i % classes}" / f"{i:04}.jpg", encoded(image[..., 0] if i == count - 1 else image, "JPEG"))
    return root


def contents(beton: Path) -> list[bytes]:
    """A beton and what stands beside it."""
    return [beside(beton, suffix).read_bytes() for suffix in ("", CRC, SEAL)]


class StopError(Exception):
    pass


def stop_after(count):
    def progress(done, total):
        if done >= count:
            raise StopError

    return progress
