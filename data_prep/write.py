"""Write a manifest's images into a sealed beton: any number of workers and of kills gives the same bytes.

Workers encode and hand over bytes; this process lays them out in the manifest's order (``data_prep.journal``). Whether
a sample is stored as JPEG or as pixels is known beforehand: ``jpg`` and ``raw`` for all; ``smart``: JPEG where the
pixels take more than ``smart_threshold`` bytes; ``proportion``: JPEG for that share, by a hash of (seed, sample). Where
it is JPEG, a file's own bytes are kept if it is a baseline JPEG, RGB or gray, upright, not shrunk, and FFCV's decoder
takes it; else FFCV's encoder makes one of the upright RGB pixels. Encoded bytes depend on the libraries' versions, so these
stand in the journal and in the seal.
"""

import errno
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from data_prep.beton import (
    CRC,
    JOURNAL,
    JPG,
    MAX_PAGE,
    PARTIAL,
    RAW,
    ROW,
    SEAL,
    align,
    beside,
    head_size,
    locked,
    page_size_for,
    sync_folder,
    write_atomically,
)
from data_prep.images import ImageError, Pixels, decode
from data_prep.journal import Encoded, PartialBeton, difference
from data_prep.kinds import reopen
from data_prep.manifest import Manifest, load_manifest
from data_prep.sources import Progress, Source
from data_prep.verify import check_seal, decodes, import_ffcv, load_seal, seal_text
from data_prep.workers import chunks, ordered_map
from pipeline.config import UserError
from pipeline.keys import hash_integers

Mode = Literal["jpg", "raw", "smart", "proportion"]

JPEG_BYTES_PER_PIXEL: Final = 0.5  # a photograph at quality 90, until some have been encoded
NUM_PROBED: Final = 16  # samples that are encoded to see what the work will take


@dataclass(frozen=True)
class WriteReport:
    """A sealed beton. ``num_kept`` samples are their file's own bytes, ``num_resumed`` were there from an earlier run.

    ``already_complete``: the same content stood there sealed, and nothing was written.
    """

    beton: Path
    num_samples: int
    num_kept: int
    num_resumed: int
    num_bytes: int
    already_complete: bool
    seconds: float

    def __str__(self) -> str:
        """One line for people."""
        if self.already_complete:
            return f"{self.beton} is complete already: {self.num_samples} images, sealed"
        resumed = f", {self.num_resumed} of them from an interrupted run" if self.num_resumed else ""
        return (f"{self.num_samples} images ({self.num_kept} with their own bytes{resumed}), {self.num_bytes / 2**20:.1f} MiB, "
                f"in {self.seconds:.1f} s, sealed: {self.beton}")  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is known before an image is read: stored sizes in pixels and kinds, [N]; page size; expected bytes, [N]."""

    widths: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int64]
    as_jpeg: npt.NDArray[np.bool_]
    keepable: npt.NDArray[np.bool_]
    page_size: int
    num_bytes: npt.NDArray[np.int64]


def _options(
    mode: Mode, max_side: int | None, quality: int, smart_threshold: int | None, proportion: float, seed: int
) -> dict[str, Any]:
    """The options that bear on the bytes in this mode. Raises UserError for one that makes no sense."""
    options: dict[str, Any] = {"mode": mode, "max_side": max_side}
    if mode not in ("jpg", "raw", "smart", "proportion"):
        raise UserError(f"mode = {mode!r}: should be jpg, raw, smart or proportion")
    if max_side is not None and max_side < 1:
        raise UserError(f"max_side = {max_side}: should be at least 1 pixel")
    if mode != "raw":
        if not 1 <= quality <= 100:
            raise UserError(f"quality = {quality}: should lie in 1 to 100")
        options["quality"] = quality
    if mode == "smart":
        if smart_threshold is None or smart_threshold < 1:
            raise UserError("smart_threshold: mode smart needs it: images over this many bytes of pixels become JPEG")
        options["smart_threshold"] = smart_threshold
    if mode == "proportion":
        if not 0 <= proportion <= 1:
            raise UserError(f"proportion = {proportion}: should lie in 0 to 1")
        options |= {"proportion": float(proportion), "seed": seed}
    return options


def _as_jpeg(options: dict[str, Any], raw_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    count = len(raw_bytes)
    match options["mode"]:
        case "smart":
            return raw_bytes > int(options["smart_threshold"])
        case "proportion":
            draws = hash_integers(options["seed"], np.arange(count)).view(np.uint64) >> np.uint64(11)
            return draws * 2.0**-53 < float(options["proportion"])
        case mode:
            return np.full(count, mode == "jpg")


def _plan(manifest: Manifest, options: dict[str, Any]) -> _Plan:
    longest = np.maximum(manifest.widths, manifest.heights)
    side = np.minimum(longest, options["max_side"] or longest)
    widths, heights = (np.maximum(1, size * side // longest) for size in (manifest.widths, manifest.heights))
    raw_bytes = widths * heights * 3
    as_jpeg = _as_jpeg(options, raw_bytes)
    plain = np.array([f == "JPEG" and m in ("RGB", "L") for f, m in zip(manifest.formats, manifest.modes, strict=True)])
    upright = (manifest.orientations == 1) & ~manifest.progressive & (side == longest)
    keepable = as_jpeg & plain & upright
    # No JPEG of 8-bit pixels comes near three bytes a pixel of its padded size; the rest is for its tables.
    jpeg_bound = (widths + 15) * (heights + 15) * 3 + 4096
    bound = np.where(as_jpeg, np.maximum(jpeg_bound, manifest.num_bytes * keepable), raw_bytes)
    page_size = page_size_for(int(bound.max()))
    if page_size > MAX_PAGE:
        raise UserError(f"{manifest.path}: sample {bound.argmax()} ({manifest.paths[int(bound.argmax())]}) may take "
                        f"{bound.max()} bytes, more than a page can hold; set max_side")  # fmt: skip
    encoded = np.where(as_jpeg, raw_bytes * (JPEG_BYTES_PER_PIXEL / 3), raw_bytes)
    return _Plan(
        widths, heights, as_jpeg, keepable, page_size, np.where(keepable, manifest.num_bytes, encoded).astype(np.int64)
    )


@dataclass(frozen=True)
class _Encoder:
    """Makes the stored form of a run of samples; called in the workers."""

    manifest: Manifest
    source: Source
    plan: _Plan
    quality: int

    def __call__(self, samples: Iterable[int]) -> list[Encoded]:
        return [self._one(int(sample)) for sample in samples]

    def _one(self, sample: int) -> Encoded:
        data = self._read(sample)
        width, height = int(self.plan.widths[sample]), int(self.plan.heights[sample])
        kept = bool(self.plan.keepable[sample]) and decodes(data, width, height)
        as_jpeg = bool(self.plan.as_jpeg[sample])
        if not kept:
            data = self._encode(data, (width, height), as_jpeg)
        row = np.zeros(1, ROW)
        row["f0"] = (JPG if as_jpeg else RAW, width, height, 0)
        row["f1"] = self.manifest.labels[sample]
        return Encoded(row.tobytes(), data, zlib.crc32(data), kept)

    def _read(self, sample: int) -> bytes:
        path = self.manifest.paths[sample]
        try:
            data = self.source.read(path, int(self.manifest.positions[sample]), int(self.manifest.num_bytes[sample]))
            if hashlib.sha256(data).digest() != self.manifest.source_sha256[sample].tobytes():
                raise ImageError("has changed since it was scanned")
        except ImageError as error:
            again = f"patchmill prep scan {self.manifest.root} {self.manifest.path}"
            raise UserError(f"{self.manifest.root / path}: {error}; scan again with: {again}") from None
        return data

    def _encode(self, data: bytes, size: tuple[int, int], as_jpeg: bool) -> bytes:
        import cv2
        from ffcv.fields.rgb_image import encode_jpeg  # not the field's encode: it compiles for seconds in each worker

        pixels: Pixels = decode(data)[0]
        if size != (pixels.shape[1], pixels.shape[0]):
            pixels = np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)
        stored: Pixels = encode_jpeg(pixels, self.quality) if as_jpeg else pixels
        return stored.tobytes()


def _versions() -> dict[str, str | None]:
    from PIL import features

    packages = ("ffcv", "opencv-python", "pillow", "numpy")
    return {**{name: version(name) for name in packages}, "libjpeg_turbo": features.version_feature("libjpeg_turbo")}


def _complete(beton: Path, what: dict[str, Any]) -> bool:
    """Whether the beton stands there whole. Raises UserError when something else stands there."""
    if not beton.exists():
        return False
    content = {key: value for key, value in what.items() if key != "versions"}
    changes = difference(load_seal(beton), content)
    if changes:
        raise UserError(f"{beton}: is already there with other content ({changes}); delete it or choose another name")
    try:
        check_seal(beton)
    except UserError:
        return False  # broken: the same content takes its place
    return True


@dataclass(frozen=True)
class _Forecast:
    """What a probe says of the work: seconds to encode a sample on one core, bytes of all samples, size of the file."""

    seconds: float
    num_bytes: int
    file_size: int

    def announce(self, todo: int, workers: int) -> str:
        cores = min(max(1, workers), len(os.sched_getaffinity(0)))
        minutes = todo * self.seconds / cores / 60
        return (f"{todo} images to write, about {max(minutes, 0.1):.1f} min on {cores} cores; "
                f"the file will have about {self.file_size / 2**20:,.0f} MiB")  # fmt: skip


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """OpenCV without threads: the workers are the parallelism, and a forked thread pool would hang."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _probe(encode: _Encoder) -> _Forecast:
    """Encode a few samples from all over the set."""
    plan = encode.plan
    spread = np.unique(np.linspace(0, encode.manifest.num_samples - 1, NUM_PROBED).astype(int))
    started = time.perf_counter()
    stored = np.array([len(sample.data) for sample in encode(spread)])
    seconds = (time.perf_counter() - started) / len(spread)
    kept = plan.keepable
    # Only what is encoded again is a guess; how far off it is, these samples say.
    again = ~kept[spread]
    ratio = stored[again].sum() / max(1, plan.num_bytes[spread][again].sum())
    num_bytes = int(plan.num_bytes[kept].sum() + plan.num_bytes[~kept].sum() * ratio)
    # Samples begin on a page border, and half a sample is lost at the end of each page.
    lost = num_bytes / len(kept) / 2 / plan.page_size
    return _Forecast(seconds, num_bytes, align(head_size(len(kept)), plan.page_size) + int(num_bytes * (1 + lost)))


def _check_disk(beton: Path, num_bytes: int) -> None:
    partial = beside(beton, PARTIAL)
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(beton.parent).free + there
    if free < num_bytes:
        need, have = f"{num_bytes / 2**30:.2f}", f"{free / 2**30:.2f}"
        raise UserError(f"{beton}: needs about {need} GiB and {beton.parent} has {have} GiB free; "
                        "make room, choose another disk, or set max_side")  # fmt: skip


def _fill(partial: PartialBeton, encode: _Encoder, workers: int, progress: Progress | None) -> None:
    count = encode.manifest.num_samples
    todo = chunks(encode.manifest.positions.tolist(), partial.num_done, workers, encode.plan.num_bytes.tolist())
    with closing(ordered_map(encode, todo, workers)) as runs:
        for run in runs:
            for sample in run:
                partial.add(sample)
                if progress is not None:
                    progress(partial.num_done, count)


def _write(beton: Path, what: dict[str, Any], encode: _Encoder, workers: int, progress: Progress | None,
           announce: Callable[[str], None] | None) -> int:  # fmt: skip
    """Encode, lay out, seal and rename; returns how many samples were there already."""
    plan, count = encode.plan, encode.manifest.num_samples
    with _one_thread_each():
        forecast = _probe(encode)
        _check_disk(beton, forecast.num_bytes + head_size(count))
        with PartialBeton(beton, what, count, plan.page_size) as partial:
            resumed = partial.num_done
            if announce is not None:
                announce(forecast.announce(count - resumed, workers))
            _fill(partial, encode, workers, progress)
            done = partial.finish()
    facts = {**what, "size": done.size, "sha256": done.sha256, "num_kept": done.num_kept}
    # The seal goes first: a crash after it leaves the partial file and its journal, and the next run ends the work.
    write_atomically(beside(beton, CRC), done.crcs)
    write_atomically(beside(beton, SEAL), seal_text({**facts, "classes": list(encode.manifest.classes)}))
    os.replace(beside(beton, PARTIAL), beton)
    sync_folder(beton)
    return resumed


def write(
    manifest: Path,
    beton: Path,
    *,
    mode: Mode = "jpg",
    max_side: int | None = None,
    quality: int = 90,
    smart_threshold: int | None = None,
    proportion: float = 0.5,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> WriteReport:
    """Write the images of ``manifest`` into the sealed file ``beton``, or go on where an earlier run was stopped.

    ``max_side``: shrink to this longer side in pixels (area); ``workers=0`` encodes in this process; ``progress`` gets
    (samples done, samples), ``announce`` a line on size and time before the work. Raises UserError for a changed or
    missing source file, a beton or a begun one of other content, a disk that is or becomes too small (a rerun goes on), a
    second writer, a worker that died.
    """
    started = time.monotonic()
    options = _options(mode, max_side, quality, smart_threshold, proportion, seed)
    book = load_manifest(manifest)
    plan = _plan(book, options)
    what = {
        "image_set": book.image_set,
        "source_set": hashlib.sha256(book.source_sha256.tobytes()).hexdigest(),
        "num_samples": book.num_samples,
        "page_size": plan.page_size,
        "options": options,
        "versions": _versions(),
    }
    resumed = 0
    try:
        with locked(beton, "write"):
            complete = _complete(beton, what)
            if not complete:
                import_ffcv()
                encode = _Encoder(book, reopen(book.source_kind, book.root), plan, quality)
                resumed = _write(beton, what, encode, workers, progress, announce)
            beside(beton, JOURNAL).unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(beton, error) from error
    facts = load_seal(beton)
    sizes = facts["num_samples"], facts["num_kept"], resumed, facts["size"]
    return WriteReport(beton, *sizes, already_complete=complete, seconds=time.monotonic() - started)


def _cannot_write(beton: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{beton}: the disk is full; make room and run the same command again, it goes on from here")
    return UserError(f"{beton}: cannot be written: {error.strerror} ({error.filename or beton.parent})")
