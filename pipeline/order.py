"""Which sample is seen at (seed, epoch, position), and under which key: pure functions, no state, no torch.

An epoch visits a permutation of the samples that is a function of (seed, epoch) alone. Step t of an epoch
takes positions [tG, (t+1)G) of it, G being the global batch; the N mod G samples at its end are left out of
that epoch (others in the next), and no batch spans two epochs. The state of the data is therefore one
integer, the step, and resuming costs one permutation whatever the step.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from pipeline.keys import Int64, hash_integers, sample_key, stream


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole batches in an epoch: N // G. Raises ValueError when not even one fits."""
    if num_samples < global_batch:
        raise ValueError(f"{num_samples} samples do not fill one global batch of {global_batch}")
    return num_samples // global_batch


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, num_samples: int) -> Int64:
    """The order of an epoch: int64 [N], the stable argsort of hashed positions. Read-only, because it is cached."""
    scores = stream(hash_integers(seed, epoch), "order", np.arange(num_samples))
    order = np.argsort(scores, kind="stable")
    order.setflags(write=False)
    return order


def batch_ids(seed: int, step: int, num_samples: int, global_batch: int) -> tuple[int, Int64]:
    """(epoch, sample ids int64 [G]) of a step counted from 0 over the whole run."""
    epoch, position = divmod(step, steps_per_epoch(num_samples, global_batch))
    start = position * global_batch
    return epoch, epoch_permutation(seed, epoch, num_samples)[start : start + global_batch]


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


def run_order(
    seed: int,
    first_step: int,
    last_step: int,
    num_samples: int,
    global_batch: int,
    skipped_ranges: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[int, Int64]]:
    """(epoch, sample ids [G]) for each step of [first_step, last_step)."""
    for step in range(first_step, last_step):
        yield batch_ids(seed, data_position(step, skipped_ranges), num_samples, global_batch)
