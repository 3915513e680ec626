"""What a step calls in which order, what MLflow never hears of, and the held-out loss of several ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.engine import StepReport
from pipeline.guard import NonFinite, NonFiniteGuard
from pipeline.heldout import HeldOut
from pipeline.launch import Portion, World
from pipeline.order import sample_keys
from pipeline.steps import Silent, StepBuffer, update


class Engine:
    """Notes what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.method = SimpleNamespace(draw=lambda keys, batch_key, labels: None)

    def micro_step(self, images, draw, num_micro, last):
        self.calls.append("micro_step, last" if last else "micro_step")
        return {"loss": torch.tensor(float(images.sum()))}

    def step(self, lr, clip, momentum):
        self.calls.append("step")
        return StepReport(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(-1.0))

    def call(self, name, images, draw):
        return torch.tensor(float(images.float().mean())), {}


def test_the_copy_of_a_save_is_waited_for_before_the_weights_change():
    engine = Engine()
    batch = SimpleNamespace(
        images=torch.ones(4, 1), keys=torch.arange(4), batch_key=torch.zeros(1), labels=torch.zeros(4)
    )
    scalars = update(engine, batch, Portion(slice(0, 4), 2, 2), 1e-3, None, 0.9, lambda: engine.calls.append("ready"))
    assert engine.calls == ["micro_step", "micro_step, last", "ready", "step"]
    assert float(scalars["loss"]) == 2


def test_mlflow_never_hears_of_steps_that_will_be_rolled_back():
    """It forgets nothing; the log's lines of these steps are set aside instead."""
    told, written = [], []
    log = SimpleNamespace(write=lambda kind, **fields: written.append((kind, fields["step"])) or fields)
    sink = SimpleNamespace(log=lambda step, line: told.append(step))
    buffer = StepBuffer(8, ["a", "b"], log, sink, NonFiniteGuard(2), World(), 1e9)
    for step, skipped in enumerate([0, 0, 1, 1, 0], 1):
        report = {"loss": 1.0, "skipped": skipped, "culprit": 1 if skipped else -1}
        buffer.add(step, 0, 1e-3, {name: torch.tensor(float(value)) for name, value in report.items()}, 0.0,
                   torch.tensor([step]))  # fmt: skip
    with pytest.raises(NonFinite, match="3 to 4"):
        buffer.flush()
    assert told == [1, 2] and buffer.culprit == "b"
    assert [step for kind, step in written if kind == "train"] == [1, 2, 3, 4, 5]
    assert [step for kind, step in written if kind == "skip"] == [3, 4]


def test_a_line_says_which_samples_all_ranks_have_seen():
    keys, lines = torch.from_numpy(sample_keys(3, 2, np.arange(8))), []
    log = SimpleNamespace(write=lambda kind, **fields: lines.append(fields["samples"]) or fields)
    scalars = {name: torch.tensor(value) for name, value in {"loss": 1.0, "skipped": 0.0, "culprit": -1.0}.items()}
    # Rank 1's half of the batch; a run of one rank in another order; and a second interval with other samples.
    both = SimpleNamespace(size=2, gather=lambda mine: [mine, (mine[0], [int(keys[4:].sum())] * len(mine[1]))])
    for world, part in ((both, keys[:4]), (World(), keys.flip(0))):
        buffer = StepBuffer(8, [], log, Silent(), NonFiniteGuard(2), world, 1e9)
        for more in (0, 1):
            for step in (1, 2):
                buffer.add(step, 2, 1e-3, scalars, 0.0, part + more * step)
            buffer.flush()
            buffer.flush()
    of = lambda *sums: [f"{(int(keys.sum()) + one) % 2**64:016x}" for one in sums]  # noqa: E731
    assert lines == [*of(0, 0, 4, 8), *of(0, 0, 8, 16)]


def test_the_held_out_loss_is_the_mean_over_ranks_and_of_one_batch_at_least(tiny_config):
    cfg = tiny_config("mae", eval__loss_every=1, eval__loss_images=3, train__global_batch=8)
    heldout, means = HeldOut(cfg), []
    try:
        assert heldout.num_images == 8
        for rank in range(2):
            seen = SimpleNamespace(gather=lambda value: means.append(value) or [value])
            heldout.loss(Engine(), Portion.of(cfg, World(rank, 2)), seen)
        both = SimpleNamespace(gather=lambda value: means)
        assert heldout.loss(Engine(), Portion.of(cfg, World(0, 2)), both) == np.mean(means)
        assert means[0] != means[1]
        alone = heldout.loss(Engine(), Portion.of(cfg, World()), World())
        assert alone == pytest.approx(np.mean(means), rel=1e-6)
    finally:
        heldout.close()


def test_other_ranks_write_nothing():
    assert Silent().write("train", step=1) == {} and Silent().log(1, {}) is None
