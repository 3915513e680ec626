"""What keeps a run safe: a signal becomes a flag that is read at a step's end, steps that are not finite are counted, a
process that hangs is named, and one that is slow.
"""  # noqa: D205

import contextlib
import faulthandler
import json
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
import torch.distributed as dist

from pipeline.launch import World

log = logging.getLogger("patchmill")


class NonFinite(Exception):  # noqa: N818  it says what happened
    """The steps ``first`` to ``last`` had a loss or gradient that is not finite, too many in a row."""

    def __init__(self, first: int, last: int) -> None:
        """Steps count from 1."""
        self.first, self.last = first, last
        super().__init__(f"the gradient was not finite in {last - first + 1} steps in a row, {first} to {last}")


class NonFiniteGuard:
    """Counts skipped steps in a row on the host, from values that are read at log steps only."""

    def __init__(self, limit: int, streak: int = 0) -> None:
        """``limit`` in a row are too many; ``streak`` comes from a checkpoint."""
        self.limit, self.streak = limit, streak

    def observe(self, verdicts: Sequence[tuple[int, bool]]) -> None:
        """Take (step, skipped) of the steps since the last call. Raises NonFinite for ``limit`` or more skipped in a row."""
        last = None
        for step, skipped in verdicts:
            if last is not None and not skipped:
                break
            self.streak = self.streak + 1 if skipped else 0
            if self.streak >= self.limit:
                last = step
        if last is not None:
            raise NonFinite(last - self.streak + 1, last)


class Agreement:
    """Whether any rank wants to stop: asked at every step by all, answered one step late, so that nobody waits."""

    def __init__(self, world: World) -> None:
        """Makes a group of its own: the messages of a step must not meet those of a save."""
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, wanted: bool) -> bool:
        """Ask; the answer of the question before, alone at once."""
        if self._group is None:
            return wanted
        answer = False
        if self._asked is not None:
            told, work = self._asked
            work.wait()
            answer = bool(told.item())
        told = torch.tensor([int(wanted)])
        self._asked = told, dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer


# In the order of a step: of two ranks in the same step, the one in the earlier phase keeps the other waiting.
PHASES: Final = (
    "start",
    "data",
    "compute",
    "profile",
    "log",
    "held-out loss",
    "accuracy",
    "online signals",
    "save",
    "figure",
    "end",
)
LONG: Final = (
    "start",
    "profile",
    "held-out loss",
    "accuracy",
    "online signals",
    "save",
    "figure",
    "end",
)  # may take as long as ranks wait for each other
WARM_UP: Final = 3  # first steps compile, make connections, fill caches
LOOKS: Final = 4  # beats in which a rank that lives has written, and a network's folder shows it: half of hang_s


class Heartbeat:
    """Where this process is, said by a thread in ``ranks/rank-00000.json`` of the run folder; a context manager.

    When nothing moves for too long each process that still answers writes its stacks there and ends with exit code 1, and
    one says which rank hangs, where. It takes no network: a network that hangs is what it is for.
    """

    def __init__(
        self, folder: Path, world: World, hang_s: float, slow_s: float, on_hang: Callable[[str], object]
    ) -> None:
        """``hang_s`` without progress are too long, ``slow_s`` in the first steps and in phases that take long.

        ``on_hang`` gets the verdict, in the process that says it.
        """
        self._folder, self._world, self._on_hang = folder / "ranks", world, on_hang
        self._hang_s, self._slow_s = min(hang_s, slow_s), slow_s
        self._tick = self._hang_s / (2 * LOOKS)
        self._at, self._beats, self._first = ("start", 0, time.monotonic()), 0, None
        self._done, self._writes = threading.Event(), True
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        """Starts the thread."""
        self._folder.mkdir(exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread."""
        self._done.set()
        self._thread.join()
        self._write()

    def beat(self, phase: str, step: int) -> None:
        """This process enters a phase of a step. What follows ``start`` is slow as the first steps are."""
        self._first = None if phase == "start" else step if self._first is None else self._first
        self._at = phase, step, time.monotonic()

    def _path(self, rank: int, kind: str) -> Path:
        return self._folder / f"rank-{rank:05d}.{kind}"

    def _write(self, *, ended: bool = False, said: bool = False) -> None:
        self._beats += 1
        phase, step, since = self._at
        record = {"rank": self._world.rank, "host": socket.gethostname(), "pid": os.getpid(), "phase": phase, "step": step,
                  "for_s": round(time.monotonic() - since, 1), "beats": self._beats, "ended": ended, "said": said}  # fmt: skip
        temporary = self._path(self._world.rank, "partial")
        try:
            temporary.write_text(json.dumps(record) + "\n")
            os.replace(temporary, self._path(self._world.rank, "json"))
            self._writes = True
        except OSError:
            self._writes = False  # a full disk is no hang

    def _run(self) -> None:
        self._write()
        while not self._done.wait(self._tick):
            self._write()
            phase, step, since = self._at
            stalled, warm = time.monotonic() - since, self._first is not None and step >= self._first + WARM_UP
            if stalled > self._hang_s:
                self._end(patient=stalled <= self._slow_s and (phase in LONG or not warm))

    def _read(self) -> list[dict[str, Any]]:
        records = []
        for rank in range(self._world.size):
            try:
                records.append(json.loads(self._path(rank, "json").read_text()))
            except (OSError, ValueError):
                records.append({"rank": rank, "host": "an unknown host", "phase": "start", "step": 0, "beats": 0})
        return records

    def _end(self, *, patient: bool) -> None:
        """Look again for some time: another rank that does not answer is the end at once, else only if not ``patient``."""
        before, since = self._read(), self._at[2]
        for _ in range(LOOKS):
            if self._done.wait(self._tick):
                return
            self._write()  # the others must see that this one lives
        now = self._read()
        if self._done.is_set() or self._at[2] != since:
            return  # it was slow, no more
        # One that has ended by its own verdict is silent too, and is not what kept the others waiting.
        ended = {record["rank"] for record in now if record.get("ended")}
        lost = [
            b["rank"] for a, b in zip(before, now, strict=True) if a["beats"] == b["beats"] and b["rank"] not in ended
        ]
        if not self._writes:
            lost = []  # the others cannot write either, and this one's own beats stand still too
        if patient and not lost:
            return
        try:
            self._say(now, lost, ended, time.monotonic() - since)
        finally:
            os._exit(1)  # the main thread may never come back

    def _say(self, now: list[dict[str, Any]], lost: list[int], ended: set[int], waited_s: float) -> None:
        """Write the stacks and, in one process, the verdict."""
        with contextlib.suppress(OSError), self._path(self._world.rank, "stacks.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        here = {record["rank"] for record in now} - {*lost} - ended
        speaks = self._world.rank == min(here, default=self._world.rank) and not any(
            record.get("said") for record in now
        )
        if speaks:
            reason = verdict(now, lost, waited_s)
            log.error("%s; stacks: %s", reason, self._folder)
            self._on_hang(reason)
        self._write(ended=True, said=speaks)


def verdict(records: Sequence[dict[str, Any]], lost: Sequence[int], waited_s: float) -> str:
    """Which rank keeps the others waiting: one of ``lost``, which do not answer, or the one that is behind."""
    place = lambda record: (record["step"], PHASES.index(record["phase"]))  # noqa: E731
    behind = min(map(place, records))
    guilty = [record for record in records if (record["rank"] in lost if lost else place(record) == behind)]
    names = ", ".join(f"rank {record['rank']} on {record['host']}" for record in guilty)
    what = "does not answer (stopped, or its host is gone)" if lost else "hangs"
    where = f"in phase {guilty[0]['phase']} of step {guilty[0]['step'] + 1}"
    if len(guilty) == len(records) > 1:
        return f"all ranks hang {where}, none is behind: no progress for {waited_s:.0f} s"
    return f"{names} {what} {where}: no progress for {waited_s:.0f} s"


class Stragglers:
    """Says which rank is slower than the others, from what each measures alone: in a collective all look equally slow."""

    SLOW: Final = 1.5  # times the median
    WAITING: Final = 0.2  # share of the time above the median
    PATIENCE: Final = 3  # intervals in a row

    def __init__(self, world: World, device: torch.device) -> None:
        """All ranks make it and call ``observe`` together."""
        self._world, self._factor = world, torch.rand(256, 256, device=device)
        self._streaks = dict[tuple[int, str], int]()

    def _probe(self) -> float:
        """Seconds of a fixed piece of work on this rank's device, the best of three."""
        seconds = []
        for _ in range(3):
            began, product = time.perf_counter(), self._factor
            for _ in range(4):
                product = product @ self._factor
            product[0, 0].item()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def observe(self, data_wait: float) -> list[str]:
        """Take an interval's share of waiting for data; returns a line on each rank that was slow three times in a row."""
        if self._world.size == 1:
            return []
        rows = self._world.gather((socket.gethostname(), self._probe(), data_wait))
        return list(self._judge(rows))

    def _judge(self, rows: Sequence[tuple[str, float, float]]) -> Iterator[str]:
        speed, wait = (statistics.median(column) for column in list(zip(*rows, strict=True))[1:])
        for rank, (host, seconds, waited) in enumerate(rows):
            found = {
                "work": (seconds > self.SLOW * speed, f"computes {seconds / speed:.1f} times slower than the median rank"),
                "data": (waited > wait + self.WAITING,
                         f"waits for data {waited:.0%} of the time, the median rank {wait:.0%}"),
            }  # fmt: skip
            for kind, (slow, text) in found.items():
                streak = self._streaks[rank, kind] = self._streaks.get((rank, kind), 0) + 1 if slow else 0
                if streak and streak % self.PATIENCE == 0:
                    yield f"rank {rank} on {host} {text}, in {streak} log intervals in a row"
