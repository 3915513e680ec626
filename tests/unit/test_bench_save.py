"""The benchmark of saves: on a clock that only copies and saves move forward, so that its figures are known; and for real."""

import json
import shutil
import threading
import time

import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager
from typer.testing import CliRunner

from pipeline import checkpoint
from pipeline.bench import save
from pipeline.bench.cli import bench
from pipeline.config import RunFailed, UserError
from pipeline.saver import Saver

GIB = 0.001
COMPUTING_S, STAGING_S, SAVING_S, COPYING_S = 0.5, 3.0, 40.0, 2.0
PATIENCE_S = 20.0


class Clock:
    """Seconds that go by where this test says so; the order of the threads is fixed by what each of them waits for."""

    def __init__(self):
        self.now, self.lock = 100.0, threading.Lock()
        self.asked, self.changed = threading.Event(), threading.Event()
        self.computing = True  # counted until the weights change: nobody knows how often training computes afterwards

    def __call__(self):
        return self.now

    def advance(self, seconds):
        with self.lock:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """The copy takes its time once training waits for it, the save behind it once the weights have changed."""
    clock = Clock()
    ready, stage, write = Saver.ready, DefaultStager._stage, checkpoint.save
    compute, step, copy = save.Training.compute, save.Training.step, save.Copies.copy

    def slow_ready(self):
        if self._copy is not None:
            clock.asked.set()
        ready(self)

    def slow_stage(self, tensors, **options):
        assert clock.asked.wait(PATIENCE_S), "nobody waits for the copy"
        clock.asked.clear()
        clock.advance(STAGING_S)
        return stage(self, tensors, **options)

    def slow_save(folder, *args):
        assert not list(folder.glob("*step-*")), "older ones pile up"
        if threading.current_thread() is not threading.main_thread():
            assert clock.changed.wait(PATIENCE_S), "training waits for the whole save"
            clock.changed.clear()
        clock.advance(SAVING_S)
        return write(folder, *args)

    def slow_compute(self):
        compute(self)
        if clock.computing:
            clock.advance(COMPUTING_S)

    def told_step(self):
        step(self)
        clock.computing = False
        clock.changed.set()

    def slow_copy(self, state):
        copy(self, state)
        clock.computing = True
        clock.advance(COPYING_S)

    monkeypatch.setattr(Saver, "ready", slow_ready)
    monkeypatch.setattr(DefaultStager, "_stage", slow_stage)
    monkeypatch.setattr(checkpoint, "save", slow_save)
    monkeypatch.setattr(save.Training, "compute", slow_compute)
    monkeypatch.setattr(save.Training, "step", told_step)
    monkeypatch.setattr(save.Copies, "copy", slow_copy)
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_training_waits_for_the_copy_and_not_for_the_disk(clock, tmp_path):
    rows = save.run(GIB, tmp_path, rounds=2)
    assert [row.name for row in rows] == [save.SYNC, save.FIRST, save.ASYNC, save.COPY]
    found = {row.name: (row.seconds.median, row.stall_s.median, row.to_sync.median, row.to_copy.median) for row in rows}
    behind = (COMPUTING_S + STAGING_S + SAVING_S, STAGING_S, STAGING_S / SAVING_S, STAGING_S / COPYING_S)
    assert found[save.SYNC] == pytest.approx((SAVING_S, SAVING_S, 1, SAVING_S / COPYING_S))
    assert found[save.FIRST] == found[save.ASYNC] == pytest.approx(behind)
    assert found[save.COPY] == pytest.approx((COPYING_S, COPYING_S, COPYING_S / SAVING_S, 1))
    assert not list(tmp_path.iterdir())


def test_a_round_is_held_against_itself_and_the_first_against_the_medians():
    times = {
        save.SYNC: [save.Times(10, 10), save.Times(20, 20), save.Times(40, 40)],
        save.FIRST: [save.Times(30, 5)],
        save.ASYNC: [save.Times(12, 1), save.Times(22, 4), save.Times(42, 4)],
        save.COPY: [save.Times(1, 1), save.Times(2, 2), save.Times(2, 2)],
    }
    sync, first, behind, copy = save.compare(times)
    assert behind.to_sync == save.Spread(0.1, 0.1, 0.2) and behind.to_copy == save.Spread(2, 1, 2)
    assert first.to_sync == save.Spread(0.25, 0.25, 0.25)
    assert "to a synchronous save 0.100 (0.100 to 0.200) (goal <= 0.1)   to a plain copy 2.000" in str(behind)
    assert str(behind).endswith("(goal <= 2)")
    assert "goal" not in f"{sync}{first}{copy}"


@pytest.mark.parametrize("gib", [GIB, 0.25])
def test_the_state_has_its_size_and_an_engines_names(gib, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.empty(*shape, device="meta"))
    state = save.Training(gib, torch.device("cpu")).state()
    kinds = {name.split(".", 1)[0] for name in state}
    assert kinds == {"model", "ema", "exp_avg", "exp_avg_sq", "step"}
    assert sum(tensor.nbytes for tensor in state.values()) == pytest.approx(gib * 2**30, rel=1e-3)
    assert len({name.split(".", 1)[1] for name in state}) == len(state) / len(kinds)


def test_the_verb_measures_saves_and_writes_its_rows(tmp_path):
    out, disk = tmp_path / "save.json", tmp_path / "disk"
    disk.mkdir()
    arguments = ["save", "--gib", str(GIB), "--folder", str(disk), "--rounds", "1", "--out", str(out)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert report["statistic"] == "median of the rounds" and report["filesystem"] and report["device"]
    assert all(row["seconds"]["smallest"] >= row["stall_s"]["smallest"] > 0 for row in report["rows"])
    assert not list(disk.iterdir())


def test_a_save_that_fails_ends_it(tmp_path, monkeypatch):
    def full(*args):
        raise checkpoint.CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(RunFailed, match="no space left"):
        save.run(GIB, tmp_path, rounds=1)
    monkeypatch.setattr(save, "save_sync", lambda *args: save.Times(1, 1))
    with pytest.raises(RunFailed, match="no space left"):
        save.run(GIB, tmp_path, rounds=1)


def test_a_disk_without_room_is_told_before_anything_is_made(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    monkeypatch.setattr(save, "Training", None)
    with pytest.raises(
        UserError, match=rf"--folder {tmp_path}: a state of 1 GiB needs 1.05 GiB there and 1.00 GiB are"
    ):
        save.run(1.0, tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        save.run(GIB, tmp_path / "missing")
