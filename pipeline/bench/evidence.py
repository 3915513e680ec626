"""What `patchmill bench evidence` runs: the rows of ``configs/evidence`` with their probes, each with every seed.

A row that is cheaper than RandSAC's squares an image is there twice: for as many images, and for as many FLOPs.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pipeline.bench.evidence_data import SPLITS, packed
from pipeline.config import CONFIG_DIR, Config, UserError, binding_differences, find_config, load_config
from pipeline.estimate import flops_per_image
from pipeline.order import Plan
from pipeline.runlog import CHANGED, LOG, Record, read_whole

REFERENCE: Final = "randsac_square"  # what "as many FLOPs" means
COMPRESSED: Final = "pcae_similarity"  # is fine-tuned too, and tested at several drop ratios
EQUAL_FLOPS: Final = ("mae", "pcae_similarity")
# What `eval` is given, and the name in the log. The exact regression sees the last block's mean alone, as RandSAC's own probe; the
# heads may choose a pooling of several blocks, with which an untrained encoder is good too.
PROBES: Final = {
    "knn": (("knn",), "knn"),
    "linear": (("linear",), "linear_heads"),
    "exact": (("linear", "--exact"), "linear"),
}
CONFIG, WHY = "config.yaml", "why_stopped.json"  # of a run folder, without pipeline.runs and its torch

# For forecasts. Measured on a core of a busy AMD EPYC (Zen 4), vit_p on CIFAR-10: FLOP that a CPU second of training does (in
# images: MAE 620, PCAE 630, RandSAC 230), and CPU seconds of a start and of a probe of 50,000 + 10,000 images.
RATES: Final = {"mae": 6.0e10, "pcae": 5.4e10, "randsac": 5.6e10}
START_S: Final = 12
PROBE_S: Final = {"knn": 75, "linear": 35, "exact": 15}
FINETUNE_S: Final = 330  # by its FLOPs
COMPRESSION_S: Final = 60


@dataclass(frozen=True)
class Command:
    """One process of a run: its name, the words of `patchmill`, expected CPU seconds, and whether it has done its work."""

    name: str
    words: tuple[str, ...]
    cpu_s: float
    done: Callable[[], bool]

    def __str__(self) -> str:
        """As a user would type it."""
        return shlex.join(["patchmill", *self.words])


@dataclass(frozen=True)
class Row:
    """A line of the table: a configuration by its name and what is changed in it, without seed and paths."""

    name: str
    config: str
    changes: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """The words of `patchmill train`."""
        return self.config, *self.changes


@dataclass(frozen=True)
class Run:
    """A row with a seed. ``others``: weights that are probed here besides the trained ones: untrained, pixels."""

    row: Row
    seed: int
    folder: Path
    words: tuple[str, ...]
    cfg: Config
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the run and of its folder."""
        return self.folder.name

    @property
    def steps(self) -> int:
        """How long it is."""
        return num_steps(self.cfg)

    @property
    def images(self) -> int:
        """How many it sees, repetitions counted."""
        return self.steps * self.cfg.train.global_batch

    @property
    def flops(self) -> float:
        """What it costs to train."""
        return self.images * flops_per_image(self.cfg).step

    def records(self) -> list[Record]:
        """The whole lines of its log."""
        return read_whole(self.folder / LOG)[0]

    def trained(self) -> bool:
        """Whether it has come to its end, with these settings."""
        return _ended(self.folder) and not binding_differences(load_config([self.folder / CONFIG]), self.cfg)

    @property
    def encoder(self) -> str:
        """What the untrained encoders that compare with this one have in common with it: method, size, patch."""
        return f"{self.cfg.method.name} {self.cfg.model.name}/{self.cfg.shape.patch_size}"

    def check(self) -> None:
        """Raises UserError when the folder holds a run of other settings, whose results are not this one's."""
        path = self.folder / CONFIG
        if path.is_file() and self.records() and (other := binding_differences(load_config([path]), self.cfg)):
            raise UserError(f"--folder {self.folder.parent}: {self.name} has other settings there: {'; '.join(other)}; give the "
                            "changes of that queue (key=value), or another --folder")  # fmt: skip

    def score(self, probe: str, weights: str) -> float | None:
        """Top-1 in percent that a probe has found with the run's own settings, the newest; of trained weights at its end only."""
        name, step = f"{PROBES[probe][1]}_{weights}", self.steps if weights == "model" else 0
        found = [line[name] for line in self.records()
                 if line["kind"] == "eval" and line.get("step") == step and name in line and CHANGED not in line]  # fmt: skip
        return found[-1] if found else None

    def _probe(self, probe: str, weights: str) -> Command:
        words = ["eval", *PROBES[probe][0], str(self.folder), "--weights", weights]
        return Command(
            f"{probe} {weights}", tuple(words), PROBE_S[probe], lambda: self.score(probe, weights) is not None
        )

    @property
    def classifier(self) -> Path:
        """The folder of its fine-tuning."""
        return self.folder / "finetune"

    def compression(self) -> list[Record]:
        """What `eval compression` has found last: ratio, gmacs, top1 and images_per_s of each drop ratio."""
        found = [line["compression"] for line in read_whole(self.classifier / LOG)[0] if "compression" in line]
        return found[-1] if found else []

    def _compress(self) -> list[Command]:
        tune = ("eval", "finetune", str(self.folder), "train.epochs=2")
        test = ("eval", "compression", str(self.classifier))
        return [Command("fine-tune", tune, FINETUNE_S, lambda: _ended(self.classifier)),
                Command("compression", test, COMPRESSION_S, lambda: bool(self.compression()))]  # fmt: skip

    def commands(self) -> list[Command]:
        """In the order in which they are run."""
        seconds = START_S + self.flops / RATES[self.cfg.method.name]
        train = Command("train", ("train", *self.words), seconds, self.trained)
        probes = [self._probe(probe, weights) for weights in ("model", *self.others) for probe in PROBES]
        return [train, *probes, *(self._compress() if self.row.name == COMPRESSED else [])]


def _ended(folder: Path) -> bool:
    """Whether a run has come to its end there."""
    try:
        return bool(json.loads((folder / WHY).read_text())["done"])
    except (OSError, ValueError, KeyError):
        return False


def num_steps(cfg: Config) -> int:
    """The length of a run on CIFAR-10, or on generated images. Raises UserError when its warm-up is longer."""
    return Plan.of(cfg, cfg.data.num_samples if cfg.data.loader == "synthetic" else SPLITS["train"]).total_steps


def _configure(row: Row, *words: str) -> Config:
    overrides = [f"run.dir={row.name}", *row.changes, *words]
    return load_config(
        [row.config], [*overrides, *([] if "data.loader=synthetic" in overrides else ["data.train=train.beton"])]
    )


def _as_many_flops(row: Row, reference: Config) -> Row:
    """The same row, trained for as many FLOPs as ``reference``, with as large a part of it as warm-up."""
    cfg = _configure(row)
    budget = num_steps(reference) * reference.train.global_batch * flops_per_image(reference).step
    steps = round(budget / flops_per_image(cfg).step / cfg.train.global_batch)
    warmup = round((cfg.optim.warmup_steps or 0) * steps / num_steps(cfg))
    changes = "train.epochs=null", f"train.steps={steps}", f"optim.warmup_steps={warmup}"
    return Row(f"{row.name}_equal_flops", row.config, (*row.changes, *changes))


def rows(only: Sequence[str] = (), changes: Sequence[str] = ()) -> list[Row]:
    """Those of ``configs/evidence``, or of them and of all other configurations what ``only`` names.

    ``changes``: settings of every row. Raises UserError for a name that is neither.
    """
    shipped = [path.stem for path in sorted((CONFIG_DIR / "evidence").glob("*.yaml"))]
    longer = {f"{name}_equal_flops": name for name in EQUAL_FLOPS}

    def row(name: str) -> Row:
        if name in shipped:
            return Row(name, f"evidence/{name}", tuple(changes))
        if name in longer:
            return _as_many_flops(row(longer[name]), _configure(row(REFERENCE)))
        if "/" not in name and not Path(name).is_file():
            raise UserError(
                f"--only {name}: no such row; there are {', '.join([*shipped, *longer])}, and every configuration by name"
            )
        find_config(name)
        return Row(Path(name).stem if Path(name).is_file() else name.replace("/", "_"), name, tuple(changes))

    return [row(name) for name in dict.fromkeys(only or [*shipped, *longer])]


def plan(folder: Path, chosen: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
    """All runs, seed by seed, so that what is there after half of the time is half of every row.

    An untrained encoder is probed once with each seed, raw pixels once. Raises UserError for two rows of one name.
    """
    runs: list[Run] = []
    seen: set[tuple[str, int]] = set()
    names = [row.name for row in chosen]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--only: two rows would be called {twice[0]} and share their folders; rename one's file")
    for seed in seeds:
        for row in chosen:
            run, data = folder / f"{row.name}-seed{seed}", folder / "data"
            words = [*row.settings, f"train.seed={seed}", f"run.dir={run}"]
            if _configure(row).data.loader != "synthetic":
                words += [f"data.train={data / 'train.beton'}", f"data.val={data / 'test.beton'}"]
            cfg = load_config([row.config], words[1:])
            alone = Run(row, seed, run, tuple(words), cfg, ())
            others = () if (alone.encoder, seed) in seen else ("untrained",) if seen else ("untrained", "pixels")
            seen.add((alone.encoder, seed))
            runs.append(replace(alone, others=others))
    return runs


def parse_seeds(text: str) -> list[int]:
    """``0,1`` as numbers. Raises UserError for anything else."""
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: write whole numbers with commas, such as 0,1") from None


def describe(folder: Path, runs: Sequence[Run], jobs: int) -> str:
    """Every command with what it is expected to cost, and the sum of those that are not done."""
    lines, total = [], 0.0
    if any(run.cfg.data.loader != "synthetic" for run in runs) and not packed(folder / "data"):
        lines.append("     30 s  pack CIFAR-10")
        total += 30
    for run in runs:
        for command in run.commands():
            if command.done():
                lines.append(f"     done  {command}")
            else:
                lines.append(f"{command.cpu_s:7.0f} s  {command}")
                total += command.cpu_s
    cores = len(os.sched_getaffinity(0))
    lines.append(f"expected: {total / 3600:.2f} hours of CPU; {total / 3600 / min(jobs, cores):.2f} hours with {jobs} at a time, "
                 f"on {cores} cores that do nothing else")  # fmt: skip
    return "\n".join(lines)


def command_line(command: Command) -> list[str]:
    """What starts it."""
    return [sys.executable, "-m", "pipeline", *command.words]
