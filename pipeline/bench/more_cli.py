"""The verbs `bench loop` and `bench tracking`: to functions, nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Rounds = Annotated[int, typer.Option(help="Interleaved rounds, at least 8; more calm the figures.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Also write the rows there, with hardware and versions.")
]


def _report(rows: Sequence[Any], out: Path | None, **facts: str) -> None:
    from pipeline.bench.report import write_report

    for row in rows:
        typer.echo(str(row))
    if out is not None:
        write_report(out, rows, statistic="fastest of the rounds", **facts)


def loop(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run.")] = 2000,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """CPU time that the trainer's loop adds to a bare PyTorch loop: microseconds a step, one thread, interleaved.

    Example: patchmill bench loop --out loop.json
    """
    from pipeline.bench.loop import run
    from pipeline.bench.report import check_out
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench loop", None, "run") as progress:
        rows = run(steps, rounds=rounds, progress=progress.update)
    _report(rows, out)


def tracking(
    steps: Annotated[int, typer.Option(min=1, help="Logged steps of a run.")] = 400,
    rounds: Rounds = 8,
    out: Out = None,
) -> None:
    """What a logged step costs with MLflow on sqlite, ours and one call a step: CPU time and how long training waits.

    Example: patchmill bench tracking --out tracking.json
    """
    from importlib.metadata import version

    from pipeline.bench.report import check_out
    from pipeline.bench.tracking import run
    from pipeline.metrics import Progress

    check_out(out)
    with Progress("bench tracking", None, "run") as progress:
        rows = run(steps, rounds=rounds, progress=progress.update)
    _report(rows, out, mlflow=version("mlflow"))


def register(bench: typer.Typer) -> None:
    """Add the verbs to ``patchmill bench``."""
    for verb in (loop, tracking):
        bench.command()(verb)
