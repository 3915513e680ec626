"""A fine-tuned classifier at several drop ratios: accuracy, multiply-adds and speed (PCAE's table 5)."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from pipeline.asked import write_asked
from pipeline.check import require_same_classes
from pipeline.config import Config, UserError
from pipeline.estimate import flops_per_image
from pipeline.eval_settings import FinetuneConfig
from pipeline.evaluate.accuracy import count
from pipeline.metrics import Progress, device_name
from pipeline.runlog import LOG, add_line
from pipeline.runs import is_training, open_images, restore
from pipeline.vit import normalise

TIMED: Final = 5  # batches; the median counts


@dataclass(frozen=True)
class Row:
    """One ratio: multiply-adds of an image in 10^9, top-1 in percent, images a second of the forward pass."""

    ratio: float
    gmacs: float
    top1: float
    images_per_s: float


@dataclass(frozen=True)
class CompressionReport:
    """What was found, a row a ratio; ``trained``: the ratio of fine-tuning."""

    rows: list[Row]
    trained: float
    num_images: int
    device: str

    def __str__(self) -> str:
        """A table for people."""
        lines = [f"fine-tuned with drop ratio {self.trained:g}; {self.num_images} images; forward pass on {self.device}",
                 f"{'ratio':>6}{'GMACs':>9}{'top-1 %':>9}{'images/s':>10}"]  # fmt: skip
        lines += [f"{row.ratio:>6g}{row.gmacs:>9.3f}{row.top1:>9.2f}{row.images_per_s:>10.1f}" for row in self.rows]
        return "\n".join(lines)


def at_ratio(cfg: Config, ratio: float) -> Config:
    """The same classifier with another drop ratio. Raises UserError for one that leaves no patch."""
    assert isinstance(cfg.method, FinetuneConfig)
    changed = cfg.model_copy(update={"method": cfg.method.model_copy(update={"drop_ratio": ratio})})
    from pipeline.method_checks import check_method

    problems = list(check_method(changed))
    if problems:
        raise UserError("; ".join(problems))
    return changed


def compression(run_dir: Path, ratios: Sequence[float], weights: str = "model") -> CompressionReport:
    """Test a fine-tuned run's classifier on data.val at each ratio; writes an eval line to its log.

    Raises UserError for a run that is no fine-tuning, has no checkpoint or no validation images, or for a ratio that
    leaves no patch.
    """
    run_dir = Path(run_dir).resolve()
    restored = restore(run_dir, weights)
    cfg = restored.cfg
    if not isinstance(cfg.method, FinetuneConfig):
        raise UserError(
            f"{run_dir}: is a pretraining, which has no classifier; fine-tune it: patchmill eval finetune {run_dir}"
        )
    settings = {ratio: at_ratio(cfg, ratio).method for ratio in dict.fromkeys(ratios)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = restored.method.to(device).eval()

    def logits(images: Tensor, ratio: float) -> Tensor:
        from pipeline.methods.finetune import classify

        drops = settings[ratio].drops(cfg.shape.depth)
        return classify(method.encoder, normalise(images), None, drops, ratio)[0]

    correct, seconds = dict.fromkeys(settings, 0), {ratio: list[float]() for ratio in settings}
    if cfg.data.train is not None and Path(cfg.data.train).exists():  # it need not be there any more
        require_same_classes(cfg)
    with contextlib.closing(open_images(cfg, "val", augment=False)) as loader, torch.inference_mode():
        if loader.num_classes != cfg.method.num_classes:
            raise UserError(f"data.val = {cfg.data.val}: has {loader.num_classes} classes, the classifier "
                            f"{cfg.method.num_classes}; give images of its training's classes")  # fmt: skip
        ids, size = np.arange(loader.num_samples), cfg.eval.batch_size
        order = ((0, ids[start : start + size]) for start in range(0, len(ids), size))
        with loader.batches(order, device) as batches, Progress("eval compression", len(ids), "image") as progress:
            for number, batch in enumerate(batches):
                images, labels = batch.images.to(device), batch.labels.to(device)
                for ratio in settings if number == 0 else ():
                    logits(images, ratio)  # not timed: the first pass of each makes buffers and chooses kernels
                for ratio in settings:
                    began = _now(device)
                    found = count(logits(images, ratio), labels)
                    if number < TIMED:
                        seconds[ratio].append((_now(device) - began) / len(labels))
                    correct[ratio] += int(found["top1"])
                progress.update(min(len(ids), (number + 1) * size))
    rows = [Row(ratio, flops_per_image(at_ratio(cfg, ratio)).forward / 2e9, 100 * correct[ratio] / len(ids),
                1 / statistics.median(seconds[ratio])) for ratio in settings]  # fmt: skip
    report = CompressionReport(rows, cfg.method.drop_ratio, len(ids), device_name(device))
    add_line(run_dir / LOG, "eval", mends=not is_training(run_dir), step=restored.step, weights=weights,
             compression=[asdict(row) for row in rows])  # fmt: skip
    return report


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def draw(report: CompressionReport, out: Path) -> None:
    """Accuracy against multiply-adds, as a picture. Raises UserError where it cannot be written."""
    from matplotlib.figure import Figure

    from pipeline.compare_figure import encode

    figure = Figure(figsize=(5, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([row.gmacs for row in report.rows], [row.top1 for row in report.rows], "o-", color="#0072b2")
    for row in report.rows:
        axes.annotate(
            f"drop {row.ratio:g}", (row.gmacs, row.top1), textcoords="offset points", xytext=(4, -10), fontsize=8
        )
    axes.set_xlabel("multiply-adds of an image, 10⁹")
    axes.set_ylabel(f"top-1 on {report.num_images} images, %")
    axes.set_title(f"tokens dropped at inference; fine-tuned with {report.trained:g}", fontsize=9)
    axes.margins(x=0.12)
    write_asked(out, encode(figure, out.suffix.lower()), "--out")
