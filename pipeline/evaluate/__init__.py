"""Probes of a frozen encoder: kNN and linear."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ProbeReport:
    """Top-1 accuracy in percent of one probe on one set of weights; ``step`` is the checkpoint's, 0 for untrained."""

    probe: str
    weights: str
    step: int
    top1: float
    num_train: int
    num_test: int

    def __str__(self) -> str:
        """One line for people."""
        return (f"{self.probe} {self.top1:.2f} % top-1 ({self.weights} weights of step {self.step}; {self.num_train} images "
                f"with labels, {self.num_test} tested)")  # fmt: skip


def probe(run_dir: Path, name: Literal["knn", "linear"], weights: str = "model") -> ProbeReport:
    """Probe a run's encoder on its data.val, with the labels of data.train; writes an eval line to the run's log.

    ``weights``: model, ema, untrained, or pixels (no encoder: the images averaged to 32 px). Features are kept in the
    run folder. Raises UserError for a run without checkpoint or validation images.
    """
    from pipeline.evaluate.features import Features, cached, extract, pixels
    from pipeline.evaluate.knn import knn_accuracy
    from pipeline.evaluate.linear import linear_accuracy
    from pipeline.runs import open_images, read_config, restore
    from pipeline.tracking import RunLog

    run_dir = Path(run_dir).resolve()
    cfg = read_config(run_dir)
    restored = None if weights == "pixels" else restore(run_dir, weights)

    def features(which: Literal["train", "val"]) -> Features:
        with contextlib.closing(open_images(cfg, which, augment=False)) as loader:
            if restored is None:
                return pixels(loader, batch_size=cfg.eval.batch_size, device="cpu")
            key = {"weights": restored.identity, "image_set": loader.image_set, "crop": str(cfg.data.eval_crop)}
            path = run_dir / "features" / f"{weights}-{which}.safetensors"
            return cached(path, key, lambda: extract(restored.method.encoder, loader, batch_size=cfg.eval.batch_size,
                                                     device="cpu"))  # fmt: skip

    train, test = features("train"), features("val")
    classes = int(train.labels.max()) + 1
    if name == "knn":
        top1 = knn_accuracy(train, test, num_classes=classes, k=cfg.eval.knn_k, temperature=cfg.eval.knn_temperature)
    else:
        top1 = linear_accuracy(train, test, num_classes=classes, l2=cfg.eval.linear_l2)
    report = ProbeReport(name, weights, restored.step if restored else 0, top1, len(train.labels), len(test.labels))
    with RunLog(run_dir / "log.jsonl") as log:
        log.write("eval", step=report.step, **{f"{name}_{weights}": top1})
    return report
