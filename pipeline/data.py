"""The loaders behind one face: FFCV betons, image folders and synthetic images, with the same crops from each.

A batch is a pure function of the seed, the epoch and its sample ids. A pool of threads decodes it in slices of a few
images; one thread per iterator assembles batches ahead of the consumer. An error in any of them is raised where
the batch would have been handed out, after the good batches before it.
"""

import hashlib
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.crops import Crops, Int32, Resample
from pipeline.keys import Int64
from pipeline.order import Windows, sample_keys
from pipeline.resample import RESAMPLE

UInt8 = npt.NDArray[np.uint8]
Order = Iterator[tuple[int, Int64]]
Kind = Literal["ffcv", "folder", "synthetic"]
Jit = Literal["auto", "on", "off"]

SLICE: Final = 8  # images per job: long enough to hide a job's cost, short enough to spread a small batch over threads
BATCHES_AHEAD: Final = 2
JIT_PAYS_FROM: Final = 20_000
MAX_THREADS: Final = 16
CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def decode_threads(wanted: int | None) -> tuple[int, str]:
    """How many threads decode, and why: ``wanted``, else this process's share of the CPUs that it may use, 16 at most."""
    if wanted is not None:
        return wanted, "data.threads"
    threads, why = len(os.sched_getaffinity(0)), "the CPUs of this process"
    quota, _, period = CPU_QUOTA.read_text().partition(" ") if CPU_QUOTA.is_file() else ("max", "", "")
    if quota != "max" and int(quota) // int(period) < threads:
        threads, why = max(1, int(quota) // int(period)), "the CPU quota of this control group"
    # srun gives each process its own CPUs, torchrun and --nproc give all of them to all.
    sharing = 1 if "SLURM_STEP_ID" in os.environ else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if sharing > 1:
        threads, why = max(1, threads // sharing), f"{why}, shared by {sharing}"
    return (threads, why) if threads <= MAX_THREADS else (MAX_THREADS, f"at most {MAX_THREADS} by default")


@dataclass(frozen=True)
class Batch:
    """B samples: images uint8 [B, 3, S, S]; labels, ids and keys int64 [B]. The tensors own their memory.

    ``batch_key`` int64 [1]: the key of the first sample of the batch that these are a part of.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    keys: Tensor
    batch_key: Tensor


Make = Callable[[int, Int64, ThreadPoolExecutor], Batch]
# A batch and, where its images are on their way to a CUDA device, the event that they have arrived.
Item = tuple[Batch, torch.cuda.Event | None] | BaseException | None


def _uploader(device: torch.device | None) -> Callable[[Batch], tuple[Batch, torch.cuda.Event | None]]:
    """Starts the copy of a batch's pinned images to a CUDA device, on a stream beside the one that computes."""
    if device is None or device.type != "cuda":
        return lambda batch: (batch, None)
    stream = torch.cuda.Stream(device)

    def upload(batch: Batch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            images = batch.images.to(device, non_blocking=True)  # torch keeps the pinned memory until this is done
        return replace(batch, images=images), stream.record_event()

    return upload


def _produce(make: Make, order: Order, threads: int, device: torch.device | None, queue: Queue[Item],
             stop: threading.Event) -> None:  # fmt: skip
    """Fill the queue from ``order``; whatever goes wrong goes through the queue. Holds no reference to the iterator."""

    def is_wanted() -> bool:
        return not stop.is_set() and threading.main_thread().is_alive()

    def put(item: Item) -> None:
        while is_wanted():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    pool = ThreadPoolExecutor(threads, "patchmill-decode")
    try:
        upload = _uploader(device)
        for epoch, ids in order:
            put(upload(make(epoch, ids, pool)))
            if not is_wanted():
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

    def __init__(self, make: Make, order: Order, threads: int, device: torch.device | None) -> None:
        """Start the thread; ``make`` turns an epoch and sample ids into a batch. A CUDA ``device`` gets the images."""
        self.waited = 0.0
        self.stop = threading.Event()
        self._queue: Queue[Item] = Queue(BATCHES_AHEAD)
        args = (make, order, threads, device, self._queue, self.stop)
        # Not a daemon: those are killed when the interpreter ends, which aborts the process if they are in torch's code.
        self.thread = threading.Thread(target=_produce, args=args, daemon=False, name="patchmill-data")
        self.thread.start()

    def _get(self) -> Item:
        while True:
            try:
                return self._queue.get(timeout=1)
            except Empty:
                if not self.thread.is_alive() and self._queue.empty():
                    return RuntimeError("the loader's thread ended without a word")

    def __next__(self) -> Batch:
        """The next batch; raises what went wrong while it was made."""
        if self.stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        item = self._get()
        self.waited += time.perf_counter() - start
        if isinstance(item, tuple):
            batch, arrived = item
            if arrived is not None:
                stream = torch.cuda.current_stream(batch.images.device)
                stream.wait_event(arrived)
                # Else their memory could be a later batch's before this one's step ran.
                batch.images.record_stream(stream)
            return batch
        self.close()
        raise StopIteration if item is None else item

    def close(self) -> None:
        """Stop and wait for the threads; batches made ahead are dropped. Harmless when called twice."""
        self.stop.set()
        self.thread.join()

    def __enter__(self) -> Self:
        """The iterator itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        """An abandoned iterator stops its threads; joining here could wait on the very thread that collects it."""
        if hasattr(self, "stop"):
            self.stop.set()


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
        self.policy: Callable[[Int64, UInt8], None] | None = (
            None  # done to images [n, 3, S, S] by their keys [n], in place
        )
        self._only: Int64 | None = None
        self._running: weakref.WeakKeyDictionary[threading.Thread, threading.Event] = weakref.WeakKeyDictionary()

    @abstractmethod
    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """Cut samples ``ids`` [n] by ``boxes`` [n, 5] into ``out`` uint8 [n, 3, S, S]; called from several threads."""

    def labels(self) -> Int64:
        """The class of every sample: int64 [N]."""
        return self._labels

    def keep_only(self, ids: Int64, name: str) -> None:
        """From now on the set is these samples, int64 [n] ascending, numbered from 0 in orders; their keys stay those of the whole.

        ``name``: by what they were chosen.
        """
        self._only, self.num_samples, self.image_set = ids, len(ids), f"{self.image_set} {name}"

    def windows(self, num_pages: int) -> Windows:
        """What the windowed order of this set needs, ``num_pages`` pages a window. Raises UserError: only a beton has pages."""
        raise UserError(
            "data.shuffle = windowed: mixes the pages of a beton; set data.loader=ffcv or data.shuffle=full"
        )

    def boxes(self, epoch: int, ids: Int64) -> Int32:
        """Where samples ``ids`` [B] are cut in an epoch: int32 [B, 5] as in ``pipeline.crops``."""
        return self.crops.boxes(sample_keys(self._seed, epoch, ids), self._heights[ids], self._widths[ids])

    def batches(self, order: Order, device: torch.device | None = None, part: slice = slice(None)) -> Batches:
        """Batches of ``part`` of the sample ids that ``order`` yields with their epoch; consumed on the loader's thread.

        With a CUDA ``device`` the images of the batches made ahead go there, and nothing waits for the copy but the
        stream that is current where a batch is taken. On any other they stay on the CPU.
        """
        make = partial(self._make, part=part, pinned=device is not None and device.type == "cuda")
        batches = Batches(make, order, self._threads, device)
        self._running[batches.thread] = batches.stop
        return batches

    def close(self) -> None:
        """Stop and wait for the threads of every iterator, of those too that were dropped a moment ago."""
        for thread, stop in list(self._running.items()):
            stop.set()
            thread.join()

    def _make(self, epoch: int, batch_ids: Int64, pool: ThreadPoolExecutor, part: slice, pinned: bool) -> Batch:
        if self._only is not None:
            batch_ids = self._only[batch_ids]
        ids = np.array(batch_ids[part], np.int64)
        boxes = self.boxes(epoch, ids)
        size = self.crops.image_size
        images = torch.empty((len(ids), 3, size, size), dtype=torch.uint8, pin_memory=pinned)
        out = images.numpy()
        keys, first = (sample_keys(self._seed, epoch, some) for some in (ids, np.array(batch_ids[:1], np.int64)))
        slices = [slice(k, k + SLICE) for k in range(0, len(ids), SLICE)]
        for job in [pool.submit(self._fill, ids[some], boxes[some], keys[some], out[some]) for some in slices]:
            job.result()
        arrays = self._labels[ids], ids, keys, first
        return Batch(images, *(torch.from_numpy(array) for array in arrays))

    def _fill(self, ids: Int64, boxes: Int32, keys: Int64, out: UInt8) -> None:
        self.decode(ids, boxes, out)
        if self.policy is not None:
            self.policy(keys, out)


def to_planes(image: UInt8, flip: int, out: UInt8) -> None:
    """Write an image uint8 [S, S, 3] as planes into ``out`` [3, S, S], mirrored when ``flip``."""
    import cv2

    cv2.split(cv2.flip(image, 1) if flip else image, list(out))


class FolderLoader(Loader):
    """Image files, decoded by Pillow, by a manifest of ``patchmill prep scan``.

    Same boxes as the FFCV loader. The pixels differ by 1.1 grey levels in the mean (ImageNet at 224; 2.2 in the worst
    image), because FFCV decodes with libjpeg's fast transform; a beton of raw pixels differs by less than 0.1, and with
    bicubic resampling not at all.

    Scaled decoding is for upright RGB or gray JPEGs; every other file is decoded whole and keeps the finer box. A
    beton of JPEGs holds those re-encoded and upright, and scales them too; one of raw pixels scales nothing. Scaled by
    both loaders, ImageNet's pixels differ by 0.2 grey levels in the mean at 96, and by 1.1 at 224, where few are scaled.
    """

    def __init__(self, path: Path, crops: Crops, seed: int, threads: int) -> None:
        """Read the manifest. Raises UserError."""
        from data_prep.kinds import reopen
        from data_prep.manifest import load_manifest

        if path.is_dir():
            raise UserError(f"{path}: is a folder; scan it once with: patchmill prep scan {path} MANIFEST, "
                            "and give that manifest")  # fmt: skip
        manifest = load_manifest(path)
        self._source = reopen(manifest.source_kind, manifest.root)
        self._paths, self._digests = manifest.paths, manifest.source_sha256
        if not self._source.any_order:
            raise UserError(f"{path}: its images lie in {manifest.source_kind} shards, which are read as wholes; write a beton for "
                            f"data.loader=ffcv with: patchmill prep write {path} BETON")  # fmt: skip
        self._places = np.stack([manifest.positions, manifest.num_bytes], 1)
        self._rescan = f"scan again with: patchmill prep scan {manifest.root} {path}"
        sizes = manifest.heights, manifest.widths
        super().__init__(manifest.image_set, sizes, manifest.labels, len(manifest.classes), crops, seed, threads)

    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """As in ``Loader``; raises UserError for a file that is missing or not the one that was scanned."""
        resample = RESAMPLE[self.crops.resample]
        eighths, on_scale = self.crops.on_scale(boxes)
        for k, (sample_id, shrink) in enumerate(zip(ids.tolist(), (8 // eighths).tolist(), strict=True)):
            image = self._pixels(sample_id, shrink)
            is_scaled = image.shape[0] < self._heights[sample_id]
            *box, flip = (on_scale if is_scaled else boxes)[k].tolist()
            to_planes(resample(image, box, self.crops.image_size), flip, out[k])

    def _pixels(self, sample_id: int, shrink: int) -> UInt8:
        """The whole image, upright RGB, uint8 [height, width, 3], its sides divided by ``shrink`` where that is cheaper."""
        from data_prep.images import ImageError, decode

        path = self._paths[sample_id]
        try:
            data = self._source.read(path, *self._places[sample_id].tolist())
            if hashlib.sha256(data).digest() != self._digests[sample_id].tobytes():
                raise ImageError("has changed since it was scanned")
            return decode(data, shrink)[0]
        except ImageError as error:
            raise UserError(f"{self._source.root / path}: sample {sample_id}: {error}; {self._rescan}") from error


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
    decode: Literal["full", "scaled"] = "full",
    resample: Resample = "area",
    jit: Jit = "auto",
    num_samples: int = 1024,
    num_classes: int = 10,
    expected_images: int | None = None,
) -> Loader:
    """A loader of ``image_size`` outputs: random crops with ``augment``, else centred ones of ``eval_crop``.

    ``path`` is a sealed beton (ffcv) or a manifest (folder); ``num_samples``, ``num_classes``: the synthetic set only.
    ``decode`` scaled: JPEGs no larger than their box needs. ``resample``: see ``pipeline.resample``. ``jit`` on compiles
    FFCV's decoder first; auto does it behind the first batches, when ``expected_images`` are enough to pay for it.
    Raises UserError for a path that is missing, broken or of the wrong kind.
    """
    crops = Crops(image_size, augment, crop_scale, flip, eval_crop, decode == "scaled", resample)
    if kind == "synthetic":
        from pipeline.synthetic import SyntheticLoader

        return SyntheticLoader(num_samples, num_classes, crops, seed, threads)
    if path is None:
        raise UserError(f"the {kind} loader needs a path: {'a sealed beton' if kind == 'ffcv' else 'a manifest'}")
    if kind == "folder":
        return FolderLoader(Path(path), crops, seed, threads)
    from pipeline.ffcv_loader import FFCVLoader

    too_short = expected_images is not None and expected_images < JIT_PAYS_FROM
    return FFCVLoader(Path(path), crops, seed, threads, "off" if jit == "auto" and too_short else jit)
