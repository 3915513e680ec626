"""Probes of a frozen encoder: kNN, linear heads, exact softmax regression, MAE's linear recipe and attentive pooling."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.evaluate.features import Features
    from pipeline.evaluate.heads import HeadsReport
    from pipeline.evaluate.session import Session

Name = Literal["knn", "linear", "linear_heads", "linear_mae", "attentive"]


@dataclass(frozen=True)
class ProbeReport:
    """Top-1 accuracy in percent of one probe on one set of weights; ``step`` is the checkpoint's, 0 for untrained.

    ``heads``: of linear_heads and attentive, what was trained and which one was chosen. ``by_k``: of kNN with several k, top-1
    of each. ``note``: what sets the result apart from others of the same probe, such as a label fraction.
    """

    probe: str
    weights: str
    step: int
    top1: float
    num_train: int
    num_test: int
    heads: "HeadsReport | None" = None
    by_k: Mapping[int, float] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        """One line for people, below the table of heads or of k."""
        table = f"{self.heads}\n" if self.heads else ""
        if self.by_k:
            table = "".join(f"{f'k = {k}':>10}{top1:>11.2f}\n" for k, top1 in self.by_k.items())
        return (f"{table}{self.probe}{self.note} {self.top1:.2f} % top-1 ({self.weights} weights of step {self.step}; "
                f"{self.num_train} images with labels, {self.num_test} tested)")  # fmt: skip

    def record(self) -> dict[str, float]:
        """The result's name in the run's log, and its value; of several k each one."""
        others = {f"{self.probe}{k}{self.note}_{self.weights}": top1 for k, top1 in self.by_k.items()}
        return {f"{self.probe}{self.note}_{self.weights}": self.top1, **others}


def probe(run_dir: Path, name: Name, weights: str = "model", settings: Sequence[str] = ()) -> ProbeReport:
    """Probe a run's encoder on its data.val, with the labels of data.train; writes an eval line to the run's log.

    ``name``: linear is the exact solution on the mean of patch tokens, linear_heads the best of many trained heads, linear_mae
    MAE's recipe. ``weights``: model, ema, untrained, or pixels (no encoder: the images averaged to 32 px; knn and the first
    two). ``settings`` as in ``evaluation_config``. Features, and what a probe has learnt so far, are kept in the run folder.
    Raises UserError for a run without checkpoint or validation images.
    """
    from pipeline.evaluate.session import open_session

    with open_session(run_dir, settings, weights) as session:
        report = evaluate(session, name)
    assert report is not None
    return report


def evaluate(session: "Session", name: Name, ks: Sequence[int] = ()) -> ProbeReport | None:
    """``probe`` in one of the processes that evaluate together; the report on the main one, None on the others.

    ``ks``: further numbers of neighbours than ``eval.knn_k``.
    """
    from pipeline.runlog import CHANGED, LOG, add_line
    from pipeline.runs import is_training

    report = _trained(session, name) if name in ("linear_mae", "attentive") else _on_features(session, name, ks)
    if report is not None:
        # A line that training is writing this moment is not one that a kill cut off.
        changed = session.changed()
        add_line(session.run_dir / LOG, "eval", mends=not is_training(session.run_dir), step=report.step, **report.record(),
                 **({CHANGED: changed} if changed else {}))  # fmt: skip
    return report


def _note(session: "Session") -> str:
    fraction = session.cfg.eval.label_fraction
    return f"_{100 * fraction:g}pct" if fraction < 1 else ""


def _trained(session: "Session", name: Name) -> ProbeReport | None:
    if name == "attentive":
        from pipeline.evaluate.attentive import attentive

        heads, num_train, num_test = attentive(session)
        top1: float = heads.top1
    else:
        from pipeline.evaluate.mae_linear import mae_linear

        heads = None
        top1, num_train, num_test = mae_linear(session)
    if not session.world.is_main:
        return None
    pooling = "_cls" if name == "linear_mae" and session.cfg.eval.pooling == "cls" else ""
    return ProbeReport(name, session.weights, session.step, top1, num_train, num_test, heads,
                       note=pooling + _note(session))  # fmt: skip


def _on_features(session: "Session", name: Name, ks: Sequence[int]) -> ProbeReport | None:
    train, test = session.features("train"), session.features("val")
    if not session.world.is_main:
        return None
    top1, heads, by_k = _fitted(session, name, ks, train, test)
    return ProbeReport(name, session.weights, session.step, top1, len(train.labels), len(test.labels), heads, by_k,
                       _note(session))  # fmt: skip


def _fitted(
    session: "Session", name: Name, ks: Sequence[int], train: "Features", test: "Features"
) -> tuple[float, "HeadsReport | None", dict[int, float]]:
    from pipeline.evaluate.heads import heads_accuracy
    from pipeline.evaluate.knn import knn_accuracies
    from pipeline.evaluate.linear import linear_accuracy

    cfg, device, classes = session.cfg.eval, session.device, int(train.labels.max()) + 1
    if name == "knn":
        every = sorted({cfg.knn_k, *ks})
        found = knn_accuracies(
            train, test, num_classes=classes, ks=every, temperature=cfg.knn_temperature, device=device
        )
        return found[cfg.knn_k], None, found if ks else {}
    if name == "linear_heads":
        heads = heads_accuracy(train, test, num_classes=classes, lrs=cfg.linear_lrs, epochs=cfg.linear_epochs,
                               batch_size=cfg.linear_batch, seed=session.cfg.train.seed, device=device)  # fmt: skip
        return heads.top1, heads, {}
    return linear_accuracy(train, test, num_classes=classes, l2=cfg.linear_l2, device=device), None, {}
