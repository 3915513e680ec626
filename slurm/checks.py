"""What is wrong with a job before Slurm is asked: a check gives lines of the plan, or raises UserError."""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pipeline.config import Config, ConfigError, UserError
from slurm.queue import ask

if TYPE_CHECKING:
    from pipeline.planner import Layout, Machine

LEAD_FLOOR_S: Final = 120  # Slurm looks at limits twice a minute, and its signal may come a minute early
# Options of sbatch that have a setting of their own, and those that a job could not come back without.
OWN: Final = {"nodes": "nodes", "ntasks_per_node": "tasks_per_node", "gpus_per_node": "gpus_per_node", "time": "time", "mem": "mem",
              "cpus_per_task": "cpus_per_task", "partition": "partition", "account": "account", "qos": "qos",
              "constraint": "constraint", "signal": "signal_lead_s"}  # fmt: skip
# What a job without Slurm does not use.
UNUSED: Final = ("partition", "account", "qos", "constraint", "mem", "time", "directives", "signal_lead_s")
KEPT: Final = ("array", "output", "error", "requeue", "no_requeue", "open_mode", "ntasks", "job_name")


def signal_lead(cfg: Config) -> int:
    """Seconds before the time limit at which the job is asked to save."""
    if cfg.slurm.signal_lead_s is not None:
        return cfg.slurm.signal_lead_s
    log, longest = Path(cfg.run.dir) / "log.jsonl", 0.0
    for line in log.read_text().splitlines() if log.exists() else []:
        with suppress(ValueError):  # the last one may be cut off
            record = json.loads(line)
            longest = max(longest, record.get("seconds", 0.0) if record["kind"] == "checkpoint" else 0.0)
    return LEAD_FLOOR_S + int(3 * longest)


def seconds(limit: str | int) -> int | None:
    """A time limit as sbatch reads it: minutes, [H:]M:S, D-H[:M[:S]]; None when it is none of these."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(limit))
    if found is None:
        return None
    parts = [int(part) for part in found.groups()[1:] if part is not None]
    if found[1] is None and len(parts) < 3:
        parts = [0, *parts]  # minutes, or minutes and seconds
    hours, minutes, rest = [*parts, 0, 0][:3]
    return int(found[1] or 0) * 86_400 + hours * 3600 + minutes * 60 + rest


def _sbatch_problems(cfg: Config) -> Iterator[str]:
    limit, lead = seconds(cfg.slurm.time), signal_lead(cfg)
    if limit is None:
        yield f"slurm.time = {cfg.slurm.time}: should be as sbatch has it, such as 1-00:00:00, 12:30:00 or 90 (minutes)"
    elif limit < 2 * lead:
        yield (f"slurm.time = {cfg.slurm.time}: should be twice slurm.signal_lead_s ({lead} s) at least, or the job would "
               "hardly train; raise it, or set slurm.signal_lead_s")  # fmt: skip
    for key in cfg.slurm.directives:
        name = key.replace("-", "_")
        if name in OWN:
            yield f"slurm.directives.{key}: set slurm.{OWN[name]}"
        elif name in KEPT:
            yield f"slurm.directives.{key}: is the job's own and cannot be set"
    if "%" in str(Path(cfg.run.dir).resolve()):
        yield f"run.dir = {cfg.run.dir}: has a %, which Slurm would replace; choose another folder"


def visible_gpus() -> list[str]:
    """The GPUs of this host that a process started here may use, as CUDA_VISIBLE_DEVICES names them."""
    code, said = ask("nvidia-smi", "-L")
    listed = [line for line in said.splitlines() if line.startswith("GPU ")] if code == 0 else []
    there = [str(number) for number, _ in enumerate(listed or Path("/dev").glob("nvidia[0-9]*"))]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return there
    # As CUDA reads it: up to the first that is not there.
    return list(takewhile(lambda name: name in there or name.startswith(("GPU-", "MIG-")), chosen.split(",")))


def _host_problems(cfg: Config) -> Iterator[str]:
    if cfg.slurm.nodes > 1:
        yield f"slurm.nodes = {cfg.slurm.nodes}: slurm.executor=local has this host only; set slurm.nodes=1"
    if cfg.slurm.gpus_per_node:
        found = visible_gpus()
        if len(found) < cfg.slurm.gpus_per_node:
            yield (f"slurm.gpus_per_node = {cfg.slurm.gpus_per_node}: this host shows {len(found)} (nvidia-smi -L, "
                   "CUDA_VISIBLE_DEVICES); set as many, or 0 for the CPU")  # fmt: skip


def job_problems(cfg: Config) -> Iterator[str]:
    """``slurm.*`` and the folder; what is not used without Slurm. Raises ConfigError."""
    run = Path(cfg.run.dir).resolve()
    above = next(folder for folder in [run, *run.parents] if folder.exists())
    problems = [] if above.is_dir() else [f"run.dir = {run}: {above} is a file; choose another folder"]
    problems += [*(_host_problems(cfg) if cfg.slurm.executor == "local" else _sbatch_problems(cfg))]
    for key in cfg.slurm.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", key):
            problems.append(f"slurm.environment.{key}: is no name of a variable")
    if problems:
        raise ConfigError(problems)
    default = type(cfg.slurm)()
    unused = [f"slurm.{key}" for key in UNUSED if getattr(cfg.slurm, key) != getattr(default, key)]
    if cfg.slurm.executor == "local" and unused:
        yield f"not used without Slurm: {', '.join(unused)}"


def configuration(cfg: Config, coming: Collection[str] = ()) -> list[str]:
    """What `patchmill check` says; of the images in ``coming``, train or val, nothing is asked."""
    from pipeline.check import check

    return check(cfg, coming).splitlines()[:-1]


def _processes(cfg: Config) -> Iterator[str]:
    world, batch, micro = cfg.slurm.world, cfg.train.global_batch, cfg.train.micro_batch
    if cfg.slurm.gpus_per_node and cfg.slurm.tasks_per_node != 1:
        raise UserError(f"slurm.tasks_per_node = {cfg.slurm.tasks_per_node}: is for jobs without GPUs, else each GPU has "
                        "one process; leave it out")  # fmt: skip
    if cfg.engine.name == "single" and world > 1:
        raise UserError(f"engine.name = single: the job has {world} processes (slurm.nodes, gpus_per_node, tasks_per_node); "
                        "set engine.name=ddp, fsdp2, hsdp or deepspeed")  # fmt: skip
    if cfg.engine.shard_size is not None and world % cfg.engine.shard_size:
        raise UserError(f"engine.shard_size = {cfg.engine.shard_size}: should divide the {world} processes of the job")
    if batch % world:
        raise UserError(f"train.global_batch = {batch}: should be a multiple of the job's {world} processes")
    if micro != "auto" and batch // world % micro:
        raise UserError(
            f"train.micro_batch = {micro}: should divide {batch // world}, the images of a process in a batch"
        )
    if cfg.engine.precision == "fp16" and not cfg.slurm.gpus_per_node:
        raise UserError("engine.precision = fp16: needs GPUs; set slurm.gpus_per_node, or engine.precision=bf16")
    yield from ()


def prediction(cfg: Config, **stated: float) -> "tuple[Machine, Layout, int]":
    """What the planner is asked of a job: its GPUs (with ``stated`` fields of a Machine), its engine, images of a micro-batch.

    Raises UserError for a ``slurm.gpu`` that is in no table, or none.
    """
    from pipeline.planner import Machine, configured, find_gpu

    machine = Machine(find_gpu(str(cfg.slurm.gpu)), cfg.slurm.world, cfg.slurm.tasks, **stated)
    engine = f"zero{cfg.engine.zero_stage}" if cfg.engine.name == "deepspeed" else cfg.engine.name
    micro = cfg.train.global_batch // cfg.slurm.world if cfg.train.micro_batch == "auto" else cfg.train.micro_batch
    return machine, configured(cfg, engine), micro  # type: ignore[arg-type]


def _memory(cfg: Config) -> Iterator[str]:
    """The planner's prediction for the GPU, where one is named."""
    from pipeline.planner import GIB, largest_batch

    if cfg.slurm.gpu is None:
        return
    machine, layout, micro = prediction(cfg)
    fits = largest_batch(cfg, machine, layout, accumulates=micro < cfg.train.global_batch // cfg.slurm.world)
    if fits < micro:
        raise UserError(f"train.micro_batch = {micro}: {fits} images are predicted to fit a {cfg.slurm.gpu} "
                        f"({machine.gpu.memory_gib:g} GiB) with engine.name={cfg.engine.name}; set train.micro_batch, "
                        "engine.checkpoint_layers=full or another "
                        "engine (patchmill estimate)")  # fmt: skip
    yield f"memory: micro-batches of {micro} images, {fits} are predicted to fit {machine.bytes / GIB:.0f} GiB of a {cfg.slurm.gpu}"


def checkpoint_bytes(cfg: Config) -> float:
    """What a run's checkpoints take at most: those that it keeps, and the one that it writes."""
    from pipeline.memory import state

    held = state(cfg)
    return (cfg.checkpoint.keep + 1) * (held.weights + held.moments + held.average)


def free_bytes(run: Path) -> int:
    """What is free where a run's folder is or will be."""
    return shutil.disk_usage(next(folder for folder in [run, *run.parents] if folder.exists())).free


def _room(cfg: Config) -> Iterator[str]:
    run = Path(cfg.run.dir).resolve()
    needed, free = checkpoint_bytes(cfg), free_bytes(run)
    if free < needed:
        raise UserError(f"run.dir = {run}: {cfg.checkpoint.keep} checkpoints and one more take {needed / 2**30:.2f} GiB, "
                        f"{free / 2**30:.2f} GiB are free; make room, or choose another folder")  # fmt: skip
    yield f"checkpoints: {needed / 2**30:.2f} GiB at most, {free / 2**30:.0f} GiB free"


def mlflow_uri(cfg: Config) -> str:
    """``tracking.uri`` in force, or none."""
    from pipeline.tracking import resolve_uri

    return resolve_uri(cfg.tracking.uri, Path(cfg.run.dir)) or "none"


def tracking_waits(cfg: Config) -> bool:
    """Whether `patchmill status` sends the run to MLflow: a file of MLflow's is not for the hosts of a cluster."""
    uri = mlflow_uri(cfg)
    return cfg.slurm.executor == "slurm" and uri != "none" and not uri.startswith("http")


def _tracking(cfg: Config) -> Iterator[str]:
    uri = mlflow_uri(cfg)
    if uri.startswith("sqlite:") and cfg.tracking.uri != "auto" and cfg.slurm.nodes > 1:
        raise UserError(f"tracking.uri = {uri}: a file is not for several hosts; set tracking.uri=auto "
                        "(patchmill status then sends what the job has logged) or the address of a server")  # fmt: skip
    if tracking_waits(cfg):
        yield f"tracking: the job logs to its folder; `patchmill status` sends it to {uri}"


CHECKS: Final[tuple[Callable[[Config], Iterable[str]], ...]] = (
    job_problems,
    _processes,
    _memory,
    _room,
    _tracking,
)
