"""Images that need no files: for trying engines, and for tests."""

from typing import Final

import numpy as np
import numpy.typing as npt

from pipeline.crops import Crops, Int32
from pipeline.data import Loader, UInt8
from pipeline.keys import Int64, hash_integers

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
