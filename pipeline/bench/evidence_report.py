"""What `patchmill bench evidence` has found: a table, the papers' orderings, and the same as JSON."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console
from rich.table import Table

from pipeline.bench.evidence import PROBES, Run
from pipeline.bench.evidence_queue import COSTS
from pipeline.config import UserError
from pipeline.estimate import flops_per_image
from pipeline.runlog import read_whole

PIXELS: Final = "raw pixels"
# Two standard errors of the difference of two accuracies near a half, of 10,000 test images each, in points.
NOISE: Final = 2 * math.sqrt(2) * 0.5
STARTS: Final = ("start", "resume")
# (what, where it comes from, the row that should be better, than which).
ORDERINGS: Final = (
    ("random order above raster", "RandSAC table 2, linear: 75.5 over 55.5", "randsac_random", "randsac_raster"),
    ("squares above single tokens", "RandSAC tables 2, 6: 82.5 over 75.5", "randsac_square", "randsac_random"),
    ("blobs above squares", "RandSAC table 7: 93.9 over 92.1", "randsac_blob", "randsac_square"),
    ("squares above MAE, equal epochs", "RandSAC table 7: 92.1 over 87.3", "randsac_square", "mae"),
    ("squares above MAE, equal FLOPs", "asked by reviewers, not in the paper", "randsac_square", "mae_equal_flops"),
    ("PCAE: by similarity above at random", "a question of ours", "pcae_similarity", "pcae_random"),
    ("PCAE above MAE, equal epochs", "a question of ours", "pcae_similarity", "mae"),
    ("squares above PCAE, equal FLOPs", "a question of ours", "randsac_square", "pcae_similarity_equal_flops"),
)


@dataclass(frozen=True)
class Score:
    """Top-1 in percent by seed, of the seeds that have one; ``spread`` is half of what lies between them."""

    by_seed: dict[int, float]
    mean: float | None
    spread: float | None

    @classmethod
    def of(cls, by_seed: dict[int, float]) -> Self:
        """With its mean and spread, which are None where no seed has one."""
        values = list(by_seed.values())
        return (
            cls(by_seed, statistics.fmean(values), (max(values) - min(values)) / 2) if values else cls({}, None, None)
        )

    def __str__(self) -> str:
        """For the table."""
        if self.mean is None or self.spread is None:
            return "-"
        return f"{self.mean:.2f} ± {self.spread:.2f}" if len(self.by_seed) > 1 else f"{self.mean:.2f}"


@dataclass(frozen=True)
class EvidenceRow:
    """A row, or what it is to be compared with: an untrained encoder or raw pixels, that no image has trained.

    ``encoder``: its method, size and patch. ``images`` and ``flops`` of one run's training; ``cpu_s``: CPU seconds of its
    training, the mean over seeds, None where a killed process has taken its part along. ``scores`` by probe; ``gains``:
    trained minus untrained, seed by seed.
    """

    name: str
    encoder: str | None
    settings: list[str]
    images: int
    flops_per_image: float
    flops: float
    cpu_s: float | None
    scores: dict[str, Score]
    gains: dict[str, Score]


@dataclass(frozen=True)
class Compressed:
    """PCAE's classifier at one drop ratio: multiply-adds of an image in 10^9, top-1, images a second (mean of the seeds)."""

    ratio: float
    gmacs: float
    top1: Score
    images_per_s: float


@dataclass(frozen=True)
class Ordering:
    """Whether one row was above another: the differences in points by probe and seed."""

    claim: str
    source: str
    above: str
    below: str
    differences: dict[str, dict[int, float]]

    @property
    def verdict(self) -> dict[str, str]:
        """By probe: seen or reversed where all seeds agree and their mean is more than the test images' noise, else open."""
        told = {}
        for probe, by_seed in self.differences.items():
            mean = statistics.fmean(by_seed.values()) if by_seed else 0.0
            agree = len({value > 0 for value in by_seed.values()}) == 1
            clear = agree and abs(mean) > NOISE / math.sqrt(len(by_seed))
            told[probe] = "not known" if not by_seed else "open" if not clear else "seen" if mean > 0 else "reversed"
        return told

    def __str__(self) -> str:
        """A line for people."""
        parts = []
        for probe, verdict in self.verdict.items():
            points = ", ".join(f"{value:+.2f}" for value in self.differences[probe].values())
            parts.append(f"{probe} {verdict}" + (f" ({points})" if points else ""))
        return f"{self.claim} ({self.source}): " + "; ".join(parts)


def _scores(runs: Sequence[Run], weights: str) -> dict[str, Score]:
    found = {}
    for probe in PROBES:
        scored = [(run.seed, run.score(probe, weights)) for run in runs]
        found[probe] = Score.of({seed: value for seed, value in scored if value is not None})
    return found


def _cpu_s(folder: Path, runs: Sequence[Run]) -> float | None:
    """The mean of the trainings that have ended; None when a process of one was killed and its part is not known."""
    costs = [line for line in read_whole(folder / COSTS)[0] if line["command"] == "train"]
    totals = []
    for run in (run for run in runs if run.trained()):
        total = 0.0
        for start in (line["time"] for line in run.records() if line["kind"] in STARTS):
            own = [
                line
                for line in costs
                if line["run"] == run.name and line["time"] - line["wall_s"] <= start <= line["time"]
            ]
            if not own:
                return None
            total += own[-1]["cpu_s"]
        totals.append(total)
    return statistics.fmean(totals) if totals else None


def _difference(above: Score, below: Score) -> dict[int, float]:
    return {seed: value - below.by_seed[seed] for seed, value in above.by_seed.items() if seed in below.by_seed}


def untrained(encoder: str | None) -> str:
    """The name of the row that a trained one is compared with."""
    return f"untrained {encoder}"


def with_gains(rows: Sequence[EvidenceRow]) -> list[EvidenceRow]:
    """The same rows, with what the trained ones have gained over their untrained encoder."""
    scores = {row.name: row.scores for row in rows}
    nothing = {probe: Score.of({}) for probe in PROBES}
    found = []
    for row in rows:
        bare = scores.get(untrained(row.encoder), nothing)
        gains = {probe: Score.of(_difference(row.scores[probe], bare[probe])) for probe in PROBES}
        found.append(replace(row, gains=gains) if row.images else row)
    return found


def summarise(folder: Path, runs: Sequence[Run]) -> list[EvidenceRow]:
    """The rows that have something to show, then the untrained encoders and raw pixels.

    Raises UserError when there is nothing yet, or a log is damaged.
    """
    by_row: dict[str, list[Run]] = {}
    by_encoder: dict[str, list[Run]] = {}
    for run in runs:
        by_row.setdefault(run.row.name, []).append(run)
        by_encoder.setdefault(run.encoder, []).append(run)
    rows = []
    for name, own in by_row.items():
        first, each = own[0], flops_per_image(own[0].cfg).step
        rows.append(EvidenceRow(name, first.encoder, list(first.row.settings), first.images, each, first.flops,
                                _cpu_s(folder, own), _scores(own, "model"), {}))  # fmt: skip
    for encoder, own in by_encoder.items():
        rows.append(EvidenceRow(untrained(encoder), encoder, [], 0, 0.0, 0.0, None, _scores(own, "untrained"), {}))
    rows.append(EvidenceRow(PIXELS, None, [], 0, 0.0, 0.0, None, _scores(runs, "pixels"), {}))
    rows = with_gains([row for row in rows if any(score.by_seed for score in row.scores.values())])
    if not rows:
        raise UserError(f"--folder {folder}: no run there has been probed yet; leave --report out to run them")
    return rows


def trained_with(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Device and versions of all that trained, each once: a report may be made elsewhere, later."""
    found = [{"device": line["device"], "versions": line["versions"]}
             for run in runs for line in run.records() if line["kind"] in STARTS and "versions" in line]  # fmt: skip
    return [one for number, one in enumerate(found) if one not in found[:number]]


def orderings(rows: Sequence[EvidenceRow]) -> list[Ordering]:
    """Of the rows that are there."""
    by_name = {row.name: row for row in rows}
    return [Ordering(claim, source, above, below, {probe: _difference(by_name[above].scores[probe], by_name[below].scores[probe])
                                                   for probe in PROBES})
            for claim, source, above, below in ORDERINGS if above in by_name and below in by_name]  # fmt: skip


def compressed(runs: Sequence[Run]) -> list[Compressed]:
    """A row a drop ratio, of the runs that were fine-tuned."""
    found: dict[float, dict[int, dict[str, float]]] = {}
    for run in runs:
        for line in run.compression():
            found.setdefault(line["ratio"], {})[run.seed] = line
    return [
        Compressed(
            ratio,
            next(iter(lines.values()))["gmacs"],
            Score.of({seed: line["top1"] for seed, line in lines.items()}),
            statistics.fmean(line["images_per_s"] for line in lines.values()),
        )
        for ratio, lines in found.items()
    ]


def image_set(rows: Sequence[EvidenceRow]) -> str:
    """What was learned and tested, as titles say it."""
    return "Generated images" if any("data.loader=synthetic" in row.settings for row in rows) else "CIFAR-10"


def table(rows: Sequence[EvidenceRow]) -> Table:
    """For the terminal."""
    seeds = sorted({seed for row in rows for score in row.scores.values() for seed in score.by_seed})
    spread = "means over seeds {} ± half their range" if len(seeds) > 1 else "seed {}"
    found = Table(title=f"{image_set(rows)}, top-1 %: {spread.format(', '.join(map(str, seeds)))}")
    found.add_column("row", no_wrap=True)
    for heading in ("images", "FLOPs", "CPU s", "kNN", "linear", "exact", "kNN gain", "linear gain", "exact gain"):
        found.add_column(heading, justify="right")
    for row in rows:
        cost = [f"{row.images}", f"{row.flops:.2e}", f"{row.cpu_s:.0f}" if row.cpu_s is not None else "?"]
        found.add_row(row.name, *(cost if row.images else ["", "", ""]), *(str(row.scores[probe]) for probe in PROBES),
                      *(str(row.gains[probe]) if row.gains else "" for probe in PROBES))  # fmt: skip
    return found


def show(rows: Sequence[EvidenceRow], ratios: Sequence[Compressed]) -> None:
    """Print the table, what became of the papers' orderings, and PCAE's compression."""
    console = Console(width=max(150, Console().width))
    console.print(table(rows))
    console.print("gain: trained minus the same encoder untrained, seed by seed. A figure's standard error from CIFAR-10's 10,000 "
                  "test images alone is 0.5 points.", soft_wrap=True, highlight=False)  # fmt: skip
    for ordering in orderings(rows):
        console.print(f"  {ordering}", soft_wrap=True, highlight=False)
    if ratios:
        console.print(
            "PCAE fine-tuned for 2 epochs without dropping, tested with: ratio, 10^6 multiply-adds, top-1 %, images/s"
        )
    for row in ratios:
        line = f"  {row.ratio:<5g}{1000 * row.gmacs:>8.1f}{row.top1!s:>16}{row.images_per_s:>10.0f}"
        console.print(line, highlight=False)
