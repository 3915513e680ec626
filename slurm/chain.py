"""``patchmill chain``: packing, training and probes as jobs that wait for each other, and what has become of them."""

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.chain_settings import StageConfig
from pipeline.config import Config, ConfigError, RunFailed, UserError, load_config
from slurm import local, status
from slurm.account import read_lines
from slurm.checks import KEPT, mlflow_uri, seconds, tracking_waits
from slurm.job import CONFIG, read_json
from slurm.pack import Pack, packs_of, sealed
from slurm.queue import LIVE, LOCAL, ask, slurm_state
from slurm.submit import (
    FOLDER,
    JOB,
    Plan,
    code_path,
    commands,
    copy_code,
    enqueue,
    note_job,
    plan,
    refusal,
    require_no_job,
    require_own,
    threads,
    write_run,
)

CHAIN: Final = "slurm/chain.json"  # the newest job of each stage, by its name
RESULTS: Final = {"knn": "knn_model", "linear": "linear_heads_model", "finetune": "val_top1"}  # in the log's eval lines
ORDER: Final = ("prep", "train", *RESULTS)


@dataclass(frozen=True)
class Chain:
    """What is to be done: the training's plan, the batch scripts by stage, and what is to be said of the other stages."""

    ready: Plan
    scripts: dict[str, str]
    lines: list[str]

    def __str__(self) -> str:
        """The scripts in their order, and the plan."""
        parts = [f"# ---- {name}\n{script.rstrip()}\n" for name, script in self.scripts.items()]
        return "\n".join([*parts, *self.ready.lines, *self.lines, f"jobs: {', then '.join(self.scripts)}"])


def _done(run: Path) -> bool:
    return bool(read_json(run / "why_stopped.json").get("done"))


def results(run: Path) -> dict[str, float]:
    """Top-1 in percent by probe, of the last step of a run that is done; that of fine-tuning from its own run."""
    found = dict[str, float]()
    for folder in (run, run / "finetune") if _done(run) else ():
        why = read_json(folder / "why_stopped.json")
        for line in read_lines(folder / "log.jsonl") if why.get("done") else []:
            if line.get("kind") == "eval" and line.get("step") == why.get("step"):
                found |= {name: line[key] for name, key in RESULTS.items() if key in line}
    return found


def _problems(cfg: Config) -> Iterator[str]:
    """What the settings of the chain have wrong."""
    if cfg.chain.evals and cfg.data.loader != "synthetic" and cfg.data.val is None:
        yield "data.val: is required and not set: chain.evals tests on its images; or set chain.evals=[]"
    if "finetune" in cfg.chain.evals:
        yield from _tuning(cfg)
    if "dependency" in cfg.slurm.directives:
        yield "slurm.directives.dependency: is the chain's own and cannot be set"
    for name, asked in (("prep", cfg.chain.prep), ("eval", cfg.chain.eval), ("finetune", cfg.chain.finetune)):
        if seconds(asked.time) is None:
            yield f"chain.{name}.time = {asked.time}: should be as sbatch has it, such as 1-00:00:00, 12:30:00 or 90 (minutes)"
        for key in asked.directives:
            if key.replace("-", "_") in (*KEPT, "dependency"):
                yield f"chain.{name}.directives.{key}: is the job's own and cannot be set"


def _tuning(cfg: Config) -> Iterator[str]:
    """What the settings of fine-tuning have wrong, as far as it can be known before anything is there."""
    from pipeline.evaluate.recipe import finetune_config

    run = Path(cfg.run.dir).resolve()
    try:
        tuned = finetune_config(cfg, run, cfg.chain.finetune.settings)
    except UserError as error:
        yield from (f"chain.finetune.settings: {line}" for line in str(error).splitlines())
        return
    if Path(tuned.run.dir) != run / "finetune":
        yield f"chain.finetune.settings: run.dir = {tuned.run.dir} is the chain's own and cannot be set"
    if tuned.train.global_batch % cfg.chain.finetune.processes:
        yield (f"chain.finetune.processes = {cfg.chain.finetune.processes}: should divide train.global_batch = "
               f"{tuned.train.global_batch} of chain.finetune.settings")  # fmt: skip
    if tuned.engine.name == "single" and cfg.chain.finetune.processes > 1:
        yield f"chain.finetune.processes = {cfg.chain.finetune.processes}: set engine.name=ddp, say, in chain.finetune.settings"


def _patchmill(cfg: Config, *words: object) -> str:
    here = f"{shlex.join([sys.executable, '-m', 'slurm.local', 'bound'])} $$"
    start = here if cfg.slurm.executor == "local" else shlex.join([sys.executable, "-m", "pipeline"])
    return f"{start} {shlex.join(map(str, words))}"


def _prep(cfg: Config, packs: list[Pack]) -> str:
    """The commands that pack; where they were killed they go on."""
    parts, workers = [], ("--workers", cfg.chain.prep.cpus_per_task)
    for pack in packs:
        index = () if pack.which == "train" else ("--against", Path(str(cfg.data.train)).with_suffix(".jsonl"))
        scan = _patchmill(cfg, "prep", "scan", pack.images, pack.manifest, *workers, *index)
        parts += [f"{{ test -e {shlex.quote(str(pack.manifest))} || {scan}; }}",  # it would begin anew
                  _patchmill(cfg, "prep", "write", pack.manifest, pack.beton, *workers),
                  _patchmill(cfg, "prep", "verify", pack.beton, *workers)]  # fmt: skip
    return " &&\n".join(parts)


def _eval(cfg: Config, run: Path, name: str) -> str:
    """The commands that probe; their result is a line of the run's log, which `status` sends on where no server takes it."""
    why, tuned = shlex.quote(str(run / "why_stopped.json")), cfg.chain.finetune
    more = (*tuned.settings, "--nproc", tuned.processes) if name == "finetune" else ()
    parts = [f"{{ grep -q '\"done\": true' {why} || {{ echo 'patchmill: the training is not done'; exit 1; }}; }}",
             _patchmill(cfg, "eval", name, run, *more)]  # fmt: skip
    if mlflow_uri(cfg) != "none" and not tracking_waits(cfg):
        parts.append(
            f"{{ {_patchmill(cfg, 'sync', run / 'finetune' if more else run)} || true; }}"
        )  # the result is there all the same
    return " &&\n".join(parts)


def _script(cfg: Config, name: str, asked: StageConfig, command: str, code: Path | None) -> str:
    """The batch script of a stage. No srun: a signal to its step would end it for good, so it is killed and comes back."""
    from submitit.slurm.slurm import _make_sbatch_string

    if cfg.slurm.executor == "local":
        return local.stage_script(cfg, asked.cpus_per_task, command)
    run = Path(cfg.run.dir).resolve()
    more: dict[str, Any] = {"time": asked.time, "requeue": True, "output": str(run / FOLDER / f"{name}-%j.out")}
    return _make_sbatch_string(
        command=command, folder=run / FOLDER, use_srun=False, job_name=f"{run.name}-{name}", nodes=1, ntasks_per_node=1,
        cpus_per_task=asked.cpus_per_task, mem=asked.mem, partition=asked.partition or cfg.slurm.partition,
        account=cfg.slurm.account, qos=cfg.slurm.qos, stderr_to_stdout=True, wckey=None,
        setup=[*threads(asked.cpus_per_task), *code_path(code), *commands(cfg)],
        additional_parameters=more | dict(asked.directives),
    )  # fmt: skip


def draft(cfg: Config, *, queue: bool) -> Chain:
    """What of a chain is still to be done. Raises ConfigError with every problem; without Slurm only to queue it."""
    run = Path(cfg.run.dir).resolve()
    packs, problems = packs_of(cfg)
    problems += _problems(cfg)
    ready: Plan | None = None
    try:
        ready = plan(cfg, queue=queue, coming=[pack.which for pack in packs])
    except ConfigError as error:
        problems += error.problems
    code, there, lines = ready.code if ready else None, results(run), list[str]()
    prep = {"prep": _script(cfg, "prep", cfg.chain.prep, _prep(cfg, packs), code)} if packs else {}
    probes = {
        name: _script(cfg, name, stage_of(cfg, name), _eval(cfg, run, name), code)
        for name in cfg.chain.evals
        if name not in there
    }
    here = cfg.slurm.executor == "local"
    for name, script in (prep | probes).items() if shutil.which("sbatch") and not here else ():
        problems += refusal(script, f"chain.{name if name in ('prep', 'finetune') else 'eval'}")
    if problems or ready is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    lines += _unused(cfg) if here else []
    lines += [f"prep: {pack.beton} of {pack.images}" for pack in packs]
    if not packs and (cfg.chain.train_images or cfg.chain.val_images):
        lines.append("prep: left out, the betons are there")
    if _done(run):
        lines.append("train: left out, the run is done")
    lines += [f"{name}: left out, {top1:.2f} % top-1" for name, top1 in there.items() if name in cfg.chain.evals]
    return Chain(ready, prep | ({} if _done(run) else {"train": ready.script}) | probes, lines)


def stage_of(cfg: Config, name: str) -> StageConfig:
    """The job of a probe, or of fine-tuning."""
    return cfg.chain.finetune if name == "finetune" else cfg.chain.eval


def _unused(cfg: Config) -> list[str]:
    """What the settings of the stages ask of Slurm where it is not used."""
    asked = {f"chain.{name}.{key}": (key, value) for name in ("prep", "eval", "finetune")
             for key, value in getattr(cfg.chain, name).model_dump().items() if key in StageConfig.model_fields
             and key != "cpus_per_task"}  # fmt: skip
    default = StageConfig().model_dump()
    found = [name for name, (key, value) in asked.items() if value != default[key]]
    return [f"not used without Slurm: {', '.join(found)}"] if found else []


def chain(cfg: Config, *, dry_run: bool) -> str:
    """Queue what is not done; what is to be said.

    Raises ConfigError with every problem, UserError while a job of the run is queued or runs, RunFailed where Slurm refuses.
    """
    run = Path(cfg.run.dir).resolve()
    if _done(run) and not set(cfg.chain.evals) - results(run).keys():
        return f"{run}: everything is done; patchmill status {run}"
    todo = draft(cfg, queue=not dry_run)
    if dry_run:
        return str(todo)
    here = cfg.slurm.executor == "local"
    require_own(run)
    with local.reserved(run) as lock:
        if not here:
            require_no_job(run)
        write_run(cfg, run)
        copy_code(todo.ready)
        said = f"started: job {_start(cfg, todo, lock)}" if here else f"submitted: {_queue(cfg, todo)}"
    return "\n".join([*todo.ready.lines, *todo.lines, f"{said}; patchmill status {run}"])


def _queue(cfg: Config, todo: Chain) -> str:
    """The jobs of the stages. Raises RunFailed when Slurm takes one not; then none is left."""
    from pipeline.runlog import replace_file

    run, queued = todo.ready.run, dict[str, str]()
    if not (run / JOB).exists():
        note_job(cfg, run)  # `status` finds runs by it, also those that were not trained by a job
    former = _former(cfg, run)
    try:
        for name, script in todo.scripts.items():
            after = _dependency(queued)
            queued[name] = enqueue(cfg, todo.ready, **after) if name == "train" else _sbatch(run, name, script, after)
            replace_file(run / CHAIN, json.dumps(former | queued).encode())
    except (RunFailed, OSError) as error:
        if queued:
            ask("scancel", *queued.values())
        raise RunFailed(f"{run}: the chain is not queued: {' '.join(str(error).split())}") from None
    return ", ".join(f"{name} {job}" for name, job in queued.items())


def _start(cfg: Config, todo: Chain, lock: int) -> str:
    """On this host one job has all stages; which."""
    from pipeline.runlog import replace_file

    run, names = todo.ready.run, list(todo.scripts)
    for name in names:
        if name != "train":  # which is as without a chain
            (run / FOLDER / f"{name}.sh").write_text(todo.scripts[name])
    replace_file(run / local.STAGES, json.dumps({"names": names}).encode())
    job = local.launch(cfg, todo.ready, lock, part="chain")
    replace_file(run / CHAIN, json.dumps(_former(cfg, run) | dict.fromkeys(names, job)).encode())
    return f"{job}, for {', '.join(names)}"


def _former(cfg: Config, run: Path) -> dict[str, str]:
    """The newest job of each stage before this call."""
    return {name: job for name, job in read_json(run / CHAIN).items() if name in ("prep", "train", *cfg.chain.evals)}


def _dependency(queued: dict[str, str]) -> dict[str, str]:
    """Options for the next stage. A probe also waits for the one before: that one keeps the features which both need."""
    needed = queued.get("train", queued.get("prep"))
    probes = [job for name, job in queued.items() if name in RESULTS]
    after = [*([f"afterok:{needed}"] if needed else []), *(f"afterany:{job}" for job in probes[-1:])]
    return {"dependency": ",".join(after), "kill-on-invalid-dep": "yes"} if after else {}


def _sbatch(run: Path, name: str, script: str, options: dict[str, str]) -> str:
    path = run / FOLDER / f"{name}.sh"
    path.write_text(script)
    code, said = ask("sbatch", "--parsable", *(f"--{key}={value}" for key, value in options.items()), str(path))
    numbers = [line.split(";")[0] for line in said.splitlines() if line.split(";")[0].isdigit()]
    if code or not numbers:
        raise RunFailed(f"{name}: {said.strip()}")
    return numbers[-1]


def cancel(run: Path, patience_s: float) -> str:
    """``status.cancel`` for a run and what waits for it or comes before; the training saves first.

    Raises as that does; UserError where nothing is left to cancel.
    """
    others = {name: job for name, job in read_json(run / CHAIN).items() if name != "train"}
    live = {name: job for name, job in others.items() if not job.startswith(LOCAL) and slurm_state(job)[0] in LIVE}
    said = [_end(run, name, live[name]) for name in reversed(RESULTS) if name in live]  # the last first: none may start
    if not live or slurm_state(str(read_json(run / JOB).get("job", 0)))[0] in LIVE:
        said.append(status.cancel(run, patience_s))
    return "\n".join([*said, *(_end(run, name, live[name]) for name in live if name == "prep")])


def cancel_all(runs: list[Path], patience_s: float) -> Iterator[str]:
    """``cancel`` for each run that has a job, what waits first, so that it does not start when others end."""
    jobs = {run: [str(read_json(run / JOB).get("job", "")), *read_json(run / CHAIN).values()] for run in runs}
    states = {run: [slurm_state(job)[0] for job in dict.fromkeys(own) if job] for run, own in jobs.items()}
    live = [run for run in runs if any(state in LIVE for state in states[run])] or runs[
        :1
    ]  # of none, what `cancel` says
    waiting = [run for run in live if set(states[run]) & set(LIVE) == {"PENDING"}]
    with ThreadPoolExecutor(8) as pool:  # all that run save at the same time, and one that is not taken keeps no other
        ends = [pool.submit(cancel, run, patience_s) for run in waiting]
        wait(ends)
        ends += [pool.submit(cancel, run, patience_s) for run in live if run not in waiting]
        yield from (end.result() for end in ends)


def _end(run: Path, name: str, job: str) -> str:
    code, told = ask("scancel", job)
    if code:
        raise RunFailed(f"{run}: Slurm did not take it ({told.strip()}); {name} (job {job}) goes on")
    return f"{name} (job {job}) is cancelled"


def stages(found: status.Status) -> list[str]:
    """A line a stage of a chain: how far it is, or why it is not; none for a run of `patchmill submit`."""
    run, lines, broken, waits, before = found.run, list[str](), "", "", ""
    jobs = read_json(run / CHAIN)
    if jobs:
        jobs["train"] = found.job or "-"  # `submit` may have queued it again, or nobody
    here = local.stage_states(run, jobs)
    for name in (name for name in ORDER if name in jobs):
        known = (found.state, found.reason) if name == "train" else None
        state, reason = here.get(name) or known or slurm_state(jobs[name])
        word = _finished(run, name, state)
        if word is None and state in LIVE and reason != "DependencyNeverSatisfied":
            told = f"{state.lower()} ({reason})" if reason else state.lower()
            word = f"waits for {waits or before}" if reason == "Dependency" else told  # or for the end of what is done
            waits = name
        elif word is None and broken and state in (*LIVE, "CANCELLED"):
            word = f"cancelled, as {broken}"
        elif word is None:
            verdict = {"CANCELLED": "was cancelled", "UNKNOWN": "is not known: Slurm does not say"}.get(
                state, state.lower()
            )
            word = f"{verdict}{_why(found, name, jobs[name])}"
            broken = broken or (f"{name} {verdict}" if name not in RESULTS else "")
        before = name
        lines.append(f"{name:7} {jobs[name]:>9}  {word}")
    return lines


def _finished(run: Path, name: str, state: str) -> str | None:
    """What is to be said of a stage that has done its work."""
    if name in RESULTS:
        top1 = results(run).get(name)
        return None if top1 is None else f"done, {top1:.2f} % top-1"
    if name == "train":
        return "done" if _done(run) else None
    if state in ("UNKNOWN", "ENDED"):  # Slurm may have forgotten it: the betons tell
        with suppress(UserError):
            data = load_config([run / CONFIG]).data
            return "done" if all(sealed(Path(beton)) for beton in (data.train, data.val) if beton) else None
    return "done" if state == "COMPLETED" else None


def _why(found: status.Status, name: str, job: str) -> str:
    """The reason of a stage that ended early, from its log: the last line in our own words, else the last one."""
    if name == "train":
        return f": {found.why}" if found.why not in ("", "cancelled") else ""
    path = found.run / FOLDER / f"{name}-{job}.out"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] if path.exists() else []
    own = [line.removeprefix("patchmill: ") for line in lines if line.startswith("patchmill: ")]
    return f": {[*lines, *own][-1]} ({path})" if lines else ""
