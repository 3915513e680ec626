"""Checkpoints in the background: training waits for a copy of the state in memory, not for the disk.

The copy's buffers are made once and kept, so a rank needs its part of the state twice in host memory; a state that is a copy
already is written as it is. A save that fails leaves the last good checkpoint and is reported; the next one is tried.
"""

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline import checkpoint
from pipeline.launch import World

LAG: Final = timedelta(minutes=30)  # a rank's disk may be so much slower than another's: training goes on meanwhile


@dataclass(frozen=True)
class Saved:
    """What became of a save: its path, or the reason why there is none; seconds in all, and those that training waited."""

    step: int
    path: Path | None
    reason: str | None
    seconds: float
    stall_s: float = 0.0


class Saver:
    """One save at a time; every rank makes the same calls of ``start`` and ``wait``."""

    def __init__(self, folder: Path, keep: int, world: World, device: torch.device) -> None:
        """``keep`` checkpoints stay in ``folder``. All ranks make it together: it has a group of its own."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # What is agreed on in the background must not meet what training agrees on.
        group = dist.new_group(backend="gloo", timeout=LAG) if world.size > 1 else None
        self._folder, self._keep, self._world = folder, keep, replace(world, control=group)
        self._device, cuda = device, device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=True,
                                                    use_non_blocking_copy=cuda))  # fmt: skip
        self._copy: Future[dict[str, Tensor]] | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Saved | BaseException | None = None
        self._stall = 0.0

    def start(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, copied: bool = False,
              began: float | None = None) -> None:  # fmt: skip
        """Begin to save; ``ready`` must be called before ``tensors`` change. The save before it must have been waited for.

        ``copied``: nobody will change them. ``began``: ``time.perf_counter()`` when training stopped for this, if not now.
        """
        began = time.perf_counter() if began is None else began
        if self._device.type == "cuda":
            # The copy runs on a stream of its own, which would overtake the steps that are still queued.
            torch.cuda.current_stream(self._device).synchronize()
        if copied:
            self._copy = Future()
            self._copy.set_result(tensors)
        else:
            self._copy = cast("Future[dict[str, Tensor]]", self._stager.stage(tensors))
        arguments = (self._copy, step, state, began)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()
        self._stall = time.perf_counter() - began

    def ready(self) -> None:
        """Wait until the copy is made."""
        if self._copy is not None:
            began = time.perf_counter()
            self._copy.exception()  # the thread that writes reports it
            self._stall += time.perf_counter() - began
            self._copy = None

    def _save(self, copy: "Future[dict[str, Tensor]]", step: int, state: dict[str, Any], began: float) -> None:
        path, reason = None, None
        try:
            path = checkpoint.save(self._folder, step, copy.result(), state, self._world)
            if self._world.is_main:
                checkpoint.retain(self._folder, self._keep)
        except checkpoint.CheckpointError as error:
            reason = str(error)
        except BaseException as error:  # raised where training asks for the outcome
            self._outcome = error
            return
        self._outcome = Saved(step, path, reason, time.perf_counter() - began)

    def outcome(self) -> Saved | None:
        """What became of the save, once: None while it goes on or when there was none. Raises what stopped the thread."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread.join()
        self._thread, outcome, self._outcome = None, self._outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        return replace(outcome, stall_s=self._stall) if outcome is not None else None

    def wait(self) -> Saved | None:
        """``outcome`` after the save has ended."""
        self.ready()
        if self._thread is not None:
            self._thread.join()
        return self.outcome()

    def close(self, patience_s: float = 10.0) -> None:
        """Give a save that goes on some time, and let go of the buffers."""
        if self._thread is not None:
            self._thread.join(patience_s)
        if self._thread is None or not self._thread.is_alive():
            self._stager.close()
