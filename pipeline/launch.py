"""The processes of a run: how many there are, which one this is, how they meet, agree and start on one host.

They are started by torchrun, by srun, or by ``patchmill train --nproc N``; nothing else differs between the three.
"""

import atexit
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from data_prep.workers import die_with
from pipeline.config import Config, RankLost, UserError, flatten
from pipeline.eval_settings import FinetuneConfig

Value = TypeVar("Value")

PORTS: Final = range(20_000, 60_000)  # for srun: one by the job and step, so that jobs on one host do not meet
PARENT: Final = "PATCHMILL_PARENT"
joined = False  # whether this process has been one of several
GRACE_S: Final = 20.0  # for the others to notice that one has ended, and to say so
LOCAL: Final = (
    "run.dir",
    "data.train",
    "data.val",
    "data.threads",
    "data.stage_in",
    "engine.offload_dir",
)  # may differ between hosts


@dataclass(frozen=True)
class World:
    """``size`` processes, of which this is ``rank``; ``local_rank`` counts those on this host. A lone one is its own main.

    ``control``: a gloo group for what is agreed in between, beside the group that trains.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: "dist.ProcessGroup | None" = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this one writes the run folder."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This process, for people."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: Value) -> list[Value]:
        """Everybody's value, by rank; all must call it."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Value) -> Value:
        """The main process's value, on all of them."""
        return self.gather(value if self.is_main else None)[0]  # type: ignore[return-value]

    def explain(self, error: BaseException) -> BaseException:
        """What an error was: RankLost where the network says that another process does not answer, else ``error``."""
        text = " ".join(str(error).split())
        if self.size > 1 and isinstance(error, RuntimeError) and ("gloo" in text or isinstance(error, dist.DistError)):
            return RankLost(f"{self.name} has lost another rank, which ended or does not answer; see what that one said, "
                            f"and start the run again to go on ({text[:200]})")  # fmt: skip
        return error

    @contextmanager
    def together(self) -> Iterator[None]:
        """A mistake that one process finds in here ends all of them, instead of leaving the others to wait for it.

        Raises the UserError on the processes that found it, and SystemExit with its exit code, 2, on the others.
        """
        found: UserError | None = None
        try:
            yield
        except UserError as error:
            found = error
        everywhere = self.gather(None if found is None else str(found))
        if found is not None:
            first = everywhere.index(str(found))
            if first == self.rank:
                raise found
        if any(everywhere):
            raise SystemExit(2)


@dataclass(frozen=True)
class Portion:
    """What one rank does of a global batch: ``samples`` of it, in ``num_micro`` micro-batches of ``micro`` images."""

    samples: slice
    micro: int
    num_micro: int

    @classmethod
    def of(cls, cfg: Config, world: World) -> "Portion":
        """Raises UserError when the ranks and micro-batches do not divide the global batch."""
        batch = cfg.train.global_batch
        if batch % world.size:
            raise UserError(
                f"train.global_batch = {batch}: should be a multiple of the {world.size} processes of this run"
            )
        share = batch // world.size
        micro = share if cfg.train.micro_batch == "auto" else cfg.train.micro_batch
        if share % micro:
            raise UserError(f"train.micro_batch = {micro}: should divide {share}, the images of each of {world.size} processes "
                            f"in a batch of {batch}; take {math.gcd(share, micro)}")  # fmt: skip
        if isinstance(cfg.method, FinetuneConfig) and (cfg.method.mixup or cfg.method.cutmix) and micro % 2:
            raise UserError(
                f"train.micro_batch = {micro}: should be even: method.mixup and method.cutmix mix pairs of images"
            )
        return cls(slice(world.rank * share, (world.rank + 1) * share), micro, share // micro)


def _first_host(nodes: str) -> str:
    """The first of Slurm's short list, such as ``node[03-05,9],gpu1``."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST = {nodes!r}: names no host; set MASTER_ADDR and MASTER_PORT")
    return "".join(part or "" for part in match.groups())


def _slurm_place(env: Mapping[str, str]) -> dict[str, str]:
    step = int(env["SLURM_JOB_ID"]) * 64 + int(env["SLURM_STEP_ID"])
    return {
        "RANK": env["SLURM_PROCID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"], "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": _first_host(env["SLURM_STEP_NODELIST"]), "MASTER_PORT": str(PORTS[step % len(PORTS)]),
    }  # fmt: skip


def find_place(env: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from torchrun's or srun's variables; {} for a lone process.

    What is set goes before what srun would make of it. A batch script, which srun has not started, is a lone process.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = {name: env[name] for name in names if name in env}
    if "SLURM_STEP_ID" in env and "SLURM_STEP_NUM_TASKS" in env and "RANK" not in env:
        given = _slurm_place(env) | given
    if "RANK" not in given:
        return {}
    missing = [name for name in names if name not in given]
    if missing:
        raise UserError(
            f"RANK = {given['RANK']} is set and {', '.join(missing)} not; start with torchrun, srun or --nproc"
        )
    for name in names:
        if name != "MASTER_ADDR" and not given[name].isdecimal():
            raise UserError(f"{name} = {given[name]!r}: should be a whole number; start with torchrun, srun or --nproc")
    if int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        raise UserError(f"RANK = {given['RANK']}: should be less than WORLD_SIZE = {given['WORLD_SIZE']}")
    return given


def _meet(cfg: Config, place: Mapping[str, str]) -> "TCPStore":
    """The store over which the processes find each other; all have come, and with one configuration."""
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    host, port = place["MASTER_ADDR"], int(place["MASTER_PORT"])
    # torchrun and --nproc hold the store in the process that starts the others.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=cfg.engine.timeout_s)
    try:
        store = TCPStore(host, port, size, serves, timeout, wait_for_workers=False)
    except dist.DistNetworkError as error:
        raise UserError(f"MASTER_ADDR = {host}, MASTER_PORT = {port}: rank 0 cannot listen there, or is not there "
                        f"({str(error).splitlines()[0]}); set another MASTER_PORT") from None  # fmt: skip
    except dist.DistStoreError:
        raise UserError(f"MASTER_ADDR = {host}, MASTER_PORT = {port}: rank 0 has not come there within engine.timeout_s = "
                        f"{cfg.engine.timeout_s}") from None  # fmt: skip
    mine = {k: v for k, v in flatten(cfg.model_dump(mode="json")).items() if k not in LOCAL}
    store.set(f"came/{rank}", json.dumps({"host": socket.gethostname(), "settings": mine}))
    names = [f"came/{other}" for other in range(size)]
    try:
        store.wait(names, timeout)
    except dist.DistStoreError:
        missing = [other for other, name in enumerate(names) if not store.check([name])]
        raise UserError(f"of {size} processes rank {', '.join(map(str, missing))} did not come within engine.timeout_s = "
                        f"{cfg.engine.timeout_s} s; start as many as WORLD_SIZE says") from None  # fmt: skip
    arrived = [json.loads(store.get(name)) for name in names]
    store.set(f"read/{rank}", "")
    if (
        serves
    ):  # the store ends with this process, which may end on what it has read: not before the others have read it too
        with suppress(dist.DistStoreError):
            store.wait([f"read/{other}" for other in range(size)], min(timeout, timedelta(seconds=GRACE_S)))
    _require_same_settings(arrived)
    return store


def _require_same_settings(arrived: list[dict[str, Any]]) -> None:
    first = arrived[0]["settings"]
    for rank, other in enumerate(arrived):
        differing = [key for key, value in first.items() if other["settings"].get(key) != value]
        if differing:
            raise UserError(f"rank {rank} on {other['host']} has another configuration than rank 0 on {arrived[0]['host']}: "
                            + "; ".join(f"{k} = {other['settings'].get(k)!r} instead of {first[k]!r}" for k in differing)
                            + "; start all ranks with the same one")  # fmt: skip


def _device(place: Mapping[str, str]) -> torch.device:
    """The CUDA device of this process, by its number on the host, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # One that sees only its own device, as srun --gpus-per-task makes it, has device 0 whatever its number.
    torch.cuda.set_device(int(place.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def connect(cfg: Config, *, trains: bool = True) -> Iterator[tuple[World, torch.device]]:
    """The processes of this run, all come and of one configuration, and this one's device.

    Only what ``trains`` shares ``train.global_batch``.

    Raises UserError when they do not come, differ, or are not as many as ``engine`` and the batch can be shared by, and in
    place of what the network says of one that is lost later RankLost.
    """
    if PARENT in os.environ:
        die_with(int(os.environ[PARENT]))
    place = find_place(os.environ)
    size = int(place.get("WORLD_SIZE", 1))
    _require_engine(cfg, size, trains)
    device = _device(place)
    if not place or size == 1:
        yield World(), device
        return
    if cfg.engine.interface is not None:
        devices = [device for _, device in socket.if_nameindex()]
        if cfg.engine.interface not in devices:
            raise UserError(f"engine.interface = {cfg.engine.interface}: {socket.gethostname()} has no such network device, but "
                            + ", ".join(devices))  # fmt: skip
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ[name] = cfg.engine.interface
    if device.type == "cuda":
        # What each rank has told NCCL, written when a collective takes too long: read it with torchfrtrace.
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{cfg.run.dir}/ranks/nccl-")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, timeout = _meet(cfg, place), timedelta(seconds=cfg.engine.timeout_s)
    global joined
    joined = True
    world = World(int(place["RANK"]), size, int(place["LOCAL_RANK"]))
    # Of groups made without one, as torch's meshes and DeepSpeed make them: for half an hour they would wait for a lost rank.
    dist.distributed_c10d.default_pg_timeout = timeout
    try:
        dist.init_process_group(choose_backend(cfg, device), store=PrefixStore("train", store), rank=world.rank,
                                world_size=size, timeout=timeout)  # fmt: skip
        yield replace(world, control=dist.new_group(backend="gloo")), device
    except Exception as error:
        raise world.explain(error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code: object) -> NoReturn:
    """End this process with an exit code as ``sys.exit`` takes it, after what was registered for the exit.

    A thread of gloo's that lets go of a tensor while Python takes itself down is unwound, and that ends in SIGABRT.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def choose_backend(cfg: Config, device: torch.device) -> str:
    """torch's name of what tensors travel by: those of the CPU by gloo, those of ``device`` as ``engine.backend`` says."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,cuda:{'nccl' if cfg.engine.backend == 'auto' else cfg.engine.backend}"


def _require_engine(cfg: Config, size: int, trains: bool) -> None:
    if not torch.cuda.is_available():
        for key, value, cure in (("precision", "fp16", "bf16"), ("backend", "nccl", "auto")):
            if getattr(cfg.engine, key) == value:
                raise UserError(
                    f"engine.{key} = {value}: needs CUDA devices, and this host shows none; set engine.{key}={cure}"
                )
    if cfg.engine.name == "single" and size > 1:
        raise UserError(
            f"engine.name = single: {size} processes were started; set engine.name=ddp, fsdp2, hsdp or deepspeed"
        )
    shard = cfg.engine.shard_size
    if shard is not None and size % shard:
        raise UserError(f"engine.shard_size = {shard}: should divide the {size} processes of this run")
    if trains:
        Portion.of(cfg, World(size=size))


def start_local(cfg: Config, arguments: Sequence[str], count: int, *, trains: bool = True) -> int:
    """Run ``patchmill`` with these arguments in ``count`` processes on this host; their exit code.

    They get this one's signals and die with it. When one fails the others have some seconds to end by themselves.
    Raises UserError when ``engine`` or the batch cannot be shared by so many.
    """
    _require_engine(cfg, count, trains)
    # Held here, its port is free for certain and stays taken.
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", PARENT: str(os.getpid()),
    }  # fmt: skip
    # As torchrun does: as many processes as there are CPUs must not each start as many threads.
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    saved = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: Ctrl-C must not reach it twice.
            processes.append(subprocess.Popen([sys.executable, "-m", "pipeline", *arguments], start_new_session=True,
                                              env={**os.environ, **common, **own}))  # fmt: skip
        return _wait(processes)
    finally:
        for process in processes:
            process.kill()
        for number, handler in saved.items():
            signal.signal(number, handler)


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> int:
    """The exit code of the first that failed, 1 for one that was killed; 0 when none did."""
    first, since = 0, None
    while True:
        codes = [process.poll() for process in processes]
        failed = [(code, rank) for rank, code in enumerate(codes) if code]
        if failed and since is None:
            since = time.monotonic()
            # Of several at the same moment one that was killed is the cause, then one that knows more than that others are gone.
            code, rank = min(failed, key=lambda pair: (pair[0] > 0, -pair[0]))
            first = code if code > 0 else 1
            if code < 0:
                sys.stderr.write(f"patchmill: rank {rank} was killed by {signal.Signals(-code).name}\n")
        if None not in codes or (since is not None and time.monotonic() - since > GRACE_S):
            return first
        time.sleep(0.05)
