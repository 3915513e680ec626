"""What the benchmarks share: one thread, interleaved rounds, and no figure that the machine cannot vouch for.

Each contestant runs twice a round: the ratio of its two figures (A/A) says how far figures of this machine, now, can be
trusted; beyond 3 % none is reported. A figure is the fastest round's: what else a machine does only ever adds time.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from pipeline.config import RunFailed, UserError

TOLERANCE: Final = 0.03
MIN_ROUNDS: Final = 8

Contestant = Callable[[int], int]  # runs a round (such as an epoch), returns the number of images
Figures = dict[str, tuple[float, float]]
Progress = Callable[[int, int], None]
Clock = Callable[[], float]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch and OpenCV on one thread inside, as they were afterwards."""
    import cv2
    import torch

    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _check_rounds(rounds: int) -> None:
    if rounds < MIN_ROUNDS:
        raise UserError(
            f"rounds = {rounds}: should be at least {MIN_ROUNDS}, fewer do not tell a difference from noise"
        )


def interleave(
    contestants: Mapping[str, Contestant],
    rounds: int,
    progress: Progress | None = None,
    clock: Clock = time.process_time,
) -> Figures:
    """(CPU seconds per image, A/A ratio) of each contestant: the fastest of ``rounds``, after one that is not counted.

    ``progress`` gets (runs done, all runs). Another ``clock`` measures other seconds.
    """
    spent: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in contestants}
    done, total = 0, 2 * (rounds + 1) * len(contestants)
    for number in range(rounds + 1):
        for half in (0, 1):
            for name, contestant in contestants.items():
                start = clock()
                images = contestant(number)
                if number:
                    spent[name][half].append((clock() - start) / images)
                done += 1
                if progress is not None:
                    progress(done, total)
    return {name: (min(a + b), min(b) / min(a)) for name, (a, b) in spent.items()}


def _refuse_restless(figures: Figures) -> None:
    restless = {name: ratio for name, (_, ratio) in figures.items() if abs(ratio - 1) > TOLERANCE}
    if restless:
        found = ", ".join(f"{name} {ratio:.3f}" for name, ratio in restless.items())
        raise RunFailed(f"the machine is too restless for a figure: A/A of {found}, should be within {TOLERANCE:.0%} "
                        "of 1; run it again when nothing else runs")  # fmt: skip


def measure(
    build: Callable[[], Mapping[str, Contestant]],
    rounds: int,
    progress: Progress | None = None,
    clock: Clock = time.process_time,
) -> Figures:
    """``interleave`` what ``build`` makes, on one thread.

    Raises UserError for fewer than 8 rounds, RunFailed when any A/A ratio is more than 3 % off 1.
    """
    _check_rounds(rounds)
    with _one_thread():
        figures = interleave(build(), rounds, progress, clock)
    _refuse_restless(figures)
    return figures
