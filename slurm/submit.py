"""``patchmill submit``: everything that can be known is checked, then the run is one job that comes back until it is done."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.config import CONFIG_DIR, Config, ConfigError, UserError
from slurm.job import CANCELLED, CONFIG, read_json

FOLDER: Final = "slurm"  # of a run: what the job needs and leaves
JOB: Final = "slurm/job.json"
LEAD_FLOOR_S: Final = 120  # Slurm looks at limits twice a minute, and its signal may come a minute early
LIVE: Final = (
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "COMPLETING",
    "CONFIGURING",
    "REQUEUED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
)


@dataclass(frozen=True)
class Plan:
    """A job before it is queued: its batch script, submitit's parameters for it, and what is to be said."""

    run: Path
    parameters: dict[str, Any]
    script: str
    lines: list[str]
    code: Path | None

    def __str__(self) -> str:
        """The script and the plan."""
        return "\n".join([self.script.rstrip(), "", *self.lines])


def signal_lead(cfg: Config) -> int:
    """Seconds before the time limit at which the job is asked to save."""
    if cfg.slurm.signal_lead_s is not None:
        return cfg.slurm.signal_lead_s
    log = Path(cfg.run.dir) / "log.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text().splitlines() if '"checkpoint"' in line] if log.exists() else []
    )
    longest = max((line.get("seconds", 0.0) for line in lines), default=0.0)
    return LEAD_FLOOR_S + int(3 * longest)


def source_tree() -> Path | None:
    """The git tree that this code runs from; None when it is installed without one."""
    root = CONFIG_DIR.parent
    return root if (root / ".git").exists() and shutil.which("git") else None


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout


def snapshot_name(root: Path) -> tuple[str, list[str]]:
    """A name by the content of all files that git does not ignore, and the files: equal code has one snapshot."""
    files = [name for name in _git(root, "ls-files", "-zco", "--exclude-standard").decode().split("\0") if name]
    digest, there = hashlib.sha256(), []
    for name in sorted(files):
        path = root / name
        if path.is_file() and not path.is_symlink():
            there.append(name)
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12], there


def snapshot(root: Path, target: Path, files: list[str]) -> None:
    """Copy the code to ``target``, whole or not at all, with its commit and what differs from it."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, partial / name)
    (partial / "COMMIT").write_bytes(_git(root, "rev-parse", "HEAD"))
    (partial / "UNCOMMITTED.diff").write_bytes(_git(root, "diff", "HEAD", "--binary"))
    partial.rename(target)


def parameters(cfg: Config, code: Path | None) -> dict[str, Any]:
    """What submitit is told of the job."""
    asked, run = cfg.slurm, Path(cfg.run.dir).resolve()
    python = shlex.quote(sys.executable)
    # Without the first the folder that the job is submitted from, often the tree itself, would come before the copy.
    path = f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    setup = [*asked.setup, *(f"export {key}={shlex.quote(value)}" for key, value in asked.environment.items()),
             *([path] if code else []),
             # submitit refuses to write a result where a killed process left half of one.
             f"rm -f {shlex.quote(str(run / FOLDER))}/*.save_tmp",
             # Whatever ends the tasks, and also when this script is told to end.
             f"trap {shlex.quote(f'{python} -m slurm.job {shlex.quote(str(run))}; exit $?')} EXIT"]  # fmt: skip
    threads = asked.cpus_per_task and f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{asked.cpus_per_task}}}"
    more: dict[str, Any] = {"time": asked.time, "requeue": True} | ({"mem": asked.mem} if asked.mem else {})
    found = {
        "job_name": run.name, "nodes": asked.nodes, "ntasks_per_node": asked.tasks, "signal_delay_s": signal_lead(cfg),
        "partition": asked.partition, "account": asked.account, "qos": asked.qos, "constraint": asked.constraint,
        "gpus_per_node": asked.gpus_per_node or None, "cpus_per_task": asked.cpus_per_task, "stderr_to_stdout": True,
        "setup": [*([threads] if threads else []), *setup], "additional_parameters": more | dict(asked.directives),
        # A task that failed ends the others; since 22.05 srun does not take over the CPUs of a task.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={asked.cpus_per_task}"] if asked.cpus_per_task else [])],
    }  # fmt: skip
    return {key: value for key, value in found.items() if value is not None}


def plan(cfg: Config, *, queue: bool) -> Plan:
    """The job of a configuration. Raises ConfigError with every problem; without Slurm only where it is to be queued."""
    from submitit.slurm.slurm import _make_sbatch_string

    lines, problems = [], list[str]()
    for look in (_configuration, _processes, _memory, _room, _tracking):
        try:
            lines += look(cfg)
        except ConfigError as error:
            problems += error.problems
        except UserError as error:
            problems.append(str(error))
    run, root = Path(cfg.run.dir).resolve(), source_tree()
    code = None
    if root is not None:
        code = run / "code" / snapshot_name(root)[0]
        lines.append(f"code: a copy of {root} in {code}")
    told = parameters(cfg, code)
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(run / FOLDER))}"
    script = _make_sbatch_string(command=command, folder=run / FOLDER, **told)
    if shutil.which("sbatch") is not None:
        problems += _refusal(script)
    elif queue:
        problems.append("sbatch is not on this host: submit where Slurm is")
    else:
        lines.append("slurm: not asked, sbatch is not on this host")
    if problems:
        raise ConfigError(problems)
    lines.append(
        f"job: {cfg.slurm.world} processes on {cfg.slurm.nodes} nodes, asked to save {signal_lead(cfg)} s before its time is up"
    )
    return Plan(run, told, script, lines, code)


def _configuration(cfg: Config) -> list[str]:
    from pipeline.check import check

    return check(cfg).splitlines()[:-1]


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


def _memory(cfg: Config) -> Iterator[str]:
    """The planner's prediction for the GPU, where one is named."""
    from pipeline.planner import GIB, Machine, configured, find_gpu, largest_batch

    if cfg.slurm.gpu is None:
        return
    machine = Machine(find_gpu(cfg.slurm.gpu), cfg.slurm.world, cfg.slurm.tasks)
    engine = f"zero{cfg.engine.zero_stage}" if cfg.engine.name == "deepspeed" else cfg.engine.name
    layout = configured(cfg, engine)  # type: ignore[arg-type]
    share = cfg.train.global_batch // cfg.slurm.world
    micro = share if cfg.train.micro_batch == "auto" else cfg.train.micro_batch
    fits = largest_batch(cfg, machine, layout, accumulates=micro < share)
    if fits < micro:
        raise UserError(f"train.micro_batch = {micro}: {fits} images are predicted to fit a {cfg.slurm.gpu} "
                        f"({machine.gpu.memory_gib:g} GiB) with engine.name={cfg.engine.name}; set train.micro_batch, "
                        "engine.checkpoint_layers=full or another "
                        "engine (patchmill estimate)")  # fmt: skip
    yield f"memory: micro-batches of {micro} images, {fits} are predicted to fit {machine.bytes / GIB:.0f} GiB of a {cfg.slurm.gpu}"


def _room(cfg: Config) -> Iterator[str]:
    from pipeline.memory import state

    run = Path(cfg.run.dir).resolve()
    above = next(folder for folder in [run, *run.parents] if folder.exists())
    held = state(cfg)
    needed = (cfg.checkpoint.keep + 1) * (held.weights + held.moments + held.average)
    free = shutil.disk_usage(above).free
    if free < needed:
        raise UserError(f"run.dir = {run}: {cfg.checkpoint.keep} checkpoints and one more take {needed / 2**30:.2f} GiB, "
                        f"{free / 2**30:.2f} GiB are free; make room, or choose another folder")  # fmt: skip
    yield f"checkpoints: {needed / 2**30:.2f} GiB at most, {free / 2**30:.0f} GiB free"


def mlflow_uri(cfg: Config) -> str:
    """``tracking.uri`` in force: auto is MLFLOW_TRACKING_URI, else a file beside the run folder."""
    if cfg.tracking.uri != "auto":
        return cfg.tracking.uri
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(cfg.run.dir).resolve().parent / 'mlflow.db'}"


def _tracking(cfg: Config) -> Iterator[str]:
    uri = mlflow_uri(cfg)
    if uri.startswith("sqlite:") and cfg.tracking.uri != "auto" and cfg.slurm.nodes > 1:
        raise UserError(f"tracking.uri = {uri}: a file is not for several hosts; set tracking.uri=auto "
                        "(patchmill status then sends what the job has logged) or the address of a server")  # fmt: skip
    if uri != "none" and not uri.startswith("http"):
        yield f"tracking: the job logs to its folder; `patchmill status` sends it to {uri}"


def _refusal(script: str) -> Iterator[str]:
    """What Slurm has against a batch script, without queueing it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        code, said = ask("sbatch", "--test-only", file.name)
    if code:
        lines = (line.removeprefix("sbatch: error:").strip() for line in said.splitlines())
        yield "slurm: " + " ".join(line.removeprefix("allocation failure:").strip() for line in lines)


def ask(*command: str) -> tuple[int, str]:
    """(exit code, output) of a command of Slurm's, errors included; a controller that does not answer is given a minute."""
    done = subprocess.run(
        ["timeout", "60", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout or f"no answer to {command[0]} in a minute"


def slurm_state(job: str) -> tuple[str, str]:
    """(state, reason) of a job: squeue's, and sacct's once it is gone there; UNKNOWN where neither knows it."""
    code, said = ask("squeue", "-h", "-j", job, "-o", "%T|%r")
    if code == 0 and "|" in said:
        state, _, reason = said.splitlines()[0].partition("|")
        return state, "" if reason == "None" else reason
    code, said = ask("sacct", "-X", "-n", "-P", "-j", job, "-o", "State")
    return (said.split()[0] if code == 0 and said.split() and said.split()[0].isupper() else "UNKNOWN"), ""


def submit(cfg: Config) -> str:
    """Queue the job; what is to be said. Raises ConfigError with every problem, UserError when the run has a job already."""
    import submitit

    from slurm import job

    ready = plan(cfg, queue=True)
    if read_json(ready.run / "why_stopped.json").get("done"):
        raise UserError(f"run.dir = {ready.run}: that run is done; choose another folder")
    former = read_json(ready.run / JOB).get("job")
    if former and slurm_state(former)[0] in LIVE:
        raise UserError(
            f"run.dir = {ready.run}: its job {former} is {slurm_state(former)[0].lower()}; patchmill cancel {ready.run} ends it"
        )
    (ready.run / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    (ready.run / CANCELLED).unlink(missing_ok=True)
    (ready.run / CONFIG).write_text(
        cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(ready.run)})}).to_yaml()
    )
    (ready.run / FOLDER / "job.sh").write_text(ready.script)
    root = source_tree()
    if root is not None and ready.code is not None:
        ready.code.parent.mkdir(exist_ok=True)
        snapshot(root, ready.code, snapshot_name(root)[1])
    uri = mlflow_uri(cfg)
    record = {"tracking": uri, "tracking_waits": uri != "none" and not uri.startswith("http"), "world": cfg.slurm.world}
    (ready.run / JOB).write_text(json.dumps(record))  # the job may start before its number is known here
    executor = submitit.SlurmExecutor(ready.run / FOLDER)
    executor.update_parameters(**ready.parameters)
    number = executor.submit(job.supervise, str(ready.run)).job_id
    (ready.run / JOB).write_text(json.dumps(record | {"job": number}))
    return "\n".join([*ready.lines, f"submitted: job {number}; patchmill status {ready.run}"])
