"""Seeds that ran elsewhere: the reports of several queues as one."""

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from pydantic import TypeAdapter, ValidationError

from pipeline.bench.evidence import COMPRESSED, PROBES, Run
from pipeline.bench.evidence_report import PIXELS, Compressed, EvidenceRow, Score, untrained, with_gains
from pipeline.config import UserError

WHERE: Final = (
    "command",
    "date",
    "hardware",
    "load_average",
    "versions",
    "trained_with",
)  # of a report: how it came about


@dataclass(frozen=True)
class Report:
    """What `--out` has written: rows, the compression's, the seeds, and where they were measured."""

    rows: list[EvidenceRow]
    compression: list[Compressed]
    seeds: list[int]
    where: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises UserError when it cannot be read or is no report of the evidence."""
        try:
            found = json.loads(path.read_text())
            rows = TypeAdapter(list[EvidenceRow]).validate_python(found["rows"])
            if any(set(row.scores) != set(PROBES) for row in rows):
                raise ValueError("other probes")
            return cls(
                rows,
                TypeAdapter(list[Compressed]).validate_python(found["compression"]),
                TypeAdapter(list[int]).validate_python(found["seeds"]),
                {name: found[name] for name in WHERE},
            )
        except OSError as error:
            raise UserError(f"--with {path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, ValidationError):
            raise UserError(f"--with {path}: is no report that `patchmill bench evidence --out` has written") from None

    def lacks(self, run: Run) -> bool:
        """Whether something that ``run`` finds out is not there: a probe of its own or of what it is compared with, its classifier.

        Raises UserError when its row was run with other settings: before hours of work that do not fit.
        """
        there = {row.name: row for row in self.rows}
        row = there.get(run.row.name)
        if row is None:
            return True
        if (row.settings, row.images, row.flops) != (list(run.row.settings), run.images, run.flops):
            raise UserError(
                f"--with: {row.name} was run with other settings there: {shlex.join(row.settings)}, {row.images} images; "
                f"not {shlex.join(run.row.settings)}, {run.images} images"
            )
        names = {"model": row.name, "untrained": untrained(run.encoder), "pixels": PIXELS}
        needed = [there.get(names[weights]) for weights in ("model", *run.others)]
        scores = [score for one in needed for score in (one.scores.values() if one else [Score.of({})])]
        if run.row.name == COMPRESSED:
            scores.append(self.compression[0].top1 if self.compression else Score.of({}))
        return any(run.seed not in score.by_seed for score in scores)


def _joined(own: dict[str, Score], other: dict[str, Score]) -> dict[str, Score]:
    """By probe. A seed that is in both is ours."""
    return {probe: Score.of(other[probe].by_seed | score.by_seed) for probe, score in own.items()}


def _cpu_s(own: EvidenceRow, other: EvidenceRow) -> float | None:
    """A mean weighted by the number of seeds; None where one is not known."""
    if own.cpu_s is None or other.cpu_s is None:
        return None
    seeds = [max(len(score.by_seed) for score in row.scores.values()) for row in (own, other)]
    return statistics.fmean([own.cpu_s, other.cpu_s], seeds)


def merged(own: Sequence[EvidenceRow], other: Report) -> list[EvidenceRow]:
    """``own`` rows with the seeds of ``other``; what only one has stays as it is there. First the trained ones."""
    there = {row.name: row for row in other.rows}
    rows = []
    for row in own:
        if (more := there.pop(row.name, None)) is not None:
            row = replace(row, cpu_s=_cpu_s(row, more), scores=_joined(row.scores, more.scores))
        rows.append(row)
    rows.extend(there.values())
    return with_gains(sorted(rows, key=lambda row: (not row.images, row.encoder is None)))


def merged_compression(own: Sequence[Compressed], other: Report) -> list[Compressed]:
    """The same for the drop ratios; images a second are a mean over the seeds."""
    found = {row.ratio: row for row in other.compression}
    for row in own:
        if (more := found.get(row.ratio)) is not None:
            seeds = [len(one.top1.by_seed) for one in (row, more)]
            row = replace(
                row,
                top1=Score.of(more.top1.by_seed | row.top1.by_seed),
                images_per_s=statistics.fmean([row.images_per_s, more.images_per_s], seeds),
            )
        found[row.ratio] = row
    return [found[ratio] for ratio in sorted(found)]
