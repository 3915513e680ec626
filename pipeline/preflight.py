"""`patchmill check --in-job`: what only the processes of a job can find out, together, where they will train.

Every rank looks for itself and makes the same collectives in the same order; what it finds goes to all of them, and the
main one says every problem at once. Nothing of it stays in the run folder.
"""

import os
import platform
import secrets
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

from pipeline.check import check
from pipeline.config import Config, ConfigError, UserError
from pipeline.launch import World, connect, start_local
from pipeline.memory import state
from pipeline.metrics import device_name
from pipeline.zero_config import swap_folder
from pipeline.zero_memory import swap_bytes

MIB: Final = 2**20
GIB: Final = 2**30
STATES: Final = 3  # that should fit on the disk: the newest checkpoint, the one before, and one in the making
LOOK_S: Final = 10.0  # a network file system may show a new file late
CLOCK_S: Final = 5.0
SHARED: Final = 1000  # numbers of the sum that all ranks add to
NAMED: Final = 8  # ranks that a problem names; a job may have hundreds

Problem = tuple[int, str]  # rank, what is wrong there


@dataclass(frozen=True)
class Findings:
    """What one rank found. ``same``: what all ranks must have alike; ``bus``: bytes a second; ``clock``: seconds since 1970.

    ``free``: bytes by folder; ``swap``: bytes free for the files of ``engine.offload=nvme``.
    """

    host: str
    device: str
    same: dict[str, str]
    clock: float
    bus: float | None = None
    free: dict[str, int] = field(default_factory=dict)
    swap: int | None = None
    problems: list[str] = field(default_factory=list)


def share_of(rank: int, size: int) -> torch.Tensor:
    """What a rank adds to the sum, float32 [size + SHARED]: a number at its own place, and one to each place behind.

    The numbers are whole and small: float32 holds their sums exactly, in any order, for up to 24,000 ranks.
    """
    own = torch.zeros(size)
    own[rank] = rank % 97 + 1
    return torch.cat([own, (rank % 97 + 1) * (torch.arange(SHARED) % 7 + 1.0)])


def wrong_sum(found: torch.Tensor, size: int) -> str | None:
    """What is wrong with the sum of all ranks' shares, naming those whose part is; None when it is exact."""
    expected = torch.stack([share_of(rank, size) for rank in range(size)]).sum(0)
    if torch.equal(found, expected):
        return None
    lost = [rank for rank in range(size) if found[rank] != expected[rank]]
    if lost:
        return f"has not what {_names([f'rank {rank}' for rank in lost])} gave"
    wrong = found != expected
    place = int(wrong.nonzero()[0])
    return (
        f"has {int(wrong.sum())} of {len(found)} numbers wrong, such as {found[place]:g} instead of {expected[place]:g}"
    )


def _sums(world: World, device: torch.device) -> Iterator[str]:
    """All-reduce of known numbers, on the group that agrees and on the one that trains, where they are two."""
    groups = {"the gloo group": (world.control, torch.device("cpu"))}
    if device.type == "cuda":
        groups["the training group (NCCL)"] = (None, device)
    for name, (group, where) in groups.items():
        total = share_of(world.rank, world.size).to(where)
        dist.all_reduce(total, group=group)
        wrong = wrong_sum(total.cpu(), world.size)
        if wrong is not None:
            yield (f"all-reduce: the sum over {name} {wrong}; look at the network between the hosts, "
                   "engine.interface and NCCL_DEBUG=INFO")  # fmt: skip


def _bus(world: World, device: torch.device) -> float:
    """Bus bandwidth of an all-reduce on the group that trains, bytes a second: the best of three, after one to warm up."""
    tensor = torch.ones((64 if device.type == "cuda" else 16) * MIB // 4, device=device)
    best = float("inf")
    for attempt in range(4):
        world.gather(None)  # all begin together
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:
            best = min(best, time.perf_counter() - began)
    return 2 * (world.size - 1) / world.size * tensor.nbytes / best


def _try(work: Callable[[], object]) -> str | None:
    """Why the file system refuses, or None."""
    try:
        work()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None


def _sees(path: Path, text: str, until: float) -> bool:
    """Whether the file with this text is there, looked for until a time of the monotonic clock."""
    while True:
        try:
            os.listdir(path.parent)  # a network file system may remember that the file was not there
            if path.read_text() == text:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.05)


def _exchange(folder: Path, world: World) -> Iterator[str]:
    """Files of the main rank that all others read in their run folder, and files of theirs that the main one reads."""
    token = world.from_main(secrets.token_hex(16))
    mine, theirs = (folder / f".preflight-{token}-{rank}" for rank in (world.rank, 0))
    refused = _try(lambda: mine.write_text(token)) if world.is_main else None
    refusal = world.from_main(refused)
    try:
        if refusal is not None:
            if world.is_main:
                yield f"run.dir = {folder}: cannot be written ({refusal}); set it to another folder"
            return
        seen = _sees(theirs, token, time.monotonic() + LOOK_S)
        if not seen:
            yield (f"run.dir = {folder}: is not the folder of rank 0, whose file has not come up there within {LOOK_S:.0f} s; "
                   "set it to a folder that all hosts share")  # fmt: skip
        refused = _try(lambda: mine.write_text(token)) if seen and not world.is_main else None
        if refused is not None:
            yield f"run.dir = {folder}: cannot be written ({refused}); set it to a folder that all hosts may write"
        hosts = world.gather(socket.gethostname() if seen and refused is None else None)
        if world.is_main:
            until = time.monotonic() + LOOK_S
            for rank, host in enumerate(hosts):
                if host is not None and not _sees(folder / f".preflight-{token}-{rank}", token, until):
                    yield (f"run.dir = {folder}: a file of rank {rank} on {host} has not come up here within {LOOK_S:.0f} s; "
                           "set it to a folder that all hosts share")  # fmt: skip
        world.gather(None)  # before that nobody takes its file away
    finally:
        _try(mine.unlink)


def _folder_problems(cfg: Config, world: World) -> list[str]:
    """Whether the run folder is one for all; made for that by the main rank as training does, and taken away again."""
    folder, new, problems = Path(cfg.run.dir), list[Path](), list[str]()
    if world.is_main:
        new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        _try(lambda: folder.mkdir(parents=True, exist_ok=True, mode=0o700))  # writing there says what is wrong
    world.gather(None)
    problems += _exchange(folder, world)
    world.gather(None)
    for path in new:
        _try(path.rmdir)
    return problems


def _data_of(cfg: Config) -> dict[str, str]:
    """What names the images of each data file: all ranks must have the same."""
    names = {}
    for which, path in (("data.train", cfg.data.train), ("data.val", cfg.data.val)):
        if path is None or cfg.data.loader == "synthetic":
            continue
        if cfg.data.loader == "ffcv":
            from data_prep.verify import load_seal

            names[f"seal of {which}"] = load_seal(Path(path))["digest"][:16]
        else:
            from data_prep.manifest import load_header

            names[f"image set of {which}"] = str(load_header(Path(path))["image_set"])[:16]
    return names


def _environment(device: torch.device) -> dict[str, str]:
    facts = {"python": platform.python_version(), "torch": version("torch"), "patchmill": version("patchmill")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    return facts | {"kind of device": device.type}


def _above(folder: Path) -> Path:
    """A folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if os.path.exists(path))


def look(cfg: Config, world: World, device: torch.device) -> Findings:
    """What this rank finds; all must call it. Raises nothing that a check finds."""
    problems, same = list[str](), _environment(device)
    try:
        check(cfg)
        same |= _data_of(cfg)
    except ConfigError as error:
        problems += error.problems
    except (UserError, OSError) as error:
        problems.append(str(error))
    problems += _folder_problems(cfg, world)
    bus = None
    if world.size > 1:
        problems += _sums(world, device)
        bus = _bus(world, device)
    world.gather(None)
    clock = time.time()  # right after all have met
    folders = dict.fromkeys((_above(Path(cfg.run.dir)), Path(tempfile.gettempdir())))
    free = {str(path): shutil.disk_usage(path).free for path in folders}
    swap = shutil.disk_usage(_above(swap_folder(cfg))).free if cfg.engine.offload == "nvme" else None
    return Findings(socket.gethostname(), device_name(device), same, clock, bus, free, swap, problems)


def clock_offsets(clocks: Sequence[float]) -> list[float]:
    """Seconds that each clock is ahead of the median one."""
    middle = statistics.median(clocks)
    return [clock - middle for clock in clocks]


def wrong_clocks(clocks: Sequence[float]) -> Iterator[Problem]:
    """Clocks too far from the others': times of the log and of MLflow's points would be wrong."""
    for rank, offset in enumerate(clock_offsets(clocks)):
        if abs(offset) > CLOCK_S:
            yield rank, (f"clock: is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the median rank's, "
                         f"should be within {CLOCK_S:.0f} s; set it by NTP")  # fmt: skip


def differing(facts: Sequence[dict[str, str]]) -> Iterator[Problem]:
    """Ranks that have something else than most ranks; of equally many the first ones' counts."""
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        values = [of_rank.get(name) for of_rank in facts]
        usual = Counter(value for value in values if value is not None).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value is not None and value != usual:  # where it is missing, why is a problem of its own
                yield rank, f"{name}: {value} instead of {usual}, as most ranks have; make it the same on all hosts"


def low_disks(findings: Sequence[Findings], state_bytes: int) -> Iterator[Problem]:
    """Folders with less room than some checkpoints need: a warning, because files may lie elsewhere."""
    needed = STATES * state_bytes
    for rank, found in enumerate(findings):
        for folder, free in found.free.items():
            if free < needed:
                yield rank, (f"disk: {free / GIB:.2f} GiB free in {folder}, {STATES} times the state are {needed / GIB:.2f} GiB; "
                             "make room there, or lower checkpoint.keep")  # fmt: skip


def low_swap(findings: Sequence[Findings], needed: int) -> Iterator[Problem]:
    """Hosts with less room than the files of their ranks take, of ``needed`` bytes over all: training would refuse to start."""
    ranks = Counter(found.host for found in findings)
    for rank, found in enumerate(findings):
        files = needed * ranks[found.host] // len(findings)
        if found.swap is not None and found.swap < files:
            yield rank, (f"engine.offload_dir: {found.swap / GIB:.2f} GiB free, files of {ranks[found.host]} ranks here take "
                         f"{files / GIB:.2f} GiB; make room there, or set it to another folder")  # fmt: skip


def _names(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def lines_of(problems: Sequence[Problem], hosts: Sequence[str]) -> list[str]:
    """A line for each problem, naming the ranks that have it and their hosts."""
    ranks: dict[str, list[int]] = {}
    for rank, text in problems:
        ranks.setdefault(text, []).append(rank)
    lines = []
    for text, some in ranks.items():
        everyone = len(some) == len(hosts) > 1
        who = f"all {len(hosts)} ranks" if everyone else _names([f"rank {rank} on {hosts[rank]}" for rank in some])
        lines.append(f"{who}: {text}")
    return lines


def judge(findings: Sequence[Findings]) -> list[str]:
    """Every problem of all ranks, a line each."""
    problems = [(rank, text) for rank, found in enumerate(findings) for text in found.problems]
    problems += wrong_clocks([found.clock for found in findings])
    problems += differing([found.same for found in findings])
    return lines_of(problems, [found.host for found in findings])


def table(findings: Sequence[Findings]) -> str:
    """A line a rank: host, device, all-reduce bus bandwidth, free disk where the run goes, clock offset."""
    rows = [("rank", "host", "device", "all-reduce", "free disk", "clock")]
    offsets = clock_offsets([found.clock for found in findings])
    for rank, (found, offset) in enumerate(zip(findings, offsets, strict=True)):
        bus = "-" if found.bus is None else f"{found.bus / 1e9:.2f} GB/s"
        rows.append((str(rank), found.host, found.device, bus, f"{next(iter(found.free.values())) / GIB:.0f} GiB",
                     f"{1000 * offset:+.0f} ms"))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def preflight(cfg: Config) -> str | None:
    """Look at the job that this process is a rank of; the table, on the main rank, when all is in order.

    Raises ConfigError with every problem of all ranks on the main one and SystemExit with 2 on the others, UserError when
    the ranks do not come together, RankLost when one ends meanwhile.
    """
    with connect(cfg) as (world, device):
        findings = world.gather(look(cfg, world, device))
        with world.together():
            problems = judge(findings) if world.is_main else []
            if problems:
                raise ConfigError(problems)
        if not world.is_main:
            return None
        hosts = [found.host for found in findings]
        low = [*low_disks(findings, state(cfg).total), *low_swap(findings, swap_bytes(cfg))]
        return "\n".join([table(findings), *(f"warning: {line}" for line in lines_of(low, hosts)), "in order"])


def run(cfg: Config, settings: Sequence[str], nproc: int, say: Callable[[str], object]) -> int:
    """``check --in-job`` as this rank of a job, or in ``nproc`` local processes; its exit code. Raises as ``preflight``."""
    if nproc > 1:
        return start_local(cfg, ["check", "--in-job", *settings], nproc)
    found = preflight(cfg)
    if found is not None:
        say(found)
    return 0
