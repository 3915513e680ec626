"""Write a manifest's images into a sealed beton: any number of workers and of kills gives the same bytes.

Workers encode and hand over bytes; this process lays them out in the manifest's order (``data_prep.journal``). Whether
a sample is stored as JPEG or as pixels is known beforehand: ``jpg`` and ``raw`` for all; ``smart``: JPEG where the
pixels take more than ``smart_threshold`` bytes; ``proportion``: JPEG for that share, by a hash of (seed, sample). Where
it is JPEG, a file's own bytes are kept if it is a baseline JPEG, RGB or gray, upright, not shrunk, and FFCV's decoder
takes it; else FFCV's encoder makes one of the upright RGB pixels. Encoded bytes depend on the libraries' versions, so these
stand in the journal and in the seal.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
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
    beside,
    head_size,
    page_size_for,
    sync_folder,
    write_atomically,
)
from data_prep.images import ImageError, Pixels, decode
from data_prep.journal import Encoded, PartialBeton, difference
from data_prep.scan import Manifest, Progress, load_manifest
from data_prep.sources import ImageFolder, Source
from data_prep.verify import check_seal, decodes, import_ffcv, load_seal, seal_text
from data_prep.workers import ordered_map
from pipeline.config import UserError
from pipeline.keys import hash_integers

Mode = Literal["jpg", "raw", "smart", "proportion"]

JPEG_BYTES_PER_PIXEL: Final = 0.5  # a photograph at quality 90; only for refusing a disk that is too small
LOCK: Final = ".lock"


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
    """What is known before an image is read: stored sizes in pixels and kinds, [N]; page size; expected bytes."""

    widths: npt.NDArray[np.int64]
    heights: npt.NDArray[np.int64]
    as_jpeg: npt.NDArray[np.bool_]
    keepable: npt.NDArray[np.bool_]
    page_size: int
    num_bytes: int


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
    expected = int(np.where(keepable, manifest.num_bytes, encoded).sum()) + head_size(len(bound))
    return _Plan(widths, heights, as_jpeg, keepable, page_size, expected)


@dataclass(frozen=True)
class _Encoder:
    """Makes a sample's stored form; called in the workers."""

    manifest: Manifest
    source: Source
    plan: _Plan
    quality: int

    def __call__(self, sample: int) -> Encoded:
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
            data = self.source.read(path)
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


@contextmanager
def _locked(beton: Path) -> Iterator[None]:
    """Hold the beton's lock. A POSIX lock: workers do not inherit it, so it goes with this process, however it ends."""
    path = beside(beton, LOCK)
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.stat().st_ino == os.fstat(file.fileno()).st_ino
        except (BlockingIOError, PermissionError, FileNotFoundError):
            held = False
        if not held:
            raise UserError(f"{beton}: another `patchmill prep write` is working on it")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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


def _check_disk(beton: Path, plan: _Plan) -> None:
    partial = beside(beton, PARTIAL)
    there = partial.stat().st_blocks * 512 if partial.exists() else 0
    free = shutil.disk_usage(beton.parent).free + there
    if free < plan.num_bytes:
        need, have = f"{plan.num_bytes / 2**30:.2f}", f"{free / 2**30:.2f}"
        raise UserError(f"{beton}: needs about {need} GiB and {beton.parent} has {have} GiB free; "
                        "make room, choose another disk, or set max_side")  # fmt: skip


def _fill(partial: PartialBeton, encode: _Encoder, workers: int, progress: Progress | None) -> None:
    import cv2

    count, threads = encode.manifest.num_samples, cv2.getNumThreads()
    cv2.setNumThreads(0)  # the workers are the parallelism, and a forked thread pool would hang
    try:
        with closing(ordered_map(encode, range(partial.num_done, count), workers)) as samples:
            for sample in samples:
                partial.add(sample)
                if progress is not None:
                    progress(partial.num_done, count)
    finally:
        cv2.setNumThreads(threads)


def _write(beton: Path, what: dict[str, Any], encode: _Encoder, workers: int, progress: Progress | None) -> int:
    """Encode, lay out, seal and rename; returns how many samples were there already."""
    plan, count = encode.plan, encode.manifest.num_samples
    with PartialBeton(beton, what, count, plan.page_size) as partial:
        resumed = partial.num_done
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
) -> WriteReport:
    """Write the images of ``manifest`` into the sealed file ``beton``, or go on where an earlier run was stopped.

    ``max_side``: shrink to this longer side in pixels (area); ``workers=0`` encodes in this process; ``progress`` gets
    (samples done, samples). Raises UserError for a changed or missing source file, a beton or a begun one of other
    content, a disk that is or becomes too small (a rerun goes on), a second writer, a worker that died.
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
        with _locked(beton):
            complete = _complete(beton, what)
            if not complete:
                _check_disk(beton, plan)
                import_ffcv()
                resumed = _write(beton, what, _Encoder(book, ImageFolder(book.root), plan, quality), workers, progress)
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
