"""`patchmill bench evidence` from its options to its exit code."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from pipeline.asked import require_writable, write_asked
from pipeline.bench.evidence import Run, describe, parse_seeds, plan, rows
from pipeline.bench.evidence_data import find_images, image_sets, pack, packed
from pipeline.bench.evidence_merge import Report, merged, merged_compression
from pipeline.bench.evidence_queue import Outcome, Queue, locked
from pipeline.bench.evidence_report import Compressed, EvidenceRow, compressed, orderings, show, summarise, trained_with
from pipeline.bench.report import write_report
from pipeline.config import UserError
from pipeline.metrics import Progress, setup_logging
from pipeline.stop import StopRequest


@dataclass(frozen=True)
class Options:
    """Those of the command line, in its order."""

    changes: tuple[str, ...]
    folder: Path
    data: Path | None
    jobs: int
    seeds: str
    only: tuple[str, ...]
    minutes: float | None
    dry_run: bool
    report: bool
    out: Path | None
    others: tuple[Path, ...]


def _work(options: Options, runs: Sequence[Run]) -> Outcome:
    """Pack what is needed, then the queue."""
    with locked(options.folder):
        if any(run.cfg.data.loader != "synthetic" for run in runs) and not packed(options.folder / "data"):
            pack(find_images(options.data), options.folder / "data", options.jobs)
        queue = Queue(options.folder, runs, options.jobs)
        with StopRequest() as stop, Progress("evidence", None, "CPU s") as progress:
            return queue.work(stop, progress, options.minutes)


@dataclass(frozen=True)
class _Found:
    """What there is to show: of the queue's own runs, and of the reports of others."""

    rows: list[EvidenceRow]
    compression: list[Compressed]
    seeds: set[int]
    elsewhere: list[dict[str, Any]]  # where the others were measured


def _found(folder: Path, runs: Sequence[Run], others: Sequence[Report]) -> _Found:
    rows = summarise(folder, runs) if runs or not others else []
    ratios, seeds = compressed(runs), {run.seed for run in runs}
    for other in others:
        rows, ratios = merged(rows, other), merged_compression(ratios, other)
        seeds |= set(other.seeds)
    return _Found(rows, ratios, seeds, [other.where for other in others])


def _write(out: Path, found: _Found, runs: Sequence[Run], folder: Path) -> None:
    """The report and its figure."""
    from pipeline.bench.evidence_figure import draw
    from pipeline.compare_figure import encode

    told = [{"claim": one.claim, "source": one.source, "above": one.above, "below": one.below, "differences": one.differences,
             "verdict": one.verdict} for one in orderings(found.rows)]  # fmt: skip
    write_report(
        out,
        found.rows,
        seeds=sorted(found.seeds),
        trained_with=trained_with(runs),
        elsewhere=found.elsewhere,
        image_sets=image_sets(folder / "data"),
        orderings=told,
        compression=[asdict(row) for row in found.compression],
    )
    write_asked(out.with_suffix(".png"), encode(draw(found.rows), ".png"), "--out")


def run(options: Options) -> int:
    """Run what is not done, then say what was found; returns the exit code.

    Raises UserError for a wrong option, missing images, or a report of nothing.
    """
    setup_logging(None)
    require_writable(options.out, "--out", (".json",))  # the figure goes beside it as .png
    runs = plan(options.folder, rows(options.only, options.changes), parse_seeds(options.seeds))
    others = [Report.read(path) for path in options.others]
    runs = [run for run in runs if all(other.lacks(run) for other in others)]
    for run in runs:
        run.check()
    if options.dry_run:
        typer.echo(describe(options.folder, runs, options.jobs))
        return 0
    outcome = Outcome() if options.report else _work(options, runs)
    for line in outcome.failed:
        sys.stderr.write(f"failed: {line}\n")
    try:
        found = _found(options.folder, runs, others)
    except UserError:
        if options.report:
            raise
        return outcome.code
    show(found.rows, found.compression)
    if options.out is not None:
        _write(options.out, found, runs, options.folder)
    return outcome.code
