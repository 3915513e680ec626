"""``patchmill scale`` from its points to table, figure and MLflow."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import UserError
from slurm import scale_table
from slurm.scale import INTERVAL, Batch, find, follow, queue, read_points, require_results, require_same


@dataclass(frozen=True)
class Choice:
    """Steps of a point and of its warm-up, what becomes of the batch, and what the estimate is told of the machine."""

    steps: int
    warmup: int
    batch: Batch
    stated: Mapping[str, float]

    @property
    def title(self) -> str:
        """What the numbers are."""
        kind = {
            "per-process": "weak scaling (the batch grows with the processes)",
            "fixed": "strong scaling (one batch for all)",
        }
        return f"{kind[self.batch]}, medians of steps {self.first} to {self.steps}"

    @property
    def first(self) -> int:
        """The first step that counts."""
        return -(-self.warmup // INTERVAL) * INTERVAL + 1


def scale(settings: Sequence[str], choice: Choice, out: Path | None, *, wait: bool) -> None:
    """Queue the points that need it, and print what is known of all; with a result also draw and track it.

    ``wait``: follow the jobs to their end first. Raises ConfigError before anything is queued, RunFailed when after a wait
    points have no result.
    """
    from rich.console import Console

    from pipeline.asked import require_writable

    require_writable(out, "--out")
    if choice.steps < choice.first + INTERVAL - 1:
        raise UserError(f"--steps {choice.steps}: leaves nothing to measure after --warmup {choice.warmup}; set it to "
                        f"{choice.first + INTERVAL - 1} or more")  # fmt: skip
    shared, points = read_points(settings, choice.steps, choice.batch)
    standings = find(points)
    require_same(standings)
    console = Console(width=None if sys.stdout.isatty() else 220, soft_wrap=True, highlight=False, markup=False)
    for line in queue(standings):
        console.print(line)
    standings = follow(points) if wait else find(points)
    rows = scale_table.compare([scale_table.row_of(one, choice.warmup, choice.stated) for one in standings])
    console.print(scale_table.table(rows, choice.title))
    for row in rows:
        if row.why:
            console.print(f"{row.point}: {row.why}")
    if out is not None:
        scale_table.report(out, rows, choice.title)
    if any(row.images_per_s for row in rows):
        folder = Path(shared.run.dir)
        files = _write(folder, rows, choice.title)
        console.print(f"drawn in {files[0]}")
        axes = {"steps": str(choice.steps), "batch": choice.batch, "points": " ".join(point.name for point in points)}
        scale_table.publish(folder, shared, rows, files, axes)
    if wait:
        require_results(standings)


def _write(folder: Path, rows: Sequence[scale_table.Row], title: str) -> list[Path]:
    """The figure and the table in the folder of the points."""
    from pipeline.compare_figure import encode
    from pipeline.runlog import replace_file
    from slurm.scale_figure import draw

    figure, table = folder / "scale.png", folder / "scale.json"
    replace_file(figure, encode(draw(rows, title), ".png"))
    scale_table.report(table, rows, title)
    return [figure, table]
