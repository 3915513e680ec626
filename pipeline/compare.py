"""`patchmill compare`: runs side by side, as tables, as JSON and, where asked for, as a figure or a page. No torch."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.asked import FIGURES, require_writable, write_asked
from pipeline.config import UserError
from pipeline.equal_compute import at_equal_compute, axis_label, by_step, is_loss, on_gpus
from pipeline.history import HELDOUT, WINDOW, Floats, History, read_folder, read_mlflow
from pipeline.mlflow_run import redact
from pipeline.runlog import LOG, to_json
from pipeline.tracking import resolve_uri, store_beside

RUN_ID: Final = re.compile(r"[0-9a-f]{32}")
PAGES: Final = (".html", ".htm")
COLUMN: Final = 18  # what a run needs of a terminal's width
UNKNOWN: Final = "-"
TITLES: Final = {HELDOUT: "held-out loss"}
IDENTITY: Final = ("run.dir",)  # what names a run is no parameter of it

Row = tuple[str, list[str]]


def stores(uri: str | None, folders: Sequence[Path]) -> list[str]:
    """Where MLflow run ids are looked up: what is named, else by the environment, else beside the run folders."""
    if uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return [resolve_uri(uri or "auto", Path()) or ""]
    beside = [store_beside(path) for path in (*folders, Path("run"), Path("runs/run"))]
    return list(dict.fromkeys(f"sqlite:///{path}" for path in beside if path.is_file()))


def runs_in(name: str) -> list[str]:
    """The folders of the runs in a folder that is none itself, such as a sweep's; else the name as it is."""
    folder = Path(name)
    inside = [] if (folder / LOG).exists() else sorted(str(log.parent) for log in folder.glob(f"*/{LOG}"))
    return inside or [name]


def read_runs(names: Sequence[str], uri: str | None = None) -> list[History]:
    """The runs, each by its folder, one that holds several, or its MLflow id.

    Raises UserError for what is none of these, and for a run given twice.
    """
    names = [run for name in names for run in runs_in(name)]
    if len(names) < 2:
        raise UserError(f"compare takes two runs or more, not {len(names)}: run folders or MLflow run ids")
    folders = [Path(name) for name in names if Path(name).is_dir()]
    runs: list[History] = []
    for name in names:
        if Path(name).is_dir():
            run = read_folder(Path(name))
        elif RUN_ID.fullmatch(name):
            where = stores(uri, folders)
            if not where:
                raise UserError(f"{name}: no MLflow store is known to look it up in; name one with --uri")
            run = read_mlflow(name, where)
        else:
            raise UserError(f"{name} is no run: no such folder, and an MLflow run id has 32 hexadecimal digits")
        for other, known in zip(names, runs, strict=False):
            if _same(known, run):
                raise UserError(f"{other} and {name} are the same run; give each once")
        runs.append(run)
    return runs


def _same(one: History, other: History) -> bool:
    """A copied folder has the key of the first one, but may have gone on alone."""
    found = one.key is not None and one.key == other.key
    return one.origin == other.origin or (found and not (one.is_folder and other.is_folder))


def names_of(runs: Sequence[History]) -> list[str]:
    """The shortest names that tell the runs apart."""
    lengths = [0] * len(runs)
    while True:
        names = [run.labels[at] for run, at in zip(runs, lengths, strict=True)]
        longer = [at + 1 if names.count(name) > 1 and at + 1 < len(run.labels) else at
                  for run, at, name in zip(runs, lengths, names, strict=True)]  # fmt: skip
        if longer == lengths:
            return names
        lengths = longer


def _parameters(run: History) -> dict[str, Any]:
    return {key: redact(value) if isinstance(value, str) else value
            for key, value in run.params.items() if key not in IDENTITY}  # fmt: skip


def differing(runs: Sequence[History]) -> dict[str, list[str | None]]:
    """The parameters that differ, with each run's value as text; None where a run has no such key."""
    columns = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in _parameters(run).items()}
               for run in runs]  # fmt: skip
    keys = dict.fromkeys(key for column in columns for key in column)
    known = [column for column in columns if column]  # a run without a configuration differs in nothing that is known
    differ = [key for key in keys if len({column.get(key) for column in known}) > 1]
    return {key: [column.get(key) for column in columns] for key in differ}


def window_means(values: Floats, window: int = WINDOW) -> Floats:
    """The mean of each ``window`` values in a row (of all where there are fewer), without those that are not finite."""
    window = min(window, len(values))
    finite = np.isfinite(values)
    totals = np.cumsum([0.0, *np.where(finite, values, 0.0)])
    counts = np.cumsum([0, *finite])
    with np.errstate(invalid="ignore"):
        return (totals[window:] - totals[:-window]) / (counts[window:] - counts[:-window]) if window else values


def metrics(run: History) -> dict[str, dict[str, float]]:
    """The last and the best of the loss, the held-out loss and each probe, with their steps."""
    found: dict[str, dict[str, float]] = {}
    means = window_means(run.loss)
    if len(means):
        ends = run.steps[len(run.steps) - len(means) :]
        found["loss"] = _summary(ends.tolist(), means.tolist(), min)
    for name, points in sorted(run.points.items(), key=lambda item: (item[0] != HELDOUT, item[0])):
        steps, values = by_step(points)
        found[name] = _summary(steps.tolist(), values.tolist(), min if is_loss(name) or name == "mean_cosine" else max)
    return found


def _summary(steps: Sequence[float], values: Sequence[float], best: Callable[..., Any]) -> dict[str, float]:
    finite = [pair for pair in zip(values, steps, strict=True) if np.isfinite(pair[0])]
    value, step = best(finite, key=lambda pair: pair[0]) if finite else (float("nan"), steps[-1])
    return {"last": values[-1], "last_step": int(steps[-1]), "best": value, "best_step": int(step)}


def _number(value: Any, form: str = ",") -> str:
    return UNKNOWN if value is None else f"{value:{form}}"


def _small(value: float | None) -> str:
    return _number(value, ",.1f" if value is not None and value >= 100 else ".3g")


def _changes(values: Sequence[Any] | None) -> str:
    return UNKNOWN if values is None else ", then ".join(UNKNOWN if value is None else str(value) for value in values)


def _of_gpus(run: History) -> str:
    return " (GPU-hours)" if run.facts["process_hours"] is not None and on_gpus(run) else ""


def describe(run: History) -> dict[str, str]:
    """What a run is, for people."""
    facts = run.facts
    step, total = _number(facts["step"]), facts["total_steps"]
    return {
        "run": run.origin,
        "method": facts["method"] or UNKNOWN, "model": facts["model"] or UNKNOWN,
        "step": step if total is None else f"{step} of {total:,}",
        "images seen": _number(facts["images"], ",.0f"), "FLOPs so far": _number(facts["flops"], ".3g"),
        "engine": _changes(facts["engine"]), "processes": _changes(facts["processes"]),
        "precision": _changes(facts["precision"]), "device": _changes(facts["device"]),
        "hours trained": _small(facts["hours"]), "process-hours": _small(facts["process_hours"]) + _of_gpus(run),
        "images/s (median)": _small(facts["images_per_s"]), "restarts": _number(facts["restarts"]),
        "roll-backs": _number(facts["rollbacks"]), "skipped steps": _number(facts["skipped"]),
        "ended": " ".join((facts["ended"] or UNKNOWN).split())[:200], "MLflow run": facts["mlflow"] or UNKNOWN,
    }  # fmt: skip


def _at(name: str, value: float, step: float) -> str:
    return f"{value:{'.4g' if name == 'loss' or is_loss(name) else '.2f'}} ({int(step):,})"


def _score(name: str, found: Mapping[str, float], which: str) -> str:
    return _at(name, found[which], found[f"{which}_step"])


def _metric_rows(runs: Sequence[History]) -> Iterator[Row]:
    columns = [metrics(run) for run in runs]
    for name in dict.fromkeys(["loss", HELDOUT, *sorted(name for column in columns for name in column)]):
        if not any(name in column for column in columns) and name != "loss":
            continue
        title = TITLES.get(name, name)
        alike = name not in ("loss", HELDOUT) and all(column[name]["last"] == column[name]["best"] for column in columns
                                                      if name in column)  # fmt: skip
        for which in ("last",) if alike else ("last", "best"):
            cells = [_score(name, column[name], which) if name in column else UNKNOWN for column in columns]
            chosen = " (chosen on data.val)" if which == "best" and name.startswith(("val_", "online_")) else ""
            yield f"{title}, {which}{chosen}", cells


def _equal_rows(runs: Sequence[History]) -> Iterator[Row]:
    for budget in at_equal_compute(runs):
        amount = f"{budget.amount:,.0f}" if budget.axis in ("steps", "images") else f"{budget.amount:.3g}"
        unit = axis_label(budget.axis, runs).removesuffix(" so far").removesuffix(" seen")
        for name, cells in budget.found.items():
            yield (
                f"{TITLES.get(name, name)} within {amount} {unit}",
                [UNKNOWN if cell is None else _at(name, *cell) for cell in cells],
            )


def notes(runs: Sequence[History]) -> list[str]:
    """What to know when reading the tables."""
    lines = [
        f"loss: means of {WINDOW} training lines, the last and the lowest; probes: top-1 %, the latest of a step; at (step)"
    ]
    lines.append("at equal compute: as much as the run with the least had, each with its last loss and probes until then; "
                 "FLOPs are of training alone, hours also of what is evaluated meanwhile, not of probes afterwards")  # fmt: skip
    for name, run in zip(names_of(runs), runs, strict=True):
        lines += [f"{name}: {probe} was measured with {', '.join(f'{key}={value}' for key, value in settings.items())}"
                  for probe, settings in run.changed.items()]  # fmt: skip
    if any(isinstance(run.params.get("method.init"), str) for run in runs):
        lines.append("what fine-tuning cost is without its pretraining's")
    if any(key.startswith("method.") for key in differing(runs)):
        lines.append("losses of different methods or targets have no common scale: compare probes")
    if not all(run.is_folder for run in runs):
        lines.append("of a run in MLflow only settings and metrics are known; `patchmill sync` sends it the probes")
    return lines


def tables(runs: Sequence[History]) -> list[tuple[str, list[Row]]]:
    """(title, rows) of each table; a row has a cell a run."""
    parameters = [(key, [value or UNKNOWN for value in values]) for key, values in differing(runs).items()]
    described = [describe(run) for run in runs]
    facts = [(key, [column[key] for column in described]) for key in described[0]]
    return [("parameters that differ", parameters), ("runs", facts), ("metrics", list(_metric_rows(runs))),
            ("at equal compute", list(_equal_rows(runs)))]  # fmt: skip


def show(runs: Sequence[History], console: Console) -> None:
    """Print the tables; on a terminal as many runs side by side as fit, elsewhere all, plain."""
    names, terminal = names_of(runs), console.is_terminal
    fit = max(2, console.width // COLUMN - 2) if terminal else len(runs)
    for title, rows in tables(runs):
        for first in range(0, len(runs), fit):
            part = slice(first, first + fit)
            table = Table(title=title, title_justify="left", box=HEAVY_HEAD if terminal else None, pad_edge=terminal)
            table.add_column("", no_wrap=True)
            for name in names[part]:
                table.add_column(Text(name), overflow="fold")
            for heading, cells in rows:
                table.add_row(heading, *(Text(cell) for cell in cells[part]))
            if not rows:
                table.add_row("none")
            console.print(table)
            console.print()
    for line in notes(runs):
        console.print(Text(line))


def to_dict(runs: Sequence[History]) -> dict[str, Any]:
    """All of it as numbers: null is what is not known."""
    names = names_of(runs)
    columns = [_parameters(run) for run in runs]
    parameters = {key: {name: column[key] for name, column in zip(names, columns, strict=True) if key in column}
                  for key in differing(runs)}  # fmt: skip
    entries = [{"name": name, "run": run.origin, **run.facts, "metrics": metrics(run), "changed": run.changed}
               for name, run in zip(names, runs, strict=True)]  # fmt: skip
    budgets = [{"axis": budget.axis, "amount": budget.amount, "found": {
        measure: {name: {"value": cell[0], "step": cell[1]} for name, cell in zip(names, cells, strict=True) if cell}
        for measure, cells in budget.found.items()}} for budget in at_equal_compute(runs)]  # fmt: skip
    return {"parameters": parameters, "runs": entries, "equal_compute": budgets}


def compare(names: Sequence[str], uri: str | None, out: Path | None, json_file: Path | None,
            html: Path | None = None) -> None:  # fmt: skip
    """Print the runs side by side; ``out`` gets a figure, ``html`` a page, ``json_file`` all as numbers. Raises UserError."""
    require_writable(out, "--out", FIGURES)
    require_writable(html, "--html", PAGES)
    require_writable(json_file, "--json")
    if html is not None and html == json_file:
        raise UserError(f"--html, --json: are both {html}; name two files")
    runs = read_runs(names, uri)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=10_000)
    show(runs, console)
    if json_file is not None:
        write_asked(json_file, to_json(to_dict(runs), indent=1).encode() + b"\n", "--json")
    if out is not None:
        from pipeline.compare_figure import draw, encode

        write_asked(out, encode(draw(runs, names_of(runs)), out.suffix.lower()), "--out")
        console.print(Text(f"drawn in {out}"))
    if html is not None:
        from pipeline.compare_page import page

        names = names_of(runs)
        write_asked(html, page(runs, names, tables(runs), notes(runs)).encode(), "--html")
        console.print(Text(f"a page is in {html}"))
