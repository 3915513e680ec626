"""One rule from the bytes of an image file to upright RGB pixels; every part of the project decodes through it.

The first frame counts. The EXIF orientation is applied (Pillow's ``exif_transpose``). Bilevel, grayscale, palette,
CMYK, YCbCr and HSV images are converted as Pillow does it; transparency is dropped; of 16-bit grayscale the high byte
stays. 32-bit integer and floating-point images are refused, because their range is not known.
"""

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]

# A closed list: Pillow has decoders that start other programs (EPS). JPEG covers MPO, of which it is the first frame.
FORMATS: Final = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_SIDE: Final = 2**16 - 1  # what the beton's 16-bit width and height hold
ORIENTATION_TAG: Final = 0x0112


class ImageError(Exception):
    """Why an image cannot be used, as ``kind: detail``; the kinds are few, so that they can be counted."""


@dataclass(frozen=True)
class Facts:
    """What is known about an image file. ``width`` and ``height`` are those of the upright image, in pixels.

    ``format`` and ``mode`` are Pillow's names for the file as found; ``orientation`` is EXIF's, 1 to 8, and 1 when
    it is absent or not valid.
    """

    width: int
    height: int
    format: str
    mode: str
    orientation: int
    progressive: bool


def _to_rgb(image: "Image") -> "Image":
    if image.mode.startswith("I;16"):
        from PIL import Image

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"no rule for RGB: pixels of mode {image.mode}, whose range is not known")
    return image if image.mode == "RGB" else image.convert("RGB")


def _facts(image: "Image") -> Facts:
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"too large: {image.width} x {image.height}, a side is at most {MAX_SIDE}")
    tag: Any = image.getexif().get(ORIENTATION_TAG, 1)
    orientation = int(tag) if tag in range(1, 9) else 1
    width, height = image.size[::-1] if orientation > 4 else image.size
    progressive = bool(image.info.get("progressive", False))
    return Facts(width, height, image.format or "", image.mode, orientation, progressive)


def _decode(data: bytes, shrink: int) -> tuple[Pixels, Facts]:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        limit = Image.MAX_IMAGE_PIXELS  # Pillow itself refuses only twice as much
        if limit is not None and image.width * image.height > limit:
            raise ImageError(f"too large: {image.width} x {image.height}, over {limit} pixels")
        facts = _facts(image)
        if shrink > 1 and (facts.format, facts.orientation) == ("JPEG", 1) and facts.mode in ("RGB", "L"):
            # Pillow takes the largest scale that leaves an image at least this large.
            image.draft(None, (image.width // shrink, image.height // shrink))
        image.load()
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image))), facts


def decode(data: bytes, shrink: int = 1) -> tuple[Pixels, Facts]:
    """The upright RGB pixels, uint8 [height, width, 3] and read-only, and the facts of an image file's bytes.

    With ``shrink`` 2, 4 or 8, not above its sides, an upright RGB or gray JPEG comes out ceil(height / shrink) x
    ceil(width / shrink), which is cheaper than the whole; every other image comes out whole. The facts stay the file's.
    Safe in threads. Raises ImageError for what is no image of a known format, damaged, cut short, or too large
    (Pillow's ``MAX_IMAGE_PIXELS``).
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("empty file")
    try:
        return _decode(data, shrink)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError(f"not an image: none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from None
    except Exception as error:  # a decoder fed with garbage raises anything
        raise ImageError(f"damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None
