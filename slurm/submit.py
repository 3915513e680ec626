"""``patchmill submit``: everything that can be known is checked, then the run is one job that comes back until it is done."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pipeline.config import CONFIG_DIR, Config, ConfigError, RunFailed, UserError
from slurm.checks import CHECKS, configuration, mlflow_uri, signal_lead, tracking_waits
from slurm.job import CANCELLED, CONFIG, read_json
from slurm.queue import ask, outside
from slurm.space import SWEEP

if TYPE_CHECKING:
    from slurm.local import Line

FOLDER: Final = "slurm"  # of a run: what the job needs and leaves
JOB: Final = "slurm/job.json"
LOCK: Final = "slurm/lock"  # held by a submit, and by the keeper of a job without Slurm for as long as it lives
RUN_MARKS: Final = (JOB, "log.jsonl", SWEEP)  # in the folder of a run or of a sweep
# The settings to which a refusal of Slurm's may refer, by a word of it.
SETTINGS: Final = {"time limit": "time", "partition": "partition", "account": "account", "qos": "qos", "--mem": "mem",
                   "memory": "mem", "node count": "nodes", "processors": "cpus_per_task"}  # fmt: skip
# A task's first words: Slurm may signal it before Python runs, when there is nothing yet to save.
TASK_PYTHON: Final = f"""sh -c 'trap "" USR2; exec "$@"' task {shlex.quote(sys.executable)}"""


@dataclass(frozen=True)
class Plan:
    """A job before it is queued: its batch script, submitit's parameters for it, what is to be said, and the files of the code."""

    run: Path
    parameters: dict[str, Any]
    script: str
    lines: list[str]
    code: Path | None
    files: list[str]

    def __str__(self) -> str:
        """The script and the plan."""
        return "\n".join([self.script.rstrip(), "", *self.lines])


def source_tree() -> Path | None:
    """The git tree that this code runs from; None when it is installed without one."""
    root = CONFIG_DIR.parent
    return root if (root / ".git").exists() and shutil.which("git") else None


def _git(root: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout


def snapshot_name(root: Path) -> tuple[str, list[str]]:
    """A name by the content of all files that git does not ignore, and the files: equal code has one snapshot."""
    listed = [name for name in _git(root, "ls-files", "-zco", "--exclude-standard").decode().split("\0") if name]
    # Runs that lie in the tree are no code, nor is what MLflow keeps beside them.
    runs = tuple(name.removesuffix(mark) for mark in RUN_MARKS for name in listed if name.endswith(f"/{mark}"))
    files = [
        name
        for name in listed
        if not name.startswith(runs) and "mlartifacts/" not in name and Path(name).name != "mlflow.db"
    ]
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


def threads(cpus: int | None) -> list[str]:
    """Of a batch script: no more threads than a process has CPUs."""
    return [f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{cpus}}}"] if cpus else []


def environment(cpus: int | None) -> list[str]:
    """Of a batch script: what processes of ``cpus`` CPUs find set; what the user has set goes before.

    Elsewhere: the network device is ``engine.interface``, a process's GPU goes by its number on the host (all are visible, so
    that NCCL reaches those beside it), and ``pipeline.launch`` has the flight recorder write into the run folder.
    """
    # Compiled code on the host's own disk: in a home on the network all processes would write the same files.
    cache = "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/patchmill-$UID"
    lines = ["export NCCL_DEBUG=${NCCL_DEBUG:-WARN}",
             f'export TORCHINDUCTOR_CACHE_DIR="${{TORCHINDUCTOR_CACHE_DIR:-{cache}/inductor}}"',
             f'export TRITON_CACHE_DIR="${{TRITON_CACHE_DIR:-{cache}/triton}}"']  # fmt: skip
    # A process stays on CPUs of its own. What an interactive job has in this variable is not for another job.
    return [*lines, *threads(cpus), *(["export SLURM_CPU_BIND=cores"] if cpus else [])]


def code_path(code: Path | None) -> list[str]:
    """Of a batch script: Python finds the copy of the code, where there is one."""
    # Without the first the folder that the job is submitted from, often the tree itself, would come before the copy.
    path = f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return [path] if code else []


def commands(cfg: Config) -> list[str]:
    """Of a batch script: what the configuration sets up."""
    return [*(f"export {key}={shlex.quote(value)}" for key, value in cfg.slurm.environment.items()), *cfg.slurm.setup]


def parameters(cfg: Config, code: Path | None, points: Sequence[str] = ()) -> dict[str, Any]:
    """What submitit is told of the job, or of an array of jobs for the runs ``points`` in the folder."""
    asked, run = cfg.slurm, Path(cfg.run.dir).resolve()
    verdict = f"trap '' INT TERM USR2; {shlex.join([sys.executable, '-m', 'slurm.job', str(run), *points])}; exit $?"
    number = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    setup = [*code_path(code),
             # Whatever ends the job: its tasks, what is set up for them, or a signal to this script. The requeue that the
             # verdict asks for ends the job and all its processes: the verdict must still write what it was.
             f"trap {shlex.quote(verdict)} EXIT",
             # submitit refuses to write a result where a killed process left half of one.
             f"rm -f {shlex.quote(str(run / FOLDER))}/{number}_*.save_tmp",
             *commands(cfg)]  # fmt: skip
    more: dict[str, Any] = {"time": asked.time, "requeue": True} | ({"mem": asked.mem} if asked.mem else {})
    found = {
        "job_name": run.name, "nodes": asked.nodes, "ntasks_per_node": asked.tasks, "signal_delay_s": signal_lead(cfg),
        "partition": asked.partition, "account": asked.account, "qos": asked.qos, "constraint": asked.constraint,
        "gpus_per_node": asked.gpus_per_node or None, "cpus_per_task": asked.cpus_per_task, "stderr_to_stdout": True,
        "setup": [*environment(asked.cpus_per_task), *setup], "additional_parameters": more | dict(asked.directives),
        # A task that failed ends the others; since 22.05 srun does not take over the CPUs of a task.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={asked.cpus_per_task}"] if asked.cpus_per_task else [])],
    }  # fmt: skip
    # Without the last submitit would set one of its own.
    return {key: value for key, value in found.items() if value is not None} | {"wckey": None}


def examine(cfg: Config, coming: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """What the checks say of a configuration for the plan, and all that they have against it; ``coming``: see ``plan``."""
    lines, problems = list[str](), list[str]()
    for look in (partial(configuration, coming=coming), *CHECKS):
        try:
            lines += look(cfg)
        except ConfigError as error:
            problems += error.problems
        except UserError as error:
            problems.append(str(error))
    return lines, problems


def plan(cfg: Config, *, queue: bool, coming: Collection[str] = ()) -> Plan:
    """The job of a configuration. Raises ConfigError with every problem; without Slurm only where it is to be queued.

    ``coming``: which of train and val are packed before it runs.
    """
    return assemble(cfg, *examine(cfg, coming), queue=queue)


def assemble(cfg: Config, lines: list[str], problems: list[str], *, queue: bool, points: Sequence[str] = (),
             parallel: int = 1) -> Plan:  # fmt: skip
    """The job, or the array of jobs for ``points``, with what was said of it so far. Raises ConfigError with all problems."""
    from submitit.slurm.slurm import _make_sbatch_string

    from slurm import local

    run, root = Path(cfg.run.dir).resolve(), source_tree()
    code, files = None, list[str]()
    if root is not None:
        name, files = snapshot_name(root)
        code = run / "code" / name
        lines.append(f"code: a copy of {root} in {code}")
    here = cfg.slurm.executor == "local"
    told = {} if here else parameters(cfg, code, points) | ({"array_parallelism": parallel} if points else {})
    count = len(points) if len(points) > 1 else None  # submitit makes a plain job of an array of one
    command = f"{TASK_PYTHON} -u -m submitit.core._submit {shlex.quote(str(run / FOLDER))}"
    script = (
        local.script(cfg)
        if here
        else _make_sbatch_string(command=command, folder=run / FOLDER, map_count=count, **told)
    )
    if subprocess.run(["/bin/bash", "-n"], input=script.encode(), capture_output=True, check=False).returncode:
        problems.append("slurm.setup: is not what bash understands; a quote may be open")
    if here:
        lines.append(local.describe(cfg))
    elif shutil.which("sbatch") is not None:
        problems += refusal(script)
    elif queue:
        problems.append("sbatch is not on this host: submit where Slurm is, or set slurm.executor=local")
    else:
        lines.append("slurm: not asked, sbatch is not on this host")
    if problems:
        raise ConfigError(problems)
    if not here:
        lines.append(
            f"job: {cfg.slurm.world} processes on {cfg.slurm.nodes} nodes, asked to save {signal_lead(cfg)} s before its time is up"
        )
    return Plan(run, told, script, lines, code, files)


def refusal(script: str, section: str = "slurm") -> Iterator[str]:
    """What Slurm has against a batch script, without queueing it; ``section`` has its settings."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        code, said = ask("sbatch", "--test-only", file.name)
    if code:
        lines = (line.removeprefix("sbatch: error:").strip() for line in said.splitlines())
        told = " ".join(line.removeprefix("allocation failure:").strip() for line in lines)
        keys = dict.fromkeys(f"{section}.{key}" for word, key in SETTINGS.items() if word in told.lower())
        yield f"slurm: {told}" + (f" ({', '.join(keys)})" if keys else "")


def live_jobs(folder: Path) -> list[tuple[str, str, Path]]:
    """(job, state, run's or sweep's folder) of the jobs whose scripts Slurm has from somewhere in a folder. Raises UserError."""
    code, said = ask("squeue", "-h", "-r", "-o", "%i|%T|%o")
    if code:
        raise UserError(f"slurm: squeue does not say which jobs there are: {said.strip()}")
    found = []
    for job, state, script in (line.split("|", 2) for line in said.splitlines() if line.count("|") >= 2):
        if Path(script).is_relative_to(folder) and Path(script).parent.name == FOLDER:
            found.append((job, state.lower(), Path(script).parents[1]))
    return found


def require_no_job(run: Path) -> None:
    """Raises UserError while a job of this run is queued or runs, by what Slurm knows of their scripts."""
    noted = read_json(run / JOB).get("job")
    for job, state, owner in live_jobs(run.parent):
        # A sweep's script is that of all its points; one that was cut off may not have said to them which jobs are theirs.
        if owner == run or (owner == run.parent and noted in (None, job)):
            end = f"patchmill cancel {run}" if noted else f"scancel {job}"
            raise UserError(f"run.dir = {run}: its job {job} is {state}; {end} ends it")


def submit(cfg: Config, line: "Line | None" = None) -> str:
    """Queue the job, without Slurm in ``line`` where there is one; what is to be said.

    Raises ConfigError with every problem, UserError when the run has a job already.
    """
    from slurm import local

    ready, here = plan(cfg, queue=True), cfg.slurm.executor == "local"
    if read_json(ready.run / "why_stopped.json").get("done"):
        raise UserError(f"run.dir = {ready.run}: that run is done; choose another folder")
    require_own(ready.run)
    with local.reserved(ready.run) as lock:
        if not here:
            require_no_job(ready.run)
        write_run(cfg, ready.run)
        copy_code(ready)
        number = local.launch(cfg, ready, lock, line) if here else enqueue(cfg, ready)
    said = f"{'started' if here else 'submitted'}: job {number}; patchmill status {ready.run}"
    return "\n".join([*ready.lines, said])


def require_own(run: Path) -> None:
    """Raises UserError for a folder of a sweep, or of something that is no run."""
    if (run / SWEEP).exists():
        raise UserError(f"run.dir = {run}: holds a sweep; choose another folder")
    if (
        run.is_dir()
        and any(run.iterdir())
        and not any((run / name).exists() for name in (LOCK, "config.yaml", *RUN_MARKS))
    ):
        raise UserError(f"run.dir = {run}: holds files, but no run; choose another folder")


def write_run(cfg: Config, run: Path) -> None:
    """Make a run's folder, with the configuration that its job reads there."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    (run / CANCELLED).unlink(missing_ok=True)
    (run / CONFIG).write_text(cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(run)})}).to_yaml())


def copy_code(ready: Plan) -> None:
    """The plan's copy of the code, where there is a tree to copy."""
    root = source_tree()
    if root is not None and ready.code is not None:
        ready.code.parent.mkdir(exist_ok=True)
        snapshot(root, ready.code, ready.files)


def executor(ready: Plan, **more: str) -> Any:
    """submitit's executor for a plan, with ``more`` options of sbatch; leaves the script in the folder."""
    import submitit

    (ready.run / FOLDER).mkdir(exist_ok=True, mode=0o700)
    (ready.run / FOLDER / "job.sh").write_text(ready.script)
    found = submitit.SlurmExecutor(ready.run / FOLDER, python=TASK_PYTHON)
    told = ready.parameters
    found.update_parameters(**told | {"additional_parameters": told["additional_parameters"] | more})
    return found


@contextmanager
def taken(run: Path) -> Iterator[None]:
    """For submitit: what it raises when Slurm does not take a job is RunFailed, and no job around this one shows through."""
    from submitit.core.utils import FailedJobError

    before, clean = dict(os.environ), outside()
    for name in before.keys() - clean.keys():
        del os.environ[name]
    try:
        yield
    except FailedJobError as error:
        raise RunFailed(f"{run}: Slurm did not take the job: {' '.join(str(error).split())}") from None
    finally:
        os.environ |= before


def enqueue(cfg: Config, ready: Plan, **more: str) -> str:
    """Hand the training to Slurm, with ``more`` options of sbatch; its job's number. Raises RunFailed when it is not taken."""
    from slurm import job

    note_job(cfg, ready.run)  # it may start before its number is known here
    with taken(ready.run):
        number: str = executor(ready, **more).submit(job.supervise, str(ready.run)).job_id
    with noted(ready.run, number):
        note_job(cfg, ready.run, job=number)
    return number


@contextmanager
def noted(run: Path, job: str) -> Iterator[None]:
    """A job whose number cannot be written is cancelled, as nobody would find it. Raises RunFailed then."""
    try:
        yield
    except OSError as error:
        ask("scancel", job)
        raise RunFailed(
            f"{run}: the number of its job cannot be written ({error.strerror}); job {job} is cancelled"
        ) from None


def note_job(cfg: Config, run: Path, **more: str) -> None:
    """Write what the job, `status` and `logs` must know of it to the run folder: ``more`` is its number, and where its logs are."""
    from pipeline.runlog import replace_file

    record = {"tracking": mlflow_uri(cfg), "tracking_waits": tracking_waits(cfg), "world": cfg.slurm.world}
    replace_file(run / JOB, json.dumps(record | more).encode())
