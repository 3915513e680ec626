"""What fine-tuning does to an image after its crop: timm's RandAugment and random erasing, all randomness from the sample's key.

timm draws from Python's global generator. Here its functions get one of each thread's own, seeded by the key, so that an image
is the same whatever thread makes it, at any world size and after a restart.
"""

import math
import random
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.config import UserError
from pipeline.eval_settings import FinetuneConfig
from pipeline.keys import Int64, stream
from pipeline.vit import IMAGE_MEAN, IMAGE_STD, timm

UInt8 = npt.NDArray[np.uint8]
Policy = Callable[[Int64, UInt8], None]

# timm's defaults of RandomErasing (Zhong et al., AAAI 2020): shares of the area, and the least of height to width.
ERASED: Final = (0.02, 1 / 3)
ASPECT: Final = 0.3
ATTEMPTS: Final = 10


class _Drawn(threading.local):
    """In the place of Python's ``random`` module in timm: this thread's generator."""

    def __init__(self) -> None:
        self.generator = random.Random()  # noqa: S311  not for secrets

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


_drawn: Final = _Drawn()


def _rand_augment(name: str, size: int) -> Any:
    """timm's policy of that name for images of ``size``, with what MAE's fine-tuning gives it. Raises UserError."""
    module = timm.data.auto_augment
    options = {
        "interpolation": Image.Resampling.BICUBIC,
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * x)) for x in IMAGE_MEAN),
    }
    try:
        policy = module.rand_augment_transform(name, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(f"method.rand_augment = {name}: is no policy of timm ({error}); give one such as "
                        "rand-m9-mstd0.5-inc1") from None  # fmt: skip
    if policy.choice_weights is not None:
        raise UserError(f"method.rand_augment = {name}: weighted policies (t) are not supported; leave that part out")
    module.random = _drawn
    for operation in policy.ops:
        if operation.aug_fn is module.posterize:
            # Its strongest level asks for no bit at all, which Pillow refuses since version 12.
            operation.aug_fn = lambda image, bits, **_: module.posterize(image, max(1, bits))
    return policy


def _erase(image: UInt8, generator: random.Random, noise_seed: int) -> None:
    """Fill a random box of an image [3, S, S] with noise N(0, 1) about the mean, cut at 0 and 255 (timm's mode pixel is not)."""
    side = image.shape[-1]
    for _ in range(ATTEMPTS):
        area = generator.uniform(*ERASED) * side**2
        aspect = math.exp(generator.uniform(math.log(ASPECT), -math.log(ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < side and width < side:
            top, left = generator.randint(0, side - height), generator.randint(0, side - width)
            noise = np.random.default_rng(noise_seed).standard_normal((3, height, width), np.float32)
            mean, std = (np.array(values, np.float32)[:, None, None] * 255 for values in (IMAGE_MEAN, IMAGE_STD))
            image[:, top : top + height, left : left + width] = np.clip(np.rint(noise * std + mean), 0, 255)
            return


def build_policy(settings: FinetuneConfig, size: int) -> Policy | None:
    """What is done, in place, to images uint8 [n, 3, S, S] with their keys int64 [n]; None for nothing.

    Raises UserError for a name that timm does not know.
    """
    if settings.rand_augment is None and not settings.erase:
        return None
    augment = None if settings.rand_augment is None else _rand_augment(settings.rand_augment, size)

    def apply(keys: Int64, images: UInt8) -> None:
        for seed, image in zip(stream(keys, "augment").tolist(), images, strict=True):
            _drawn.generator.seed(seed)
            if augment is not None:
                picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
                for operation in _drawn.generator.choices(augment.ops, k=augment.num_layers):
                    picture = operation(picture)
                image[:] = np.asarray(picture).transpose(2, 0, 1)
            if _drawn.generator.random() < settings.erase:
                _erase(image, _drawn.generator, seed & (2**63 - 1))

    return apply
