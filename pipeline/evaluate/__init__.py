"""Probes of a frozen encoder: kNN and linear."""

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
    from pipeline.evaluate.features import cached, extract, pixels
    from pipeline.evaluate.knn import knn_accuracy
    from pipeline.evaluate.linear import linear_accuracy
    from pipeline.runs import open_images, read_config, restore
    from pipeline.tracking import RunLog

    run_dir = Path(run_dir).resolve()
    if weights == "pixels":
        cfg, method, step = read_config(run_dir), None, 0
    else:
        cfg, method, _, step = restore(run_dir, weights)
    parts = []
    for which in ("train", "val"):
        loader = open_images(cfg, which, augment=False)
        if method is None:
            parts.append(pixels(loader, batch_size=cfg.eval.batch_size, device="cpu"))
        else:
            key = {
                "weights": weights,
                "step": str(step),
                "image_set": loader.image_set,
                "crop": str(cfg.data.eval_crop),
            }
            path = run_dir / "features" / f"{weights}-{which}.safetensors"
            parts.append(cached(path, key, lambda loader=loader: extract(
                method.encoder, loader, batch_size=cfg.eval.batch_size, device="cpu")))  # fmt: skip
        loader.close()
    train, test = parts
    if name == "knn":
        top1 = knn_accuracy(train, test, num_classes=loader.num_classes, k=cfg.eval.knn_k,
                            temperature=cfg.eval.knn_temperature)  # fmt: skip
    else:
        top1 = linear_accuracy(train, test, num_classes=loader.num_classes, l2=cfg.eval.linear_l2)
    report = ProbeReport(name, weights, step, top1, len(train.labels), len(test.labels))
    RunLog(run_dir / "log.jsonl").write("eval", step=step, **{f"{name}_{weights}": top1})
    return report
