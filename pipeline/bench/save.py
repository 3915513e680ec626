"""How long training waits for a checkpoint: in the background, beside one that it waits for whole, and beside a plain copy.

The saver and ``checkpoint.save`` are the real ones, driven as the trainer does: start, compute, ``ready``, then the weights
change and training computes on until the save has ended. What computes is a stand-in of some milliseconds: it hides next to
nothing of the copy, so what is shown is the most that training waits; a real step, which is longer, hides more. Not counted
is what the background takes from training while it hashes and writes: on a CPU a core, beside a GPU none of the GPU's time.

The clock is the wall's, for training waits by it. A round measures each kind once; ratios are of the same round, their
median is what counts, and the smallest and the largest say how far to trust it. Each checkpoint is removed once measured.
"""

import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from pathlib import Path
from typing import Final

import psutil
import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.bench.interleaved import Progress
from pipeline.config import RunFailed, UserError
from pipeline.launch import World
from pipeline.metrics import device_name
from pipeline.saver import Saver

WIDTH: Final = 1024
# A block of ViT-L: its parameters' names and shapes.
BLOCK: Final = {
    "norm1.weight": (WIDTH,), "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH), "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,), "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (4 * WIDTH, WIDTH), "mlp.fc1.bias": (4 * WIDTH,),
    "mlp.fc2.weight": (WIDTH, 4 * WIDTH), "mlp.fc2.bias": (WIDTH,),
}  # fmt: skip
KINDS: Final = ("model", "ema", "exp_avg", "exp_avg_sq")  # as in Engine.state(); all fp32
COMPUTED: Final = 512  # side of the matrices that the stand-in multiplies
ROOM: Final = 1.05  # times the state: a file's headers, and what a file system keeps
SYNC: Final = "synchronous save"
FIRST: Final = "first asynchronous save"  # it makes the buffers
ASYNC: Final = "asynchronous save"
COPY: Final = "plain copy"
GOAL_TO_SYNC: Final = 0.10
GOAL_TO_COPY: Final = 2.0


@dataclass(frozen=True)
class Spread:
    """The median of the rounds, the smallest and the largest."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """That of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        """The median, and from where to where if not all are equal."""
        reach = "" if self.smallest == self.largest else f" ({self.smallest:.3f} to {self.largest:.3f})"
        return f"{self.median:.3f}{reach}"


@dataclass(frozen=True)
class Row:
    """A way to save: seconds until it has ended, seconds that training waited, and their ratio to the other two's.

    ``goal_to_sync`` and ``goal_to_copy``: what the medians of ``to_sync`` and ``to_copy`` should be at most; None where none
    is set.
    """

    name: str
    seconds: Spread
    stall_s: Spread
    to_sync: Spread
    to_copy: Spread
    goal_to_sync: float | None
    goal_to_copy: float | None

    def __str__(self) -> str:
        """One line of a table."""
        goals = ["" if goal is None else f" (goal <= {goal:g})" for goal in (self.goal_to_sync, self.goal_to_copy)]
        return (f"{self.name:<24}takes {self.seconds} s   training waits {self.stall_s} s   "
                f"to a {SYNC} {self.to_sync}{goals[0]}   to a {COPY} {self.to_copy}{goals[1]}")  # fmt: skip


@dataclass(frozen=True)
class Times:
    """What one save took: seconds until it had ended, and those that training waited."""

    seconds: float
    stall_s: float


def _shapes(numbers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Parameters of a ViT-L, block after block, the last one cut: together so many numbers."""
    for block in count():
        for name, shape in BLOCK.items():
            if numbers <= 0:
                return
            whole = prod(shape) <= numbers
            yield f"encoder.blocks.{block}.{name}", shape if whole else (numbers,)
            numbers -= prod(shape)


class Training:
    """A stand-in for an engine: a state named like a real one's, work of some milliseconds, and weights that change."""

    def __init__(self, gib: float, device: torch.device) -> None:
        """A state of ``gib`` GiB on ``device``."""
        parameters = list(_shapes(max(1, round(gib * 2**30) // (4 * len(KINDS)))))
        # Drawn, for pages that were never written would be read from one page that holds zeros.
        self._state = {
            f"{kind}.{name}": torch.rand(shape, device=device) for kind in KINDS for name, shape in parameters
        }
        self._state |= {f"step.{name}": torch.zeros((), device=device) for name, _ in parameters}
        self._matrix = torch.rand(COMPUTED, COMPUTED, device=device)

    def state(self) -> dict[str, Tensor]:
        """The tensors that are saved, from a dictionary of its own as an engine's."""
        return {name: tensor.detach() for name, tensor in self._state.items()}

    def compute(self) -> None:
        """Forward and backward: some milliseconds, at whose end the device is idle."""
        (self._matrix @ self._matrix).sum().item()

    def step(self) -> None:
        """The weights change."""
        torch._foreach_add_(list(self._state.values()), 1e-3)


class Copies:
    """Kept buffers in host memory for a plain copy of a state."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Room for ``state``; pinned where it is on a GPU, as the saver's."""
        self._cuda = any(tensor.is_cuda for tensor in state.values())
        self._buffers = [torch.empty_like(tensor, device="cpu", pin_memory=self._cuda) for tensor in state.values()]

    def copy(self, state: dict[str, Tensor]) -> None:
        """Copy it, and wait for it."""
        for buffer, tensor in zip(self._buffers, state.values(), strict=True):
            buffer.copy_(tensor, non_blocking=self._cuda)
        if self._cuda:
            torch.cuda.synchronize()


def save_sync(folder: Path, step: int, training: Training) -> Times:
    """Training waits for a whole save. Raises CheckpointError."""
    began = time.perf_counter()
    path = checkpoint.save(folder, step, training.state(), {})
    took = time.perf_counter() - began
    shutil.rmtree(path)
    return Times(took, took)


def save_async(saver: Saver, step: int, training: Training) -> Times:
    """Training waits until the save has begun, and before its weights change. Raises RunFailed when nothing was saved."""
    began = time.perf_counter()
    saver.wait()
    saver.start(step, training.state(), {})
    stall = time.perf_counter() - began
    training.compute()
    began = time.perf_counter()
    saver.ready()
    stall += time.perf_counter() - began
    training.step()
    while (saved := saver.outcome()) is None:
        training.compute()
    if saved.path is None:
        raise RunFailed(str(saved.reason))
    shutil.rmtree(saved.path)
    return Times(saved.seconds, stall)


def copy_plain(copies: Copies, training: Training) -> Times:
    """Training waits for a copy, which nobody writes."""
    began = time.perf_counter()
    copies.copy(training.state())
    took = time.perf_counter() - began
    return Times(took, took)


def _measure(folder: Path, training: Training, rounds: int, progress: Progress | None) -> dict[str, list[Times]]:
    """Times of each kind, a round each. In one before them everything is made that later ones find."""
    times: dict[str, list[Times]] = {SYNC: [], ASYNC: [], COPY: []}
    saver = Saver(folder, 1, World(), next(iter(training.state().values())).device)
    try:
        copies = Copies(training.state())
        for number in range(rounds + 1):
            for name, once in (
                (SYNC, partial(save_sync, folder, 2 * number, training)),
                (ASYNC, partial(save_async, saver, 2 * number + 1, training)),
                (COPY, partial(copy_plain, copies, training)),
            ):
                times[name].append(once())
                if progress is not None:
                    progress(sum(map(len, times.values())), len(times) * (rounds + 1))
    finally:
        saver.close()
    first = times[ASYNC][0]
    return {SYNC: times[SYNC][1:], FIRST: [first], ASYNC: times[ASYNC][1:], COPY: times[COPY][1:]}


def compare(times: dict[str, list[Times]]) -> list[Row]:
    """A row for each kind. Ratios are of the same round; the first asynchronous save, of none, is held against the medians."""
    stalls = {name: [each.stall_s for each in measured] for name, measured in times.items()}

    def ratio(name: str, base: str) -> Spread:
        bases = [statistics.median(stalls[base])] if name == FIRST else stalls[base]
        return Spread.of([ours / theirs for ours, theirs in zip(stalls[name], bases, strict=True)])

    rows = []
    for name, measured in times.items():
        goals = (GOAL_TO_SYNC, GOAL_TO_COPY) if name == ASYNC else (None, None)
        rows.append(Row(name, Spread.of([each.seconds for each in measured]), Spread.of(stalls[name]),
                        ratio(name, SYNC), ratio(name, COPY), *goals))  # fmt: skip
    return rows


def _check_room(folder: Path, gib: float) -> None:
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--folder {folder}: is no folder that can be written; name another one")
    free, needed = shutil.disk_usage(folder).free / 2**30, ROOM * gib
    if free < needed:
        raise UserError(f"--folder {folder}: a state of {gib:g} GiB needs {needed:.2f} GiB there and {free:.2f} GiB are free; "
                        "make room, name a folder on another disk, or a smaller --gib")  # fmt: skip


def device() -> torch.device:
    """Where the state lies: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def facts(folder: Path | None = None) -> dict[str, str]:
    """What the figures depend on beside the host: the device, torch's threads and the kind of file system."""
    where = Path(folder or tempfile.gettempdir()).resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    above = next((path for path in (where, *where.parents) if path in mounts), None)
    return {"device": device_name(device()), "torch_threads": str(torch.get_num_threads()),
            "filesystem": mounts[above] if above is not None else "unknown"}  # fmt: skip


def run(
    gib: float = 1.0, folder: Path | None = None, *, rounds: int = 8, progress: Progress | None = None
) -> list[Row]:
    """Measure saves of a state of ``gib`` GiB in a temporary folder inside ``folder`` (the system's when None).

    Host memory holds it about five times. Raises UserError for a folder that cannot be written or has too little room,
    RunFailed when a save fails.
    """
    where = folder or Path(tempfile.gettempdir())
    _check_room(where, gib)
    with tempfile.TemporaryDirectory(dir=where) as inside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # one process has no group
        try:
            return compare(_measure(Path(inside), Training(gib, device()), rounds, progress))
        except checkpoint.CheckpointError as error:
            raise RunFailed(str(error)) from error
