"""Sealed betons through FFCV's decoder and compiler, with boxes from ``pipeline.crops``.

FFCV's own iterator hangs on an error, hands out views of a ring of buffers, sizes those by the largest image times the
batch and draws its crops from generators that a restart cannot restore; here the compiled code draws nothing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from data_prep.verify import Seal, check_seal, import_ffcv
from pipeline.config import UserError
from pipeline.crops import Crops, Int32
from pipeline.data import Loader, UInt8, to_planes
from pipeline.keys import Int64

Decode = Callable[..., None]


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


def _build_decoder() -> Decode:
    """decode(table int64 [n, 5], file, boxes [n, 5], temp, out [n, S, S, 3], status [n]): no state and no draws.

    A row of the table: mode, height, width, offset and bytes in the file. ``temp`` has room for one decoded image;
    ``status`` receives libffcv's code for each sample, 0 for a good one.
    """
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.pipeline.compiler import Compiler

    jpg = IMAGE_MODES["jpg"]
    imdecode_c, resize_c = Compiler.compile(imdecode), Compiler.compile(resize_crop)

    def decode(table, file, boxes, temp, out, status):  # type: ignore[no-untyped-def]
        for k in range(len(table)):
            mode, height, width, start, size = table[k]
            top, left = boxes[k, 0], boxes[k, 1]
            bottom, right = top + boxes[k, 2], left + boxes[k, 3]
            data = file[start : start + size]
            if mode == jpg:
                image = temp[: height * width * 3].reshape(height, width, 3)
                status[k] = imdecode_c(data, image, height, width, height, width, 0, 0, 1, 1, False, False)
                resize_c(image, top, bottom, left, right, out[k])
            else:
                status[k] = 0
                resize_c(data.reshape(height, width, 3), top, bottom, left, right, out[k])

    return cast(Decode, Compiler.compile(decode))


def _table(seal: Seal) -> Int64:
    """(mode, height, width, offset, bytes) of every sample: int64 [N, 5]."""
    images, places = seal.rows["f0"], seal.table
    columns = images["mode"], images["height"], images["width"], places["ptr"], places["size"]
    return np.stack([column.astype(np.int64) for column in columns], 1)


class FFCVLoader(Loader):
    """A sealed beton written by ``patchmill prep write``; its seal is checked before anything is read."""

    def __init__(self, path: Path, crops: Crops, seed: int, threads: int, compiled: bool) -> None:
        """Check, map and prepare the decoder. Raises UserError for a beton that is missing, unsealed or broken."""
        seal = check_seal(path)
        with _compiler_settings(compiled):
            self._decode = _build_decoder()
        self._path = path
        self._table = _table(seal)
        heights, widths = self._table[:, 1], self._table[:, 2]
        self._largest = int((heights * widths).max()) * 3
        self._scratch = threading.local()
        # One mapping serves every thread, and the page cache every process of the host.
        self._file = np.asarray(np.memmap(path, np.uint8, "r"))
        labels = seal.labels.astype(np.int64)
        super().__init__(seal.image_set, (heights, widths), labels, len(seal.classes), crops, seed, threads)

    def decode(self, ids: Int64, boxes: Int32, out: UInt8) -> None:
        """As in ``Loader``; raises UserError for samples that do not decode."""
        size, scratch = self.crops.image_size, self._scratch
        if not hasattr(scratch, "temp"):
            scratch.temp = np.empty(self._largest, np.uint8)
        pixels = np.empty((len(ids), size, size, 3), np.uint8)
        status = np.empty(len(ids), np.int64)
        self._decode(self._table[ids], self._file, boxes, scratch.temp, pixels, status)
        bad = ids[status != 0]
        if bad.size:
            raise UserError(f"{self._path}: sample {', '.join(map(str, bad))} cannot be decoded; find all that is "
                            f"broken with: patchmill prep verify {self._path}")  # fmt: skip
        for image, flip, planes in zip(pixels, boxes[:, 4], out, strict=True):
            to_planes(image, flip, planes)
