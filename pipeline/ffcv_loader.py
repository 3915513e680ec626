"""Sealed betons through FFCV's decoder and compiler, with boxes from ``pipeline.crops``.

FFCV's own iterator hangs on an error, hands out views of a ring of buffers, sizes those by the largest image times the
batch and draws its crops from generators that a restart cannot restore; here the compiled code draws nothing.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, cast

import numpy as np

from data_prep.beton import JPG
from data_prep.verify import Seal, check_seal, import_ffcv
from pipeline.config import UserError
from pipeline.crops import Crops, Int32
from pipeline.data import Jit, Loader, UInt8, to_planes
from pipeline.keys import Int64
from pipeline.order import Windows
from pipeline.resample import bicubic

log = logging.getLogger("patchmill")

Decode = Callable[..., None]

# Linux cuts one call to the device's read-ahead limit, 128 KiB by default, and says nothing.
READ_AHEAD: Final = 128 * 1024


@contextmanager
def _compiler_settings(compiled: bool) -> Iterator[None]:
    """FFCV's compiler, a global, set to make serial code, compiled or plain Python, and put back."""
    import_ffcv()
    from ffcv.pipeline.compiler import Compiler

    saved = Compiler.is_enabled, Compiler.num_threads
    # Not by its set_num_threads, which would change torch's threads too.
    Compiler.is_enabled, Compiler.num_threads = compiled, 1
    try:
        yield
    finally:
        Compiler.is_enabled, Compiler.num_threads = saved


def _build_decoder(compiled: bool, resize: bool) -> Decode:
    """decode(table int64 [n, 6], data, boxes [n, 5], temp, out [n, S, S, 3], status [n]): no state and no draws.

    A row of the table: mode, height, width, offset and bytes in ``data``, and the eighths of its sides at which a JPEG
    is decoded; boxes are on that scale. ``temp`` has room for one decoded image and keeps the last one; ``status``
    receives libffcv's code for each sample, 0 for a good one. Without ``resize`` ``out`` is left alone.
    """
    with _compiler_settings(compiled):
        from ffcv.fields.rgb_image import IMAGE_MODES
        from ffcv.libffcv import imdecode, resize_crop
        from ffcv.pipeline.compiler import Compiler

        jpg = IMAGE_MODES["jpg"]
        imdecode_c, resize_c = Compiler.compile(imdecode), Compiler.compile(resize_crop)

        def decode(table, data, boxes, temp, out, status):  # type: ignore[no-untyped-def]
            for k in range(len(table)):
                mode, height, width, start, size, eighths = table[k]
                top, left = boxes[k, 0], boxes[k, 1]
                bottom, right = top + boxes[k, 2], left + boxes[k, 3]
                stored = data[start : start + size]
                status[k] = 0
                if mode == jpg:
                    rows, cols = (height * eighths + 7) // 8, (width * eighths + 7) // 8
                    image = temp[: rows * cols * 3].reshape(rows, cols, 3)
                    status[k] = imdecode_c(stored, image, height, width, height, width, 0, 0, eighths, 8, False, False)
                    if resize:
                        resize_c(image, top, bottom, left, right, out[k])
                elif resize:
                    resize_c(stored.reshape(height, width, 3), top, bottom, left, right, out[k])

        return cast(Decode, Compiler.compile(decode))


def _compile(decode: Decode) -> None:
    """Make numba compile ``decode`` for the arrays that it gets, by a call for no samples."""
    table, boxes = np.empty((0, 6), np.int64), np.empty((0, 5), np.int32)
    none = np.empty(0, np.uint8)
    decode(table, none, boxes, none, np.empty((0, 1, 1, 3), np.uint8), np.empty(0, np.int64))


def _compile_behind(loader: "weakref.ref[FFCVLoader]", decode: Decode) -> None:
    """Compile, and give the loader, if it is still wanted, the faster ``decode``: the same bits."""
    try:
        _compile(decode)
    except Exception as error:  # noqa: BLE001  whatever it is, the loader works without
        log.warning(
            "FFCV's decoder cannot be compiled and goes on without, slower: %s: %s", type(error).__name__, error
        )
        return
    wanted = loader()
    if wanted is not None:
        wanted._decode = decode


def _table(seal: Seal) -> Int64:
    """(mode, height, width, offset, bytes) of every sample: int64 [N, 5]. Raises UserError for pixels of another size."""
    images, places = seal.rows["f0"], seal.table
    columns = images["mode"], images["height"], images["width"], places["ptr"], places["size"]
    table = np.stack([column.astype(np.int64) for column in columns], 1)
    mode, height, width, _, size = table.T
    wrong = np.flatnonzero((mode != JPG) & (size != height * width * 3))
    if wrong.size:
        raise UserError(f"{seal.beton}: sample {wrong[0]}: its bytes are not width x height x 3; find all that is broken with: "
                        f"patchmill prep verify {seal.beton}")  # fmt: skip
    return table


class FFCVLoader(Loader):
    """A sealed beton written by ``patchmill prep write``; its seal is checked before anything is read."""

    def __init__(self, path: Path, crops: Crops, seed: int, threads: int, jit: Jit) -> None:
        """Check, open and prepare the decoder. Raises UserError for a beton that is missing, unsealed or broken.

        ``jit``: on compiles here and now, off never; auto starts without and changes over when a thread has compiled.
        """
        seal = check_seal(path)
        self._path = path
        self._table, self._page_size = _table(seal), seal.page_size
        heights, widths = self._table[:, 1], self._table[:, 2]
        self._largest = int((heights * widths).max()) * 3
        self._scratch = threading.local()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the loader
        labels = seal.labels.astype(np.int64)
        super().__init__(seal.image_set, (heights, widths), labels, len(seal.classes), crops, seed, threads)
        self._decode = _build_decoder(compiled=jit == "on", resize=crops.resample == "area")
        if jit == "on":
            _compile(self._decode)
        elif jit == "auto":
            compiled = _build_decoder(compiled=True, resize=crops.resample == "area")
            args = (weakref.ref(self), compiled)
            threading.Thread(target=_compile_behind, args=args, daemon=True, name="patchmill-compile").start()

    def windows(self, num_pages: int) -> Windows:
        """As in ``Loader``; the pages of the next window are read ahead of it, on a thread that nothing waits for."""
        pool = ThreadPoolExecutor(1, "patchmill-ahead")  # its thread ends when nobody holds the windows any more
        return Windows(self._table[:, 3] // self._page_size, num_pages, partial(pool.submit, self._read_ahead))

    def _read_ahead(self, pages: Int64) -> None:
        """Ask the kernel to read whole pages into its cache, in the order of the file."""
        # It is advice: a file system that takes none is read as without it.
        with suppress(OSError):
            for page in np.sort(pages).tolist():
                for start in range(page * self._page_size, (page + 1) * self._page_size, READ_AHEAD):
                    os.posix_fadvise(self._file.fileno(), start, READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """As in ``Loader``; raises UserError for samples that do not decode, or that the file no longer holds."""
        size, scratch = self.crops.image_size, self._scratch
        if not hasattr(scratch, "temp"):
            scratch.temp, scratch.data = np.empty(self._largest, np.uint8), np.empty(0, np.uint8)
        table, boxes = self._on_scale(ids, boxes)
        data = self._read(ids, table)
        pixels = np.empty((len(ids), size, size, 3), np.uint8)
        status = np.empty(len(ids), np.int64)
        if self.crops.resample == "area":
            self._decode(table, data, boxes, scratch.temp, pixels, status)
        else:
            for k in range(len(ids)):
                one = slice(k, k + 1)
                self._decode(table[one], data, boxes[one], scratch.temp, pixels[one], status[one])
                pixels[k] = bicubic(_image(table[k], data, scratch.temp), boxes[k, :4].tolist(), size)
        bad = ids[status != 0]
        if bad.size:
            raise UserError(f"{self._path}: sample {', '.join(map(str, bad))} cannot be decoded; find all that is "
                            f"broken with: patchmill prep verify {self._path}")  # fmt: skip
        for image, flip, planes in zip(pixels, boxes[:, 4], out, strict=True):
            to_planes(image, flip, planes)

    def _read(self, ids: Int64, table: Int64) -> UInt8:
        """The stored bytes of samples ``ids``, one behind another; their offsets in ``table`` become those there.

        Raises UserError for what the file does not hold. A mapping of it would save a copy, but one that cannot be
        read, of a file that was cut or of a file system that is gone, kills the process without a word.
        """
        self._require(ids, table)
        scratch, total = self._scratch, int(table[:, 4].sum())
        if scratch.data.size < total:
            scratch.data = np.empty(total, np.uint8)
        offset = 0
        for sample_id, row in zip(ids.tolist(), table, strict=True):
            start, rest = int(row[3]), memoryview(scratch.data[offset : offset + row[4]])
            row[3], offset = offset, offset + len(rest)
            while rest:
                try:
                    count = os.preadv(self._file.fileno(), [rest], start)
                except OSError as error:
                    raise UserError(f"{self._path}: sample {sample_id} cannot be read: {error.strerror}") from error
                if not count:
                    self._require(ids, self._table[ids])
                start, rest = start + count, rest[count:]
        return scratch.data

    def _require(self, ids: Int64, table: Int64) -> None:
        """Raise UserError where ``table``, with the offsets of the file, has samples behind its end."""
        length = os.fstat(self._file.fileno()).st_size
        gone = ids[table[:, 3] + table[:, 4] > length]
        if gone.size:
            raise UserError(f"{self._path}: sample {', '.join(map(str, gone))} is gone: the file was cut to {length} bytes "
                            "while it was read; copy or write it again")  # fmt: skip

    def _on_scale(self, ids: Int64, boxes: Int32) -> tuple[Int64, Int32]:
        """The decoder's table [n, 6], with the offsets of the file, and boxes [n, 5]."""
        table = self._table[ids]
        eighths, on_scale = self.crops.on_scale(boxes)
        is_jpeg = table[:, :1] == JPG
        eighths = np.where(is_jpeg, eighths[:, None], 8)
        return np.concatenate([table, eighths], 1), np.where(is_jpeg, on_scale, boxes)


def _image(row: Int64, data: UInt8, temp: UInt8) -> UInt8:
    """The image that ``decode`` has just unpacked, uint8 [rows, cols, 3]: in ``temp``, or as it is stored."""
    mode, height, width, start, size, eighths = row.tolist()
    rows, cols = -(-height * eighths // 8), -(-width * eighths // 8)
    pixels = temp[: rows * cols * 3] if mode == JPG else data[start : start + size]
    return pixels.reshape(rows, cols, 3)
