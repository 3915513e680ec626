"""The benchmarks of the trainer's loop and of tracking: short runs of the real ones, and their arithmetic."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from pipeline import train
from pipeline.bench import interleaved, loop, tracking
from pipeline.bench.cli import bench


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch):
    monkeypatch.setattr(interleaved, "TOLERANCE", float("inf"))
    monkeypatch.setattr(interleaved, "MIN_ROUNDS", 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the stub engine makes no process group
def test_the_loop_is_the_trainers_with_a_line_in_the_log_for_every_step(monkeypatch):
    written, real = [], train.RunLog.write

    def spy(self, kind, **fields):
        written.append((kind, fields.get("step"), len(fields)))
        return real(self, kind, **fields)

    monkeypatch.setattr(train.RunLog, "write", spy)
    names = {name: getattr(train, name) for name in loop.SEAM}
    calls = []
    bare, ours = loop.run(45, rounds=1, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (8, 8)
    assert (bare.name, ours.name) == (loop.BARE, loop.OURS)
    assert bare.cpu_us_per_step > 0 and bare.over_bare_us == 0
    assert ours.over_bare_us == pytest.approx(ours.cpu_us_per_step - bare.cpu_us_per_step)
    steps = [step for kind, step, _ in written if kind == "train"]
    assert steps == 4 * list(range(1, 46)), "a warm-up and a round, twice each"
    assert [kind for kind, *_ in written].count("skip") == 0
    assert {name: getattr(train, name) for name in loop.SEAM} == names, "put back"


def test_the_stopwatch_stands_still_outside_the_loop():
    stopwatch = loop.Stopwatch()
    sum(range(200_000))
    assert stopwatch() == 0
    stopwatch.start()
    sum(range(200_000))
    stopwatch.stop()
    seen = stopwatch()
    sum(range(200_000))
    assert stopwatch() == seen > 0


def test_only_the_excess_over_the_bare_loop_has_a_goal():
    bare, ours = loop.compare({loop.BARE: (50e-6, 1.0), loop.OURS: (280e-6, 1.01)})
    assert bare.goal_us is None
    assert "280.0 CPU us a step   A/A 1.010   over the bare loop  230.0 us (goal <= 300)" in str(ours)


def test_the_tracked_line_has_12_metrics():
    assert (
        len(tracking._metrics({"kind": "train", "step": 3, "time": 1.0, **tracking.line(3)})) == tracking.METRICS == 12
    )


def test_every_way_to_log_has_a_figure(monkeypatch, empty_store):
    monkeypatch.setattr(tracking, "_make_sqlite", lambda path: shutil.copy(empty_store, path))
    monkeypatch.setattr(tracking, "PORTION", 4)
    alone, ours, peer = tracking.run(6, rounds=1)
    assert [row.name for row in (alone, ours, peer)] == [tracking.ALONE, tracking.OURS, tracking.PEER]
    assert ours.blocked_ms < peer.blocked_ms
    assert ours.goal_ms == 1.0 and alone.goal_ms is None


def test_what_mlflow_costs_is_what_it_adds_to_the_log():
    waits = tracking.Waits(dict.fromkeys((tracking.ALONE, tracking.OURS, tracking.PEER), 1e-3))
    figures = {tracking.ALONE: (1e-4, 1.0), tracking.OURS: (6e-4, 1.0), tracking.PEER: (1.01e-2, 1.0)}
    assert [row.cpu_ms_per_step for row in tracking.compare(figures, waits)] == pytest.approx([0.1, 0.5, 10.0])


def test_the_verbs_print_and_write_their_rows(monkeypatch, tmp_path):
    rows = [loop.Row(loop.OURS, 280.0, 1.01, 230.0, 300.0)]
    monkeypatch.setattr(loop, "run", lambda steps, **options: rows)
    monkeypatch.setattr(tracking, "run", lambda steps, **options: [tracking.Row("sink", 0.5, 1.0, 0.01, 1.0)])
    for verb in ("loop", "tracking"):
        out = tmp_path / f"{verb}.json"
        result = CliRunner().invoke(bench, [verb, "--out", str(out)])
        assert result.exit_code == 0, result.output
        report = json.loads(out.read_text())
        assert report["statistic"] == "fastest of the rounds" and report["rows"][0]["a_over_a"] > 0
