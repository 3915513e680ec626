"""A killed run, started again, writes the same log as one that was never disturbed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.runlog import read_log

STEPS_PER_EPOCH = 10  # 160 images in batches of 16


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep.scan import scan
    from data_prep.write import write
    from pipeline.drawn import draw_images

    folder = tmp_path_factory.mktemp("data")
    draw_images(folder / "images", num_train=160, num_test=10, seed=0)
    scan(folder / "images" / "train", folder / "train.jsonl", workers=1)
    write(folder / "train.jsonl", folder / "train.beton", mode="jpg", workers=1)
    return folder / "train.beton"


def start(run: Path, beton: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "train", "quickstart/pcae", f"run.dir={run}", f"data.train={beton}",
               "train.epochs=3", "train.global_batch=16", "train.micro_batch=8", "model.drop_path=0.2", "log.every_steps=1",
               "checkpoint.every_steps=3", "optim.warmup_epochs=1", "tracking.uri=none", *overrides]  # fmt: skip
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def curve(run: Path) -> list[tuple[float, ...]]:
    """What must be equal: every training line but its times."""
    names = ("step", "epoch", "samples_seen", "loss", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in read_log(run / "log.jsonl") if line["kind"] == "train"]


def last_step(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def saving(run: Path) -> bool:
    return (
        any(name.endswith(".partial") for name in os.listdir(run / "checkpoints"))
        if (run / "checkpoints").exists()
        else False
    )


def kill_when(process: subprocess.Popen[bytes], moment: Callable[[], bool]) -> None:
    while not moment():
        assert process.poll() is None, "the run ended before the moment came"
        time.sleep(0.0005)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def undisturbed(beton: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert start(run, beton).wait() == 0
    rows = curve(run)
    assert [row[0] for row in rows] == list(range(1, 3 * STEPS_PER_EPOCH + 1))
    return rows


def test_same_seed_twice_gives_identical_losses_and_another_seed_does_not(beton, undisturbed, tmp_path):
    assert start(tmp_path / "again", beton).wait() == 0
    assert curve(tmp_path / "again") == undisturbed
    assert start(tmp_path / "other", beton, "train.seed=1", "train.epochs=1", "optim.warmup_epochs=0").wait() == 0
    assert curve(tmp_path / "other")[0] != undisturbed[0]


def test_killed_inside_a_save_in_an_epochs_last_batch_and_in_the_second_epoch(beton, undisturbed, tmp_path):
    run = tmp_path / "run"
    kill_when(start(run, beton), lambda: saving(run))
    assert saving(run), "the save was over before the kill"
    kill_when(start(run, beton), lambda: last_step(run) == STEPS_PER_EPOCH - 1)
    kill_when(start(run, beton), lambda: last_step(run) >= STEPS_PER_EPOCH + 4)
    assert start(run, beton).wait() == 0
    assert curve(run) == undisturbed
    assert not saving(run), "what the interrupted save left was not removed"
    discarded = [line["step"] for line in read_log(run / "log.discarded.jsonl")]
    assert discarded, "no line past a checkpoint was set aside"


OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR2)]


@pytest.mark.parametrize("number", [signal.SIGTERM, *OTHERS])
def test_a_signal_saves_and_ends_with_75_and_the_run_goes_on(beton, undisturbed, tmp_path, number):
    run = tmp_path / "run"
    process = start(run, beton, "checkpoint.every_steps=1000")
    while last_step(run) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == 75
    assert f'"reason": "stopped by {number.name}"' in (run / "why_stopped.json").read_text()
    assert start(run, beton, "checkpoint.every_steps=1000").wait() == 0
    assert curve(run) == undisturbed
    assert not (run / "log.discarded.jsonl").exists(), "a signal must lose no step"
    assert '"done": true' in (run / "why_stopped.json").read_text()
