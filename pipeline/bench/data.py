"""Loaders compared: CPU seconds per image of Patchmill's, FFCV's stock pipeline and torchvision's in a DataLoader, one thread.

One process, the same images, rounds interleaved; see ``pipeline.bench.interleaved``. Besides: by the clock, what more threads
bring, and how long a run takes to find its place in an epoch of ImageNet's size.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from data_prep.manifest import Manifest, load_manifest
from data_prep.verify import check_seal
from pipeline import order
from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.config import UserError
from pipeline.data import Kind, open_loader
from pipeline.keys import Int64

if TYPE_CHECKING:
    from torch import Tensor

BATCH: Final = 64
EPOCH: Final = 1024  # images, or more: a smaller set is read several times over, so that starting an epoch costs little
RUN_S: Final = 0.8  # seconds, or more: a shorter run is all noise
SCALE: Final = (0.2, 1.0)
OURS: Final = "patchmill ffcv"
SCALED: Final = "patchmill ffcv, scaled decode"
STOCK: Final = "ffcv stock"
DATALOADER: Final = "torchvision DataLoader, float32"
THREADS_GOAL: Final = 1.7
OTHERS: Final = 0.1  # CPUs that other processes may use while threads are timed: A/A does not see a steady load
IMAGENET: Final = 1_281_167
IMAGES_A_PAGE: Final = 76  # of 110 KB in FFCV's pages of 8 MiB
RESUME_STEP: Final = 2_500
RESUME_BATCH: Final = 512
RESUME_GOAL_S: Final = 1.0


@dataclass(frozen=True)
class Row:
    """A contestant: CPU seconds per image (fastest round), A/A ratio, and how many times faster ours are.

    ``ours_is_faster`` is the plain FFCV loader's ratio, ``scaled_is_faster`` that with scaled decoding.
    """

    name: str
    cpu_s_per_image: float
    a_over_a: float
    ours_is_faster: float
    scaled_is_faster: float

    def __str__(self) -> str:
        """One line of a table."""
        return (f"{self.name:<32}{1 / self.cpu_s_per_image:8.0f} images per CPU second   A/A {self.a_over_a:.3f}   "
                f"ours / this {self.ours_is_faster:.2f}   scaled / this {self.scaled_is_faster:.2f}")  # fmt: skip


@dataclass(frozen=True)
class ThreadsRow:
    """The plain FFCV loader with some threads: seconds by the clock per image, A/A ratio, and how many times faster than one."""

    threads: int
    s_per_image: float
    a_over_a: float
    faster_than_one: float

    def __str__(self) -> str:
        """One line of a table."""
        goal = f" (goal at 2 threads >= {THREADS_GOAL})" if self.threads > 1 else ""
        return (f"{self.threads} thread{'s' if self.threads > 1 else ' '}  {1 / self.s_per_image:8.0f} images a second   "
                f"A/A {self.a_over_a:.3f}   to one thread {self.faster_than_one:.2f}{goal}")  # fmt: skip


@dataclass(frozen=True)
class ResumeRow:
    """Seconds by the clock from nothing to the sample ids of a late step: what a restart costs before it reads."""

    name: str
    seconds: float

    def __str__(self) -> str:
        """One line of a table."""
        return (f"resume at batch {RESUME_STEP:,} of {IMAGENET:,} images, {self.name} order: {self.seconds:.2f} s "
                f"(goal < {RESUME_GOAL_S:.0f})")  # fmt: skip


def _passes(num_samples: int) -> int:
    return -(-EPOCH // num_samples)


def _order(run: int, num_samples: int) -> Iterator[tuple[int, Int64]]:
    """Batches of whole epochs, as many as make a run; other epochs in other runs."""
    passes = _passes(num_samples)
    for epoch in range(run * passes, (run + 1) * passes):
        ids = order.epoch_permutation(0, epoch, num_samples)
        for start in range(0, num_samples - BATCH + 1, BATCH):
            yield epoch, ids[start : start + BATCH]


def _lasting(read: Contestant) -> Contestant:
    def run(number: int) -> int:
        start, images = time.process_time(), 0
        while not images or time.process_time() - start < RUN_S:
            images += read(number)
        return images

    return run


def _patchmill(kind: Kind, path: Path, image_size: int, threads: int = 1, **more: Any) -> Contestant:
    options: dict[str, Any] = {"image_size": image_size, "crop_scale": SCALE, "jit": "on", **more}
    loader = open_loader(kind, path, seed=0, threads=threads, augment=True, **options)

    def read(number: int) -> int:
        with loader.batches(_order(number, loader.num_samples)) as batches:
            return sum(len(batch.ids) for batch in batches)

    return read


def _stock(beton: Path, num_samples: int, image_size: int) -> Contestant:
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    decoder = RandomResizedCropRGBImageDecoder((image_size, image_size), SCALE)
    # Its planes are a view of interleaved pixels, the cheapest that it offers; ours are laid out.
    image = [decoder, RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    # Its temporary images are sized by the largest one times the batches ahead.
    loader = Loader(str(beton), BATCH, 1, True, OrderOption.RANDOM, seed=0, pipelines={"image": image}, batches_ahead=1,
                    indices=np.tile(np.arange(num_samples), _passes(num_samples)))  # fmt: skip

    def read(number: int) -> int:
        return sum(len(images) for images, _ in loader)

    return read


class _Files:
    """A map-style dataset of image files, as torchvision's ImageFolder reads them."""

    def __init__(self, manifest: Manifest, transform: Any) -> None:
        self._paths = [manifest.root / path for path in manifest.paths]
        self._labels, self._transform = manifest.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> "tuple[Tensor, int]":
        from PIL import Image

        with open(self._paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return self._transform(image), self._labels[index]


def _torchvision(manifest: Manifest, image_size: int, as_float: bool) -> Contestant:
    """MAE's recipe by torchvision's own transforms, bicubic, to normalised float32 or to uint8 planes."""
    import torch

    from pipeline.vit import IMAGE_MEAN, IMAGE_STD  # first: it makes torchvision importable beside a CPU-only torch

    from torchvision import transforms  # isort: skip

    cut = transforms.RandomResizedCrop(image_size, SCALE, interpolation=transforms.InterpolationMode.BICUBIC)
    planes = ([transforms.ToTensor(), transforms.Normalize(IMAGE_MEAN, IMAGE_STD)] if as_float
              else [transforms.PILToTensor()])  # fmt: skip
    dataset = _Files(manifest, transforms.Compose([cut, transforms.RandomHorizontalFlip(), *planes]))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=0)

    def read(number: int) -> int:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)  # the same crops in both runs of a round
            return sum(len(images) for images, _ in loader)

    return read


def _check_same_images(beton: Path, manifest: Path, book: Manifest) -> None:
    if check_seal(beton).image_set != book.image_set:
        raise UserError(
            f"{beton} and {manifest}: hold different images; give the manifest that the beton was written from"
        )
    if book.source_kind != "folder":
        raise UserError(
            f"{manifest}: its images lie in a source of kind {book.source_kind}; a DataLoader of files needs a folder: "
            "unpack it and scan that"
        )


def compare(figures: Figures) -> list[Row]:
    """Rows of measured figures, each beside ours."""
    ours, scaled = figures[OURS][0], figures[SCALED][0]
    return [Row(name, seconds, ratio, seconds / ours, seconds / scaled) for name, (seconds, ratio) in figures.items()]


def run(
    beton: Path, manifest: Path, *, image_size: int = 224, rounds: int = 8, progress: Progress | None = None
) -> list[Row]:
    """Measure on a beton and the manifest of the same images, in a folder; ``rounds`` is at least 8.

    Raises UserError when they are not the same image set, or when the machine is too restless to tell.
    """
    book = load_manifest(manifest)
    _check_same_images(beton, manifest, book)

    def contestants() -> dict[str, Contestant]:
        return {
            OURS: _patchmill("ffcv", beton, image_size),
            SCALED: _patchmill("ffcv", beton, image_size, decode="scaled"),
            "patchmill ffcv, bicubic": _patchmill("ffcv", beton, image_size, resample="bicubic"),
            STOCK: _stock(beton, book.num_samples, image_size),
            "patchmill folder": _patchmill("folder", manifest, image_size),
            "torchvision DataLoader, uint8": _torchvision(book, image_size, False),
            DATALOADER: _torchvision(book, image_size, True),
        }

    return compare(measure(lambda: {name: _lasting(read) for name, read in contestants().items()}, rounds, progress))


def _others_cpu_s() -> float:
    """CPU seconds that all other processes of this host have used since it started (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split(None, 9)[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def run_threads(
    beton: Path, threads: int, *, image_size: int = 224, rounds: int = 8, progress: Progress | None = None
) -> list[ThreadsRow]:
    """The plain FFCV loader with one and with ``threads`` threads, by the clock: only an idle machine can tell.

    Raises UserError when it is not idle enough.
    """
    counts: Sequence[int] = (1, threads)
    start, before = time.perf_counter(), _others_cpu_s()
    figures = measure(lambda: {f"{n} threads": _lasting(_patchmill("ffcv", beton, image_size, n)) for n in counts}, rounds,
                      progress, time.perf_counter)  # fmt: skip
    others = (_others_cpu_s() - before) / (time.perf_counter() - start)
    if others > OTHERS:
        raise UserError(f"the machine is not idle: other processes used {others:.2f} CPUs meanwhile, should be at most {OTHERS}; "
                        "run it again when nothing else runs")  # fmt: skip
    one = figures["1 threads"][0]
    return [ThreadsRow(n, *figures[f"{n} threads"], one / figures[f"{n} threads"][0]) for n in counts]


def run_resume(rounds: int = 3) -> list[ResumeRow]:
    """From nothing to a late step's sample ids, in the full and the windowed order: the median of ``rounds``."""
    pages, rows = np.arange(IMAGENET) // IMAGES_A_PAGE, []
    for name in ("full", "windowed"):
        seconds = []
        for number in range(rounds):
            windows = order.Windows(pages, 64) if name == "windowed" else None
            start = time.perf_counter()
            # No seed twice: a cached order is not a restart.
            next(order.run_order(-1 - number, RESUME_STEP, 2 * RESUME_STEP, IMAGENET, RESUME_BATCH, (), windows))
            seconds.append(time.perf_counter() - start)
        rows.append(ResumeRow(name, median(seconds)))
    return rows
