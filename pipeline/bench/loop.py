"""What the trainer's loop costs: CPU time a step beside a bare PyTorch loop with the same layer, optimizer and images.

The loop is the real one, of ``pipeline.train.Trainer`` from its constructor to its end, with ``log.jsonl`` in a temporary
folder and no MLflow; only the engine, which computes, and the loader, which decodes, are stubs. The clock runs from the
first batch to the last line of the log: not while a run starts, saves and draws.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self
from unittest import mock

import torch
from torch import Tensor, nn

from pipeline.bench.interleaved import Contestant, Figures, Progress, measure
from pipeline.config import Config, load_config
from pipeline.data import Batch, Order
from pipeline.engine import StepReport

BATCH: Final = 8
SAMPLES: Final = 1024
WIDTH: Final = 32
MONITORS: Final = 2  # beside the loss; PCAE logs as many
LOG_EVERY: Final = 20  # steps
BARE: Final = "bare PyTorch loop"
OURS: Final = "patchmill's loop"
GOAL_US: Final = 300.0
# All that is replaced in pipeline.train, by name. Of the Trainer itself: Trainer(cfg, folder, world, device).run(stop).
SEAM: Final = ("build_engine", "open_training")


@dataclass(frozen=True)
class Row:
    """A loop: CPU microseconds a step (fastest round), A/A ratio, and how much that is over the bare loop.

    ``goal_us``: what ``over_bare_us`` should be at most; None for the bare loop.
    """

    name: str
    cpu_us_per_step: float
    a_over_a: float
    over_bare_us: float
    goal_us: float | None

    def __str__(self) -> str:
        """One line of a table."""
        goal = "" if self.goal_us is None else f" (goal <= {self.goal_us:.0f})"
        return (f"{self.name:<24}{self.cpu_us_per_step:8.1f} CPU us a step   A/A {self.a_over_a:.3f}   "
                f"over the bare loop {self.over_bare_us:6.1f} us{goal}")  # fmt: skip


class Stopwatch:
    """CPU seconds of this process that were spent between ``start`` and ``stop``; a clock for ``interleave``."""

    def __init__(self) -> None:
        """Stands at 0."""
        self._total, self._since = 0.0, 0.0

    def start(self) -> None:
        """It runs on."""
        self._since = time.process_time()

    def stop(self) -> None:
        """It stands still."""
        self._total += time.process_time() - self._since

    def __call__(self) -> float:
        """The seconds so far."""
        return self._total


class Layer:
    """What both loops compute: a linear layer's mean square, and fused AdamW."""

    def __init__(self) -> None:
        """The same weights every time."""
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.optimizer = torch.optim.AdamW(self.linear.parameters(), lr=1e-4, fused=True)
        self.images = torch.randn(BATCH, WIDTH)

    def backward(self, images: Tensor) -> Tensor:
        """Forward and backward; the loss."""
        loss = self.linear(images).square().mean()
        loss.backward()
        return loss

    def step(self) -> None:
        """Update the weights."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class StubEngine:
    """A ``pipeline.engine.Engine`` that computes as little as there is: what is left of a step is the loop's."""

    state_is_copy = False
    loss_scale = None

    def __init__(self, layer: Layer, monitors: int = MONITORS) -> None:
        """Logs the loss and ``monitors`` more numbers a step."""
        self._layer, self._zero = layer, torch.zeros(())
        self._monitors = {f"monitor_{number}": self._zero for number in range(monitors)}
        # Every field of a report is one number on the device.
        self._report = StepReport(*(self._zero for _ in StepReport.__dataclass_fields__))
        self.method: Any = SimpleNamespace(draw=lambda keys, batch_key=None, labels=None: None)
        self.trained_names, self.ema = [name for name, _ in layer.linear.named_parameters()], dict[str, Tensor]()

    def micro_step(self, images: Tensor, draw: Any, num_micro: int, last: bool) -> dict[str, Tensor]:
        """Forward and backward of the layer."""
        return {"loss": self._layer.backward(images).detach(), **self._monitors}

    def step(self, lr: float, clip: float | None, momentum: float) -> StepReport:
        """Update the layer."""
        for group in self._layer.optimizer.param_groups:
            group["lr"] = lr
        self._layer.step()
        return self._report

    def call(self, name: str, *args: Any) -> Any:
        """A picture: what the end of a run asks for."""
        from PIL import Image

        return Image.new("RGB", (1, 1))

    def state(self) -> dict[str, Tensor]:
        """The layer's weights."""
        return {f"model.{name}": parameter.detach() for name, parameter in self._layer.linear.named_parameters()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing: no run of these goes on."""

    def close(self) -> None:
        """Nothing: it keeps nothing."""

    def full_params(self) -> dict[str, Tensor]:
        """The layer's weights."""
        return self.state()


class StubBatches(Iterator[Batch]):
    """The same batch for every step of an order; its stopwatch runs from the first to the end."""

    def __init__(self, batch: Batch, order: Order, stopwatch: Stopwatch | None) -> None:
        """Without a ``stopwatch`` no time is taken."""
        self.waited, self._batch, self._order = 0.0, batch, order
        self._stopwatch, self._running = stopwatch, False

    def __next__(self) -> Batch:
        """The batch."""
        if self._stopwatch is not None and not self._running:
            self._running = True
            self._stopwatch.start()
        next(self._order)
        return self._batch

    def close(self) -> None:
        """The end: the loop has written what it holds."""
        if self._stopwatch is not None and self._running:
            self._running = False
            self._stopwatch.stop()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


class StubLoader:
    """A loader whose batches are there already."""

    num_samples, num_classes, image_set = SAMPLES, 10, "stub"

    def __init__(self, images: Tensor, stopwatch: Stopwatch) -> None:
        """``images`` are every batch's; ``stopwatch`` times the batches of training."""
        numbers = torch.arange(BATCH)
        self._batch, self._stopwatch = Batch(images, numbers, numbers, numbers, numbers[:1]), stopwatch

    def batches(self, order: Order, device: object = None, samples: slice | None = None) -> StubBatches:
        """Those of an order. Training names its samples; the figure at the end of a run does not."""
        return StubBatches(self._batch, order, None if samples is None else self._stopwatch)

    def close(self) -> None:
        """Nothing."""


def config(steps: int, folder: Path) -> Config:
    """A run of so many steps without checkpoints in between; no model of it is ever built."""
    settings = {
        "method.name": "mae", "model.name": "vit_p", "data.loader": "synthetic", "data.image_size": 32,
        "train.global_batch": BATCH, "train.steps": steps, "checkpoint.every_steps": 10**9, "log.every_steps": LOG_EVERY,
        "tracking.uri": "none", "run.dir": folder,
    }  # fmt: skip
    return load_config([], [f"{key}={value}" for key, value in settings.items()])


def train_stub(steps: int, stopwatch: Stopwatch) -> int:
    """A whole run of the real trainer on the stubs; the steps that it made."""
    from pipeline import train
    from pipeline.launch import World
    from pipeline.stop import StopRequest

    layer = Layer()
    stubs = (lambda cfg, device: StubEngine(layer), lambda *args, **options: StubLoader(layer.images, stopwatch))
    replaced = mock.patch.multiple(train, **dict(zip(SEAM, stubs, strict=True)))
    # Its progress must not draw over the benchmark's; as in a job, where stderr is a file, it is a line every 15 s.
    with tempfile.TemporaryDirectory() as folder, replaced, contextlib.redirect_stderr(io.StringIO()):
        trainer = train.Trainer(config(steps, Path(folder)), Path(folder), World(), torch.device("cpu"))
        code = trainer.run(StopRequest())
        if code != train.DONE:
            raise RuntimeError(f"the stub run ended with exit code {code}")
    return steps


def train_bare(steps: int, stopwatch: Stopwatch) -> int:
    """The same steps as one writes them without a trainer."""
    layer = Layer()
    stopwatch.start()
    for _ in range(steps):
        layer.backward(layer.images)
        layer.step()
    stopwatch.stop()
    return steps


def _contestants(steps: int, stopwatch: Stopwatch) -> dict[str, Contestant]:
    return {
        BARE: lambda number: train_bare(steps, stopwatch),
        OURS: lambda number: train_stub(steps, stopwatch),
    }


def compare(figures: Figures) -> list[Row]:
    """Rows of measured figures, each beside the bare loop."""
    bare = figures[BARE][0]
    return [Row(name, 1e6 * seconds, ratio, 1e6 * (seconds - bare), None if name == BARE else GOAL_US)
            for name, (seconds, ratio) in figures.items()]  # fmt: skip


def run(steps: int = 2000, *, rounds: int = 8, progress: Progress | None = None) -> list[Row]:
    """Measure runs of ``steps`` steps; ``rounds`` is at least 8.

    Raises UserError when the machine is too restless to tell.
    """
    stopwatch = Stopwatch()
    return compare(measure(lambda: _contestants(steps, stopwatch), rounds, progress, stopwatch))
