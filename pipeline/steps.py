"""What a step is: the part of a global batch that a rank takes, the work on it, and the line that the log has of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data import Batch
from pipeline.engine import Engine
from pipeline.guard import NonFinite, NonFiniteGuard
from pipeline.launch import Portion, World
from pipeline.metrics import Meter
from pipeline.runlog import RunLog
from pipeline.tracking import MlflowSink


class Silent:
    """The log and the sink of a rank that is not the main one."""

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Nothing."""
        return {}

    def log(self, *_: Any) -> None:
        """Nothing."""

    log_figure = close = log


class StepBuffer:
    """Training lines whose numbers are still on the device; one transfer a log interval turns them into log lines.

    ``samples`` in a line is the sum of the batch's sample keys (``pipeline.keys``) in 64 bits, in hexadecimal: it says which
    images the step has seen in which epoch, in whatever order and on however many ranks.
    """

    def __init__(self, batch: int, names: Sequence[str], run_log: "RunLog | Silent", sink: "MlflowSink | Silent",
                 guard: NonFiniteGuard, world: World, flops_per_image: float) -> None:  # fmt: skip
        """Lines of steps of ``batch`` images go to ``run_log`` first, then to ``sink``; ``names`` of what is trained."""
        self.flops_per_image = flops_per_image
        self.batch, self.names, self.run_log, self.sink, self.guard = batch, names, run_log, sink, guard
        self.culprit: str | None = None
        self.world, self.sums = world, list[int]()
        self.meter, self.known = Meter(self._gather if world.size > 1 else None), list[dict[str, float]]()

    def _gather(self, numbers: list[float]) -> list[list[float]]:
        """All ranks' numbers; the sums of keys that go with them become those of whole batches."""
        everyone = self.world.gather((numbers, self.sums))
        self.sums = [sum(parts) for parts in zip(*(sums for _, sums in everyone), strict=True)]
        return [numbers for numbers, _ in everyone]

    def add(self, step: int, epoch: int, lr: float, scalars: dict[str, Tensor], waited_s: float, keys: Tensor) -> None:
        """One step's device scalars, the seconds it waited for data, and the keys of this rank's samples: int64 on the CPU."""
        self.meter.add(scalars, self.batch, waited_s)
        self.sums.append(int(keys.sum()))
        seen = step * self.batch
        self.known.append(
            {"step": step, "samples_seen": seen, "flops": seen * self.flops_per_image, "epoch": epoch, "lr": lr}
        )

    def flush(self) -> dict[str, float]:
        """Write a line a step and restart the clock; returns the interval's means. Raises NonFinite by the guard's verdict."""
        means = self.meter.flush()
        known, self.known, sums, self.sums = self.known, [], self.sums, []
        verdicts, lines = list[tuple[int, bool]](), list[Any]()
        for fields, row, total in zip(known, self.meter.rows, sums, strict=True):
            skipped, culprit = bool(row.pop("skipped")), int(row.pop("culprit"))
            verdicts.append((int(fields["step"]), skipped))
            if skipped:
                self.culprit = self.names[culprit] if culprit >= 0 else None
                self.run_log.write(
                    "skip", step=fields["step"], reason="the gradient is not finite", tensor=self.culprit
                )
            lines.append(self.run_log.write("train", **fields, **row, samples=f"{total % 2**64:016x}"))
        try:
            self.guard.observe(verdicts)
        except NonFinite as found:
            # MLflow forgets nothing: what will be rolled back never goes there.
            verdicts = [(step, skipped or step >= found.first) for step, skipped in verdicts]
            raise
        finally:
            for (step, skipped), line in zip(verdicts, lines, strict=True):
                if not skipped:
                    self.sink.log(step, line)
        return means


def update(
    engine: Engine, batch: Batch, portion: Portion, lr: float, clip: float | None, momentum: float,
    ready: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:  # fmt: skip
    """One optimizer step on this rank's part of a global batch: the step's device scalars.

    ``ready`` is called before the weights change.
    """
    micro, parts = portion.micro, dict[str, list[Tensor]]()
    for index in range(portion.num_micro):
        part = slice(index * micro, (index + 1) * micro)
        draw = engine.method.draw(batch.keys[part], batch.batch_key, batch.labels[part])
        logs = engine.micro_step(batch.images[part], draw, portion.num_micro, index == portion.num_micro - 1)
        for name, value in logs.items():
            parts.setdefault(name, []).append(value)
    # A monitor's NaN says that one micro-batch had nothing to show; the loss's would be a fault, and stays.
    scalars = {n: torch.stack(v).mean() if n == "loss" else torch.stack(v).nanmean() for n, v in parts.items()}
    ready()
    report = engine.step(lr, clip, momentum)
    return {**scalars, "grad_norm": report.grad_norm, "skipped": report.skipped, "culprit": report.culprit}
