"""Which sample is seen at (seed, epoch, position), and under which key: pure functions, no state, no torch.

An epoch visits a permutation of the samples that is a function of (seed, epoch) alone. Step t of an epoch
takes positions [tG, (t+1)G) of it, G being the global batch; the N mod G samples at its end are left out of
that epoch (others in the next), and no batch spans two epochs. The state of the data is therefore one
integer, the step, and resuming costs one permutation whatever the step.

The windowed order is for files larger than memory: an epoch shuffles the file's pages, cuts them into windows of K, and
shuffles the samples within a window, so that two windows of pages are in use at a time. It is a function of (seed, epoch),
the page of each sample and K. What that costs, for a file of ImageNet's size that is sorted by class (1,281,167 images of
110 KB, pages of 8 MiB, hence 76 images a page; windows of 512 MiB, 2 GiB and 8 GiB; the means of 300 batches):

| order | classes in a batch of 1024, 4096 | its pairs that share a page | mean distance moved | s, peak MB, kept MB |
|---|---|---|---|---|
| full | 641, 983 | 0.006 %, 0.006 % | 0.333 N | 0.18, 31, 10 |
| K = 64 | 75, 114 | 1.4 %, 1.1 % | 0.332 N | 0.11, 53, 21 |
| K = 256 | 231, 267 | 0.39 %, 0.36 % | 0.332 N | 0.13, 53, 21 |
| K = 1024 | 483, 656 | 0.10 %, 0.10 % | 0.332 N | 0.14, 53, 21 |

So take as many pages as memory allows; in a file that was written in mixed order K hardly matters.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.config import Config, UserError
from pipeline.keys import Int64, hash_integers, sample_key, stream


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole batches in an epoch: N // G. Raises ValueError when not even one fits."""
    if num_samples < global_batch:
        raise ValueError(f"{num_samples} samples do not fill one global batch of {global_batch}")
    return num_samples // global_batch


@dataclass(frozen=True)
class Plan:
    """The length of a run in steps, from its configuration and the number of samples."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, cfg: Config, num_samples: int) -> "Plan":
        """Raises UserError when the data do not fill one batch, or the warm-up is longer than the run."""
        try:
            per_epoch = steps_per_epoch(num_samples, cfg.train.global_batch)
        except ValueError as error:
            raise UserError(f"train.global_batch = {cfg.train.global_batch}: {error}; lower it") from None
        total = cfg.train.steps or per_epoch * (cfg.train.epochs or 0)
        warmup = cfg.optim.warmup_steps or per_epoch * (cfg.optim.warmup_epochs or 0)
        if warmup >= total:
            raise UserError(f"optim.warmup_epochs, optim.warmup_steps: {warmup} steps of warm-up in a run of {total} steps; "
                            "shorten it, or train longer")  # fmt: skip
        return cls(per_epoch, total, warmup)


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_samples: int) -> Int64:
    """The order of an epoch: int64 [N], the stable argsort of hashed positions. Read-only, because it is cached."""
    scores = stream(hash_integers(seed, epoch), "order", np.arange(num_samples))
    order = np.argsort(scores, kind="stable")
    order.setflags(write=False)
    return order


class WindowedEpoch(NamedTuple):
    """Samples in order, int64 [N]; pages in order, int64 [P]; the position where each window begins, int64 [W]."""

    ids: Int64
    pages: Int64
    starts: Int64


def _windowed_epoch(
    numbers: Int64, places: npt.NDArray[np.intp], num_pages: int, seed: int, epoch: int
) -> WindowedEpoch:
    """``numbers`` [P] are the different pages, ``places`` [N] says which of them holds each sample."""
    key = hash_integers(seed, epoch)
    page_order = np.argsort(stream(key, "page", numbers), kind="stable")
    window_of_page = np.empty_like(page_order)
    window_of_page[page_order] = np.arange(len(numbers)) // num_pages
    window_of_sample = window_of_page[places]
    counts = np.bincount(window_of_sample)
    # One sort by (window, hashed position): the window takes as many upper bits as it needs, at least one.
    bits = np.uint64(max(1, int(len(counts) - 1).bit_length()))
    scores = stream(key, "window", np.arange(len(places))).view(np.uint64) >> bits
    scores |= window_of_sample.astype(np.uint64) << (np.uint64(64) - bits)
    found = WindowedEpoch(np.argsort(scores, kind="stable"), numbers[page_order], np.cumsum(counts) - counts)
    for array in found:
        array.setflags(write=False)
    return found


@dataclass(frozen=True, eq=False)
class Windows:
    """The windowed order of a file: the page of each sample, int64 [N], and how many pages a window has.

    ``announce`` is given the numbers of the pages, int64 [n], of a window before it is read; see ``run_order``.
    """

    pages: Int64
    num_pages: int
    announce: Callable[[Int64], object] = lambda pages: None

    @cached_property
    def _epochs(self) -> Callable[[int, int], WindowedEpoch]:
        numbers, places = np.unique(self.pages, return_inverse=True)
        return lru_cache(maxsize=2)(partial(_windowed_epoch, numbers, places, self.num_pages))

    def epoch(self, seed: int, epoch: int) -> WindowedEpoch:
        """An epoch's order, cached and read-only: a pure function of the seed, the epoch and what the windows are made of."""
        return self._epochs(seed, epoch)

    def pages_of(self, seed: int, epoch: int, window: int) -> Int64:
        """The pages that a window of an epoch reads: int64 [<= K]."""
        return self.epoch(seed, epoch).pages[window * self.num_pages : (window + 1) * self.num_pages]


def epoch_order(seed: int, epoch: int, num_samples: int, windows: Windows | None = None) -> Int64:
    """The order of an epoch, full or windowed: int64 [N], read-only."""
    return epoch_permutation(seed, epoch, num_samples) if windows is None else windows.epoch(seed, epoch).ids


def batch_ids(
    seed: int, step: int, num_samples: int, global_batch: int, windows: Windows | None = None
) -> tuple[int, Int64]:
    """(epoch, sample ids int64 [G]) of a step counted from 0 over the whole run."""
    epoch, position = divmod(step, steps_per_epoch(num_samples, global_batch))
    start = position * global_batch
    return epoch, epoch_order(seed, epoch, num_samples, windows)[start : start + global_batch]


def sample_keys(seed: int, epoch: int, sample_ids: Int64) -> Int64:
    """The key of each sample in an epoch, int64 [B]; see ``pipeline.keys``."""
    return sample_key(seed, epoch, sample_ids)


def data_position(step: int, skipped_ranges: Sequence[tuple[int, int]] = ()) -> int:
    """The batch number that ``step`` reads when the batches of [a, b) in ``skipped_ranges`` are left out.

    The ranges are in batch numbers, sorted and disjoint; they are part of a checkpoint's state.
    """
    position = step
    for start, stop in skipped_ranges:
        if position >= start:
            position += stop - start
    return position


def leave_out(skipped_ranges: Sequence[tuple[int, int]], first_step: int, last_step: int) -> list[tuple[int, int]]:
    """``skipped_ranges`` with the batches that the steps [first_step, last_step) have read left out too."""
    new = data_position(first_step, skipped_ranges), data_position(last_step - 1, skipped_ranges) + 1
    merged: list[tuple[int, int]] = []
    for start, stop in sorted([*skipped_ranges, new]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def _upcoming(seed: int, step: int, global_batch: int, windows: Windows, last_epoch: int) -> list[tuple[int, int]]:
    """(epoch, window) of the windows that a step reads and of the one that is read after them."""
    per_epoch = steps_per_epoch(len(windows.pages), global_batch)
    epoch, position = divmod(step, per_epoch)
    starts = windows.epoch(seed, epoch).starts
    ends = np.array([position, position + 1]) * global_batch
    first, stop = int(np.searchsorted(starts, ends[0], "right")) - 1, int(np.searchsorted(starts, ends[1]))
    found = [(epoch, window) for window in range(first, stop)]
    if stop < len(starts) and starts[stop] < per_epoch * global_batch:  # else all of it is in the epoch's left-out tail
        found.append((epoch, stop))
    elif epoch < last_epoch:
        found.append((epoch + 1, 0))
    return found


def run_order(
    seed: int,
    first_step: int,
    last_step: int,
    num_samples: int,
    global_batch: int,
    skipped_ranges: Sequence[tuple[int, int]] = (),
    windows: Windows | None = None,
) -> Iterator[tuple[int, Int64]]:
    """(epoch, sample ids [G]) for each step of [first_step, last_step), in the full order or in that of ``windows``.

    While a window is read the pages of the next one are announced, once; at the first step also those of the window that
    it stands in.
    """
    last_epoch = data_position(last_step - 1, skipped_ranges) // steps_per_epoch(num_samples, global_batch)
    announced: list[tuple[int, int]] = []
    for step in range(first_step, last_step):
        position = data_position(step, skipped_ranges)
        if windows is not None:
            upcoming = _upcoming(seed, position, global_batch, windows, last_epoch)
            for epoch, window in upcoming:
                if (epoch, window) not in announced:
                    windows.announce(windows.pages_of(seed, epoch, window))
            announced = upcoming
        yield batch_ids(seed, position, num_samples, global_batch, windows)
