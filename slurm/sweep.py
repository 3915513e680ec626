"""``patchmill sweep``: a run for each point of a space, checked as one and queued as one job array."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import Config, ConfigError, UserError, binding_differences, flatten, load_config
from slurm.checks import checkpoint_bytes, free_bytes, mlflow_uri, signal_lead
from slurm.job import CONFIG, read_json
from slurm.local import Line, launch, places, reserved, script
from slurm.queue import LIVE, LOCAL, slurm_state
from slurm.space import SWEEP, Settings, Space, names, overrides, read_space, shown
from slurm.submit import (
    FOLDER,
    JOB,
    Plan,
    assemble,
    copy_code,
    examine,
    executor,
    live_jobs,
    note_job,
    noted,
    require_own,
    taken,
    write_run,
)


@dataclass(frozen=True)
class Point:
    """A run of a sweep: its folder, configuration, and what distinguishes it. ``state``: done, its job's, or empty."""

    run: Path
    cfg: Config
    settings: Settings
    state: str = ""


def sweep(name: str, files: Sequence[str], words: Sequence[str], *, parallel: int | None, queue: bool) -> str:
    """Queue the points that are not done and have no job; what is to be said.

    Raises ConfigError with every problem of every point, UserError when the folder holds another sweep.
    """
    space = read_space(name)
    points = configure(space, files, words)
    folder = points[0].run.parent
    _require_same(folder, points)
    here = points[0].cfg.slurm.executor == "local"
    points = with_states(folder, points, ask_slurm=queue and not here)
    todo = [point for point in points if not point.state]
    table = _table(points, "queued" if queue else "to be queued")
    if not todo:
        return "\n".join([*table, "", "nothing to queue: every point is done or has a job"])
    wanted = parallel or space.parallel
    most = len(places(todo[0].cfg, wanted)) or 1 if here else wanted or len(todo)
    at_once = min(most, len(todo))
    ready = _plan(folder, todo, len(points), at_once, queue=queue)
    if not queue:
        return "\n".join([ready.script.rstrip(), "", *table, "", *ready.lines])
    with reserved(folder):
        if with_states(folder, points, ask_slurm=not here) != points:
            raise UserError(
                f"run.dir = {folder}: another call has queued points of this sweep; patchmill status {folder}"
            )
        said = _queue(ready, space, points, todo, at_once)
    return "\n".join([*ready.lines, "", *table, "", said])


def configure(space: Space, files: Sequence[str], words: Sequence[str]) -> list[Point]:
    """Each point's run in the sweep's folder, ``run.dir``. Raises ConfigError with all problems, each with its points."""
    found, problems = list[Point](), dict[str, list[str]]()
    all_settings = space.points()
    numbers = names(len(all_settings))
    for number, settings in zip(numbers, all_settings, strict=True):
        try:
            cfg = load_config(files, [*words, *overrides(settings)])
        except ConfigError as error:
            problems[number] = error.problems
            continue
        run = Path(cfg.run.dir).resolve() / number
        found.append(Point(run, cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(run)})}), settings))
    if problems:
        raise ConfigError(_gathered(problems, numbers))
    return found


def _gathered(said: dict[str, list[str]], numbers: Sequence[str]) -> list[str]:
    """Lines of points, each once with the points that say it; what all say stands alone and first."""
    by_line: dict[str, list[str]] = {}
    for number, lines in said.items():
        for line in dict.fromkeys(lines):
            by_line.setdefault(line, []).append(number)
    common = [line for line, points in by_line.items() if len(points) == len(numbers)]
    return [*common, *(f"{', '.join(points)}: {line}" for line, points in by_line.items() if line not in common)]


def _require_same(folder: Path, points: Sequence[Point]) -> None:
    """Raises UserError when the folder has a run in it, other points, or points whose other settings differ."""
    if (folder / JOB).exists() or (folder / "log.jsonl").exists():
        raise UserError(f"run.dir = {folder}: holds a run; a sweep needs a folder of its own")
    if not (folder / SWEEP).exists():
        require_own(folder)
    known, new = read_json(folder / SWEEP).get("points"), {point.run.name: point.settings for point in points}
    if known is None:
        return
    if known != new:
        odd = next(number for number in [*new, *known] if known.get(number) != new.get(number))
        there, here = (shown(one[odd]) if odd in one else "is none" for one in (known, new))
        raise UserError(f"run.dir = {folder}: holds a sweep of other points ({odd} there {there}, here {here}); choose "
                        "another folder or the same space")  # fmt: skip
    made = [point for point in points if (point.run / CONFIG).exists()]
    differ = [line for point in made for line in binding_differences(load_config([point.run / CONFIG]), point.cfg)]
    if differ:
        raise UserError(f"run.dir = {folder}: holds a sweep of another configuration; choose another folder or put back "
                        + "; ".join(dict.fromkeys(differ)))  # fmt: skip


def with_states(folder: Path, points: Sequence[Point], *, ask_slurm: bool) -> list[Point]:
    """The points with what became of them so far. Raises UserError when a job is not known to be any point's."""
    live = live_jobs(folder) if ask_slurm else []
    noted = [(str(read_json(point.run / JOB).get("job", "")), point.run) for point in points]
    local = [(job, slurm_state(job)[0], run) for job, run in noted if job.startswith(LOCAL)]
    live += [(job, state.lower(), run) for job, state, run in local if state in LIVE]
    found = list[Point]()
    for point in points:
        own = [row for row in live if row[2] == point.run or (row[2] == folder and (row[0], point.run) in noted)]
        live = [row for row in live if row not in own]
        state = f"job {own[0][0]} is {own[0][1]}" if own else ""
        state = "done" if read_json(point.run / "why_stopped.json").get("done") else state
        found.append(Point(point.run, point.cfg, point.settings, state))
    if live:
        job, state, _ = live[0]
        raise UserError(f"run.dir = {folder}: job {job} is {state} and no point knows it: a call that was cut off; "
                        f"scancel {job.split('_')[0]} ends it")  # fmt: skip
    return found


def _plan(folder: Path, todo: Sequence[Point], total: int, parallel: int, *, queue: bool) -> Plan:
    """The array. Raises ConfigError with every problem of every point."""
    numbers = [point.run.name for point in todo]
    lines, problems = dict[str, list[str]](), dict[str, list[str]]()
    for point in todo:
        told, wrong = examine(point.cfg)
        lines[point.run.name] = [line.replace(str(point.run), str(folder)) for line in told]
        problems[point.run.name] = [line.replace(str(point.run), str(folder)) for line in wrong]
    needed, free = sum(checkpoint_bytes(point.cfg) for point in todo), free_bytes(folder)
    bad = _gathered(problems, numbers)
    if needed > free and not bad:
        bad.append(f"run.dir = {folder}: the checkpoints of {len(todo)} points take {needed / 2**30:.2f} GiB, "
                   f"{free / 2**30:.2f} GiB are free; make room, or choose another folder")  # fmt: skip
    first = todo[0].cfg
    lead = max(signal_lead(point.cfg) for point in todo)
    whole = first.model_copy(update={"run": first.run.model_copy(update={"dir": str(folder)}),
                                     "slurm": first.slurm.model_copy(update={"signal_lead_s": lead})})  # fmt: skip
    said = [*_gathered(lines, numbers), f"sweep: {len(todo)} of {total} points, {parallel} at a time; their checkpoints take "
            f"{needed / 2**30:.2f} GiB at most"]  # fmt: skip
    ready = assemble(whole, said, bad, queue=queue, points=numbers, parallel=parallel)
    return replace(ready, script=script(first, parallel)) if first.slurm.executor == "local" else ready


def _queue(ready: Plan, space: Space, points: Sequence[Point], todo: Sequence[Point], at_once: int) -> str:
    """Make the folders, the parent in MLflow and the jobs; what is to be said."""
    from pipeline.runlog import replace_file

    ready.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_file(ready.run / SWEEP, json.dumps({"points": {p.run.name: p.settings for p in points}}, indent=1).encode())
    for point in todo:
        write_run(point.cfg, point.run)
    uri = mlflow_uri(todo[0].cfg)
    if uri != "none":
        from pipeline.tracking import nest

        params = flatten(space.model_dump(by_alias=True, exclude_none=True))
        nest(ready.run, uri, todo[0].cfg.tracking.experiment, params, {"kind": "sweep", "patchmill.points": str(len(points))},
             [point.run for point in todo])  # fmt: skip
    copy_code(ready)
    if todo[0].cfg.slurm.executor == "local":
        _start(ready, todo, at_once)
        return f"started: {len(todo)} jobs, {at_once} at a time; patchmill status {ready.run}"
    return f"submitted: job {_submit_array(ready, todo)}; patchmill status {ready.run}"


def _start(ready: Plan, todo: Sequence[Point], at_once: int) -> None:
    """A job on this host for each point; most wait for their turn."""
    line = Line(ready.run, at_once)
    for point in todo:
        with reserved(point.run) as lock:
            launch(point.cfg, replace(ready, run=point.run, script=script(point.cfg, at_once)), lock, line)


def _submit_array(ready: Plan, todo: Sequence[Point]) -> str:
    """The array's number. Raises RunFailed when Slurm does not take it."""
    from slurm import job

    logs = f"../{FOLDER}"
    for point in todo:
        note_job(point.cfg, point.run, logs=logs)
    with taken(ready.run):
        jobs = executor(ready).map_array(job.supervise, [str(point.run) for point in todo])
    array = str(jobs[0].job_id.split("_")[0])
    with noted(ready.run, array):
        for point, made in zip(todo, jobs, strict=True):
            note_job(point.cfg, point.run, logs=logs, job=made.job_id)
    return array


def _table(points: Sequence[Point], todo: str) -> list[str]:
    """A line a point."""
    width = max(len(shown(point.settings)) for point in points)
    return [f"{point.run.name}  {shown(point.settings):{width}}  {point.state or todo}" for point in points]
