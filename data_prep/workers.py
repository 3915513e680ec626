"""Forked worker processes whose death is noticed at once, in both directions; results come in the order of the items.

Each worker has a pipe of its own and alone holds the end that it writes to, so the parent reads end-of-file when it is
killed, even in the middle of a large result (a process pool waits for ever there). A worker dies with its parent.
"""

import ctypes
import multiprocessing
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, Final, NoReturn, TypeVar

from pipeline.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
AHEAD: Final = 3  # results that may wait for their turn, per worker
MAX_CHUNK: Final = 128  # entries: a row group of Hugging Face's image sets has 100
MAX_CHUNK_BYTES: Final = 2**23


class WorkerError(UserError):
    """A worker process was killed."""


def chunks(positions: Sequence[int], first: int, workers: int, sizes: Sequence[int] | None = None) -> list[range]:
    """Entries ``first`` to the last in runs, one a job: short enough to spread, and for memory (``sizes`` in bytes).

    What is read as a whole (``sources.Entry.position``) is not divided unless it is longer than a run may be.
    """
    count = len(positions)
    longest = min(MAX_CHUNK, max(1, (count - first) // (16 * max(1, workers))))
    runs, start, num_bytes, before = [], first, 0, 0
    for number in range(first, count):
        position, size = int(positions[number]), int(sizes[number]) if sizes is not None else 0
        elsewhere = position >> 32 != before >> 32 or position < before
        if number > start and (number - start == longest or num_bytes + size > MAX_CHUNK_BYTES or elsewhere):
            runs.append(range(start, number))
            start, num_bytes = number, 0
        num_bytes, before = num_bytes + size, position
    return [*runs, range(start, count)] if start < count else runs


def die_with(parent: int) -> None:
    """Let this process be killed when ``parent``, which started it, dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of all processes that descend from this one and lose theirs, so that this one can wait for them."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _work(function: Callable[[Item], Any], items: Sequence[Item], sender: Connection, parent: int) -> None:
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's remarks on metadata
    try:
        for item in items:
            sender.send((True, function(item)))
    except UserError as error:
        sender.send((False, error))
    except Exception:
        sender.send((False, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")))


def _start(
    function: Callable[[Item], Any], items: Sequence[Item], workers: int
) -> tuple[list[ForkProcess], list[Connection]]:
    context = multiprocessing.get_context("fork")
    processes, readers = [], []
    for index in range(workers):
        reader, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(function, items[index::workers], sender, os.getpid()), daemon=True
        )
        process.start()
        sender.close()  # before the next fork: the worker alone holds it
        processes.append(process)
        readers.append(reader)
    return processes, readers


def _died(process: ForkProcess) -> NoReturn:
    process.join(5)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    raise WorkerError(f"worker process {process.pid} {how}{hint}; run it again, perhaps with fewer workers")


def _collect(processes: list[ForkProcess], readers: list[Connection], total: int) -> Iterator[Any]:
    workers = len(readers)
    coming = list(range(workers))  # the item that each worker sends next
    waiting: dict[int, Any] = {}
    for turn in range(total):
        while turn not in waiting:
            open_ones = [readers[w] for w in range(workers) if coming[w] < min(total, turn + AHEAD * workers)]
            for reader in wait(open_ones):
                index = readers.index(reader)  # type: ignore[arg-type]
                try:
                    good, value = readers[index].recv()
                except (EOFError, OSError):
                    _died(processes[index])
                if not good:
                    raise value
                waiting[coming[index]] = value
                coming[index] += workers
        yield waiting.pop(turn)


def _results(processes: list[ForkProcess], readers: list[Connection], total: int) -> Generator[Any, None, None]:
    try:
        yield from _collect(processes, readers, total)
    finally:
        for process in processes:
            process.kill()
        for process, reader in zip(processes, readers, strict=True):
            process.join()
            reader.close()


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """``function`` of each item, in order, from processes forked by this call; ``workers=0`` computes in this process.

    Raises WorkerError when a worker dies, UserError as raised by ``function``, RuntimeError with the worker's traceback
    for anything else. Every worker has ended when the iterator has ended or is closed.
    """
    if workers == 0 or not items:
        return (function(item) for item in items)
    return _results(*_start(function, items, min(workers, len(items))), len(items))
