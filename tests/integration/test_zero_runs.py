"""ZeRO through the trainer on two processes: a rank that dies in a step, and gradients that are not finite on one of them."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ranks import SETTINGS, curve, free_port, place, start

from pipeline import order
from pipeline.config import load_config
from pipeline.runlog import read_log

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

FAULT = "FAULT_OF_A_RANK"
STEPS, KILLED, POISONED, MICRO = 12, 6, 10, 4  # a rank's part of a batch are four micro-batches of one image
RANK_1 = 5  # a place in a batch of 8 that rank 1 has


def run_with_fault() -> None:
    """What a rank of these runs executes: the command line, with the fault put in that the environment names."""
    from pipeline import train
    from pipeline.cli import main
    from pipeline.engine.deepspeed import DeepSpeedEngine

    kind, value = json.loads(os.environ[FAULT])
    if kind == "killed":
        die_in_step(DeepSpeedEngine)
    elif kind == "killed in the start":
        die_in_start(value)
    elif kind == "poisoned":
        poison(train, value)
    else:
        leave_out(train.Trainer, value)
    main()


def die_in_step(engine: Any) -> None:
    """Rank 1 is gone after the first half of its micro-batches."""
    micro_step, calls = engine.micro_step, []

    def mortal(self: Any, *args: Any) -> Any:
        calls.append(self)
        if len(calls) > (KILLED - 1) * MICRO + MICRO // 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return micro_step(self, *args)

    engine.micro_step = mortal


def die_in_start(place: str) -> None:
    """Rank 1 is gone when it comes to a function, named with its module."""
    module, name = place.rsplit(".", 1)
    if os.environ["RANK"] == "1":
        setattr(importlib.import_module(module), name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def poison(train: Any, sample: int) -> None:
    """The rank that has a sample gets NaN in the backward pass of a layer."""
    update = train.update
    spoil = lambda _, gradients, __: tuple(None if g is None else g * float("nan") for g in gradients)  # noqa: E731

    def poisonous(engine: Any, batch: Any, *rest: Any) -> dict[str, torch.Tensor]:
        if sample not in batch.ids.tolist():
            return update(engine, batch, *rest)
        assert os.environ["RANK"] == "1"
        hook = engine.method.decoder.blocks[0].mlp.fc2.register_full_backward_hook(spoil)
        try:
            return update(engine, batch, *rest)
        finally:
            hook.remove()

    train.update = poisonous


def leave_out(trainer: Any, ranges: list[list[int]]) -> None:
    """A run whose data never had these batches."""
    take_up = trainer._take_up

    def with_gaps(self: Any, **more: Any) -> None:
        take_up(self, **more)
        self.skipped_ranges = [tuple(pair) for pair in ranges]

    trainer._take_up = with_gaps


def options(stage: int, *more: str) -> list[str]:
    return [f"train.steps={STEPS}", "engine.name=deepspeed", f"engine.zero_stage={stage}", *more]


def run_faulty(run: Path, fault: Sequence[Any], *more: str) -> tuple[list[int], list[str]]:
    """Both ranks' exit codes and what they said; started as srun starts them, for what ``--nproc`` starts has no faults."""
    command = [sys.executable, "-c", "from test_zero_runs import run_with_fault; run_with_fault()", "train", *SETTINGS]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), FAULT: json.dumps(fault)}
    port = free_port()
    ranks = [subprocess.Popen([*command, f"run.dir={run}", *more], env=env | place(rank, port),
                              stderr=subprocess.PIPE, text=True) for rank in (0, 1)]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], said


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids=lambda stage: f"stage{stage}")
def stage(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def undisturbed(stage, tmp_path_factory) -> list[tuple[float, ...]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run, *options(stage), "--nproc", "2")
    assert process.wait() == 0, process.stderr.read()
    rows = curve(run)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    return rows


def test_a_rank_that_is_killed_in_a_step_costs_the_steps_since_the_checkpoint(stage, undisturbed, tmp_path):
    run = tmp_path / "run"
    codes, said = run_faulty(run, ("killed", None), *options(stage))
    assert codes == [1, -signal.SIGKILL]
    assert "has lost another rank" in said[0] and "Traceback" not in said[0]
    assert len(curve(run)) == KILLED - 1
    process = start(run, *options(stage), "--nproc", "2")
    assert process.wait(timeout=240) == 0, process.stderr.read()
    assert f"resume pcae vit_p: step 4 of {STEPS}" in process.stderr.read()
    assert curve(run) == undisturbed


@pytest.mark.parametrize(
    ("engine", "place"),
    [
        ("engine.name=fsdp2", "pipeline.train.build_engine"),
        # With DeepSpeed's groups still to be made, for which the others wait.
        ("engine.name=deepspeed engine.zero_stage=3", "pipeline.engine.deepspeed.checkpoint_layers"),
    ],
)
def test_a_rank_that_is_killed_before_the_first_step_ends_the_others_with_one_line(engine, place, tmp_path):
    more = *engine.split(), "engine.timeout_s=30"
    codes, said = run_faulty(tmp_path / "run", ("killed in the start", place), *more)
    assert codes == [1, -signal.SIGKILL]
    assert "Traceback" not in said[0]
    assert said[0].strip().splitlines()[-1].startswith("patchmill: rank 0 on ")
    assert said[0].count("has lost another rank") == 1


@pytest.mark.slow
def test_a_sample_that_breaks_one_ranks_gradient_has_its_batch_left_out(stage, tmp_path):
    cfg = load_config([], [*SETTINGS, "run.dir=none"])
    at = (POISONED - 1) * cfg.train.global_batch + RANK_1
    sample = int(order.epoch_permutation(cfg.train.seed, 0, cfg.data.num_samples)[at])
    run, more = tmp_path / "run", options(stage, "guard.max_nonfinite=1")
    codes, said = run_faulty(run, ("poisoned", sample), *more)
    assert codes == [0, 0], said
    lines = read_log(run / "log.jsonl")
    (back,) = (line for line in lines if line["kind"] == "rollback")
    assert back["tensor"] == "decoder.blocks.0.mlp.fc1.bias"
    assert back["skipped_ranges"] == [[POISONED - 1, POISONED]]
    assert (run / "log.discarded.jsonl").read_text().count('"kind": "skip"') == 1
    codes, said = run_faulty(tmp_path / "gaps", ("gaps", back["skipped_ranges"]), *more)
    assert codes == [0, 0], said
    rows = curve(run)
    assert [row[0] for row in rows] == list(range(1, STEPS + 1))
    assert rows == curve(tmp_path / "gaps")


@pytest.mark.slow
def test_weights_that_break_the_gradient_stop_the_run_after_some_roll_backs(stage, tmp_path):
    run = tmp_path / "run"
    more = "optim.base_lr=1e37", "optim.warmup_epochs=0", "guard.max_nonfinite=2", "guard.max_rollbacks=2"
    process = start(run, *options(stage), *more, "--nproc", "2")
    assert process.wait(timeout=240) == 1
    said = process.stderr.read()
    assert said.count("and 2 roll-backs (guard.max_rollbacks) have not helped") == 1
    assert "Traceback" not in said
    assert [line["step"] for line in read_log(run / "log.jsonl") if line["kind"] == "rollback"] == [0, 0]
    assert not list((run / "checkpoints").glob("step-*"))
    assert "Lower optim.base_lr" in json.loads((run / "why_stopped.json").read_text())["reason"]
