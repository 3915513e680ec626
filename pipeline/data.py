"""The loaders behind one face: FFCV betons, image folders and synthetic images, with the same crops from each.

A batch is a pure function of the seed, the epoch and its sample ids. A pool of threads decodes it in slices of a few
images; one thread per iterator assembles batches ahead of the consumer. An error in any of them is raised where
the batch would have been handed out, after the good batches before it.
"""

import hashlib
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.crops import Crops, Int32
from pipeline.keys import Int64, hash_integers
from pipeline.order import sample_keys

UInt8 = npt.NDArray[np.uint8]
Order = Iterator[tuple[int, Int64]]
Kind = Literal["ffcv", "folder", "synthetic"]

SLICE: Final = 8  # images per job: long enough to hide a job's cost, short enough to spread a small batch over threads
BATCHES_AHEAD: Final = 2
JIT_PAYS_FROM: Final = 20_000


@dataclass(frozen=True)
class Batch:
    """B samples: images uint8 [B, 3, S, S]; labels, ids and keys int64 [B]. The tensors own their memory."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    keys: Tensor


def _produce(make: Callable[[int, Int64, ThreadPoolExecutor], Batch], order: Order, threads: int,
             queue: "Queue[Batch | BaseException | None]", stop: threading.Event) -> None:  # fmt: skip
    """Fill the queue from ``order``; whatever goes wrong goes through the queue. Holds no reference to the iterator."""

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    pool = ThreadPoolExecutor(threads, "patchmill-decode")
    try:
        for epoch, ids in order:
            put(make(epoch, ids, pool))
            if stop.is_set():
                return
        put(None)
    except BaseException as error:  # noqa: BLE001  it is raised in the consumer
        put(error)
    finally:
        pool.shutdown(cancel_futures=True)


class Batches(Iterator[Batch]):
    """The batches of an order, made ahead on a thread. Close it, or use it as a context manager, when leaving early.

    ``waited`` counts the seconds that the consumer has waited for data. Raises what the loader's threads raised.
    """

    def __init__(self, make: Callable[[int, Int64, ThreadPoolExecutor], Batch], order: Order, threads: int) -> None:
        """Start the thread; ``make`` turns an epoch and sample ids into a batch."""
        self.waited = 0.0
        self._stop = threading.Event()
        self._queue: Queue[Batch | BaseException | None] = Queue(BATCHES_AHEAD)
        args = (make, order, threads, self._queue, self._stop)
        self._thread = threading.Thread(target=_produce, args=args, daemon=True, name="patchmill-data")
        self._thread.start()

    def _get(self) -> Batch | BaseException | None:
        while True:
            try:
                return self._queue.get(timeout=1)
            except Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    return RuntimeError("the loader's thread ended without a word")

    def __next__(self) -> Batch:
        """The next batch; raises what went wrong while it was made."""
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._get()
        self.waited += time.perf_counter() - start
        if isinstance(item, Batch):
            return item
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Stop and wait for the threads; batches made ahead are dropped. Harmless when called twice."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> Self:
        """The iterator itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """An abandoned iterator stops its threads; joining here could wait on the very thread that collects it."""
        if hasattr(self, "_stop"):
            self._stop.set()


class Loader(ABC):
    """A set of images; ``image_set`` names its content: equal names, equal images and labels in equal order."""

    def __init__(self, image_set: str, sizes: tuple[Int64, Int64], labels: Int64, num_classes: int, crops: Crops,
                 seed: int, threads: int) -> None:  # fmt: skip
        """Keep the set's identity, the images' (heights, widths) [N], labels [N] and how to cut them."""
        self.image_set = image_set
        self.num_samples = len(labels)
        self.num_classes = num_classes
        self.crops = crops
        self._heights, self._widths = sizes
        self._labels = labels
        self._seed = seed
        self._threads = threads
        self._open: weakref.WeakSet[Batches] = weakref.WeakSet()

    @abstractmethod
    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """Cut samples ``ids`` [n] by ``boxes`` [n, 5] into ``out`` uint8 [n, 3, S, S]; called from several threads."""

    def labels(self) -> Int64:
        """The class of every sample: int64 [N]."""
        return self._labels

    def boxes(self, epoch: int, ids: Int64) -> Int32:
        """Where samples ``ids`` [B] are cut in an epoch: int32 [B, 5] as in ``pipeline.crops``."""
        return self.crops.boxes(sample_keys(self._seed, epoch, ids), self._heights[ids], self._widths[ids])

    def batches(self, order: Order) -> Batches:
        """Batches of the sample ids that ``order`` yields with their epoch; consumed on the loader's thread."""
        batches = Batches(self._make, order, self._threads)
        self._open.add(batches)
        return batches

    def close(self) -> None:
        """Close every iterator that is still open."""
        for batches in list(self._open):
            batches.close()

    def _make(self, epoch: int, ids: Int64, pool: ThreadPoolExecutor) -> Batch:
        ids = np.array(ids, np.int64)
        boxes = self.boxes(epoch, ids)
        images = np.empty((len(ids), 3, self.crops.image_size, self.crops.image_size), np.uint8)
        parts = [slice(k, k + SLICE) for k in range(0, len(ids), SLICE)]
        for job in [pool.submit(self.decode, ids[part], boxes[part], images[part]) for part in parts]:
            job.result()
        arrays = images, self._labels[ids], ids, sample_keys(self._seed, epoch, ids)
        return Batch(*(torch.from_numpy(array) for array in arrays))


def to_planes(image: UInt8, flip: int, out: UInt8) -> None:
    """Write an image uint8 [S, S, 3] as planes into ``out`` [3, S, S], mirrored when ``flip``."""
    import cv2

    cv2.split(cv2.flip(image, 1) if flip else image, list(out))


class FolderLoader(Loader):
    """Image files, decoded by Pillow, by a manifest of ``patchmill prep scan``.

    Same boxes as the FFCV loader. The pixels differ by 1.1 grey levels in the mean (ImageNet at 224; 2.2 in the worst
    image), because FFCV decodes with libjpeg's fast transform; a beton of raw pixels differs by less than 0.1.
    """

    def __init__(self, path: Path, crops: Crops, seed: int, threads: int) -> None:
        """Read the manifest. Raises UserError."""
        from data_prep.scan import load_manifest
        from data_prep.sources import ImageFolder

        if path.is_dir():
            raise UserError(f"{path}: is a folder; scan it once with: patchmill prep scan {path} MANIFEST, "
                            "and give that manifest")  # fmt: skip
        manifest = load_manifest(path)
        self._source, self._paths, self._digests = ImageFolder(manifest.root), manifest.paths, manifest.source_sha256
        self._rescan = f"scan again with: patchmill prep scan {manifest.root} {path}"
        sizes = manifest.heights, manifest.widths
        super().__init__(manifest.image_set, sizes, manifest.labels, len(manifest.classes), crops, seed, threads)

    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """As in ``Loader``; raises UserError for a file that is missing or not the one that was scanned."""
        import cv2

        size = (self.crops.image_size, self.crops.image_size)
        for sample_id, (top, left, height, width, flip), planes in zip(ids.tolist(), boxes.tolist(), out, strict=True):
            crop = self._pixels(sample_id)[top : top + height, left : left + width]
            to_planes(np.asarray(cv2.resize(crop, size, interpolation=cv2.INTER_AREA), np.uint8), flip, planes)

    def _pixels(self, sample_id: int) -> UInt8:
        """The whole image, upright RGB: uint8 [height, width, 3]."""
        from data_prep.images import ImageError, decode

        path = self._paths[sample_id]
        try:
            data = self._source.read(path)
            if hashlib.sha256(data).digest() != self._digests[sample_id].tobytes():
                raise ImageError("has changed since it was scanned")
            return decode(data)[0]
        except ImageError as error:
            raise UserError(f"{self._source.root / path}: sample {sample_id}: {error}; {self._rescan}") from error


VIRTUAL: Final = 256  # side of a synthetic image in pixels
GRID: Final = 4  # colour control points along a side
TILE: Final = 64


class SyntheticLoader(Loader):
    """Images that are a pure function of (seed, sample id): smooth colours, partly the class's, and noise; no files.

    An image is 256 x 256 virtual pixels of which only those that a box asks for are computed, in exact integers, so
    every machine makes the same ones. The label is the sample id modulo the number of classes.
    """

    def __init__(self, num_samples: int, num_classes: int, crops: Crops, seed: int, threads: int) -> None:
        """Nothing is made before it is asked for."""
        sides = np.broadcast_to(np.int64(VIRTUAL), num_samples)
        labels = np.arange(num_samples, dtype=np.int64) % num_classes
        name = f"synthetic-{seed}-{num_samples}-{num_classes}"
        super().__init__(name, (sides, sides), labels, num_classes, crops, seed, threads)
        self._noise = (hash_integers(seed, 0, np.arange(3 * TILE**2)) & 31).reshape(3, TILE, TILE)

    def _colours(self, ids: Int64) -> npt.NDArray[np.float32]:
        """Control points in 0 to 255, one third the sample's own: [n, 3, GRID, GRID]."""
        points = np.arange(3 * GRID**2)
        own = hash_integers(self._seed, 1, ids[:, None], points) & 255
        shared = hash_integers(self._seed, 2, self._labels[ids, None], points) & 255
        mixed = (own + 2 * shared) // 3
        return mixed.reshape(-1, 3, GRID, GRID).astype(np.float32)

    def _pixels(self, start: Int32, length: Int32) -> Int64:
        """Virtual pixel coordinates, in half pixels, of the outputs along one axis: [n, S]."""
        size = self.crops.image_size
        steps = (2 * np.arange(size) + 1) * length[:, None].astype(np.int64) // size
        return 2 * start[:, None].astype(np.int64) + steps

    @staticmethod
    def _weights(halves: Int64) -> npt.NDArray[np.float32]:
        """Linear interpolation over the control points in 128ths: [n, S, GRID]."""
        position = halves * ((GRID - 1) * 128) // (2 * VIRTUAL)
        distance: Int64 = np.abs(position[..., None] - 128 * np.arange(GRID))
        return np.maximum(128 - distance, 0).astype(np.float32)

    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """As in ``Loader``."""
        top, left, height, width, flip = boxes.T
        rows, cols = self._pixels(top, height), self._pixels(left, width)
        cols = np.where(flip[:, None] == 1, cols[:, ::-1], cols)
        # Sums of products of small integers: below 2^24, hence exact in float32 in whatever order they are added.
        down = self._weights(rows)[:, None] @ self._colours(ids)
        smooth = (down @ self._weights(cols)[:, None].swapaxes(-1, -2)).astype(np.int32)
        shift = hash_integers(self._seed, 3, ids) & (TILE - 1)
        for k in range(len(ids)):
            tile = self._noise[:, (rows[k] // 2 + shift[k])[:, None] % TILE, (cols[k] // 2 + 3 * shift[k]) % TILE]
            out[k] = (smooth[k] * 7 >> 17) + tile


def open_loader(
    kind: Kind,
    path: str | Path | None,
    *,
    image_size: int,
    seed: int,
    threads: int,
    augment: bool,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = True,
    eval_crop: float = 0.875,
    jit: Literal["auto", "on", "off"] = "auto",
    num_samples: int = 1024,
    num_classes: int = 10,
    expected_images: int | None = None,
) -> Loader:
    """A loader of ``image_size`` outputs: random crops with ``augment``, else centred ones of ``eval_crop``.

    ``path`` is a sealed beton (ffcv) or a manifest (folder); ``num_samples``, ``num_classes``: the synthetic set only.
    ``jit`` compiles FFCV's decoder; auto does when the run will read ``expected_images`` enough to pay for it.
    Raises UserError for a path that is missing, broken or of the wrong kind.
    """
    crops = Crops(image_size, augment, crop_scale, flip, eval_crop)
    if kind == "synthetic":
        return SyntheticLoader(num_samples, num_classes, crops, seed, threads)
    if path is None:
        raise UserError(f"the {kind} loader needs a path: {'a sealed beton' if kind == 'ffcv' else 'a manifest'}")
    if kind == "folder":
        return FolderLoader(Path(path), crops, seed, threads)
    from pipeline.ffcv_loader import FFCVLoader

    long = expected_images is None or expected_images >= JIT_PAYS_FROM
    return FFCVLoader(Path(path), crops, seed, threads, compiled=jit == "on" or (jit == "auto" and long))
