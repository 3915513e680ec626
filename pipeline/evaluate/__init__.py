"""Probes of a frozen encoder: kNN, linear heads and exact softmax regression."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.evaluate.heads import HeadsReport


@dataclass(frozen=True)
class ProbeReport:
    """Top-1 accuracy in percent of one probe on one set of weights; ``step`` is the checkpoint's, 0 for untrained.

    ``heads``: of linear_heads, what was trained and which one was chosen.
    """

    probe: str
    weights: str
    step: int
    top1: float
    num_train: int
    num_test: int
    heads: "HeadsReport | None" = None

    def __str__(self) -> str:
        """One line for people, below the table of heads."""
        table = f"{self.heads}\n" if self.heads else ""
        return (f"{table}{self.probe} {self.top1:.2f} % top-1 ({self.weights} weights of step {self.step}; {self.num_train} "
                f"images with labels, {self.num_test} tested)")  # fmt: skip


def probe(run_dir: Path, name: Literal["knn", "linear", "linear_heads"], weights: str = "model") -> ProbeReport:
    """Probe a run's encoder on its data.val, with the labels of data.train; writes an eval line to the run's log.

    ``name``: linear is the exact solution on the mean of patch tokens, linear_heads the best of many trained heads.
    ``weights``: model, ema, untrained, or pixels (no encoder: the images averaged to 32 px). Features are kept in the
    run folder. Raises UserError for a run without checkpoint or validation images.
    """
    from pipeline.check import require_same_classes
    from pipeline.evaluate.features import Features, cached, extract, pixels
    from pipeline.evaluate.heads import heads_accuracy
    from pipeline.evaluate.knn import knn_accuracy
    from pipeline.evaluate.linear import linear_accuracy
    from pipeline.runs import open_images, read_config, restore
    from pipeline.tracking import RunLog

    run_dir = Path(run_dir).resolve()
    cfg = read_config(run_dir)
    require_same_classes(cfg)
    restored = None if weights == "pixels" else restore(run_dir, weights)

    def features(which: Literal["train", "val"]) -> Features:
        with contextlib.closing(open_images(cfg, which, augment=False)) as loader:
            if restored is None:
                return pixels(loader, batch_size=cfg.eval.batch_size, device="cpu")
            pixels_of = f"{cfg.data.eval_crop} {cfg.data.loader} {cfg.data.decode} {cfg.data.resample}"
            key = {"weights": restored.identity, "image_set": loader.image_set, "pixels": pixels_of}
            path = run_dir / "features" / f"{weights}-{which}.safetensors"
            return cached(path, key, lambda: extract(restored.method.encoder, loader, batch_size=cfg.eval.batch_size,
                                                     device="cpu"))  # fmt: skip

    train, test = features("train"), features("val")
    classes, heads = int(train.labels.max()) + 1, None
    if name == "knn":
        top1 = knn_accuracy(train, test, num_classes=classes, k=cfg.eval.knn_k, temperature=cfg.eval.knn_temperature)
    elif name == "linear_heads":
        heads = heads_accuracy(train, test, num_classes=classes, lrs=cfg.eval.linear_lrs, epochs=cfg.eval.linear_epochs,
                               batch_size=cfg.eval.linear_batch, seed=cfg.train.seed)  # fmt: skip
        top1 = heads.top1
    else:
        top1 = linear_accuracy(train, test, num_classes=classes, l2=cfg.eval.linear_l2)
    report = ProbeReport(name, weights, restored.step if restored else 0, top1, len(train.labels), len(test.labels),
                         heads)  # fmt: skip
    with RunLog(run_dir / "log.jsonl") as log:
        log.write("eval", step=report.step, **{f"{name}_{weights}": top1})
    return report
