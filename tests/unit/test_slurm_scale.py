"""Points of `scale`: how they are read, what is queued, and what table, figure and MLflow say of them; without Slurm."""

import json
import math
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.config import ConfigError, RunFailed, UserError, load_config
from pipeline.estimate import flops_per_image
from pipeline.planner import GIB, Layout, Machine, find_gpu, largest_batch, peak_bytes, predict_step
from slurm import scale, scale_run, scale_table, status
from slurm.local import Line
from slurm.scale import read_axes, read_points, short, split
from slurm.scale_figure import draw
from slurm.scale_run import Choice
from slurm.scale_table import Row, compare, measure, publish, table

COMMON = ["cifar10/mae", "engine/ddp", "data.loader=synthetic", "data.num_samples=4096"]
CHOICE = Choice(30, 10, "per-process", {})


def settings(tmp_path: Path, *more: str) -> list[str]:
    return [*COMMON, f"run.dir={tmp_path / 'runs'}", *more]


@pytest.mark.parametrize(
    ("value", "parts"),
    [("1,2,4", ["1", "2", "4"]), ("vit_b, vit_l", ["vit_b", "vit_l"]), ("1", ["1"]), ("[0.9, 0.95]", ["[0.9, 0.95]"]),
     ("[0.9,0.95],[0.9,0.99]", ["[0.9,0.95]", "[0.9,0.99]"]), ("{a: 1, b: 2}", ["{a: 1, b: 2}"]), ("'low,high'", ["'low,high'"]),
     ("{exclude: 'n[7-9]', x: y}", ["{exclude: 'n[7-9]', x: y}"]), ("1-00:00:00,90", ["1-00:00:00", "90"]), ("", [""]),
     ("1,,2", ["1,,2"]), ("[1,2", ["[1,2"]), ("1e-3,2e-3", ["1e-3", "2e-3"])],
)  # fmt: skip
def test_commas_span_an_axis_where_yaml_has_no_other_use_for_them(value: str, parts: list[str]) -> None:
    assert split(value) == parts


def test_axes_are_told_from_settings() -> None:
    axes, others = read_axes(["nodes=1,2", "model.name=vit_b,vit_l", "optim.betas=[0.9, 0.9]", "nodes=3"][:3], ())
    assert axes == {"slurm.nodes": ["1", "2"], "model.name": ["vit_b", "vit_l"]} and others == [
        "optim.betas=[0.9, 0.9]"
    ]
    assert read_axes(["nodes=2", "model.name=a,b"], ()) == ({"model.name": ["a", "b"]}, ["slurm.nodes=2"])


@pytest.mark.parametrize(
    ("words", "said"),
    [(["nodes=4"], "such as nodes=1,2,4"), (["nodes=1,2", "slurm.nodes=1,4"], "slurm.nodes: is given twice"),
     (["nodes=1,2", "train.steps=9"], "train.steps: is the measurement's own"),
     (["train.epochs=1,2"], "train.epochs: is the measurement's own"), (["nodes=1,1"], "has a value twice"),
     (["nodes=1,2", "run.dir=a,b"], "run.dir: is one for all points"), (["nodes=1,2", "tracking.uri=a,b"], "tracking.uri: is one")],
)  # fmt: skip
def test_what_spans_no_product_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_axes(words, short(50))


def test_points_are_short_runs_whose_batch_grows_with_the_processes(tmp_path: Path) -> None:
    words = settings(
        tmp_path,
        "nodes=2,4",
        "slurm.tasks_per_node=2",
        "model.name=vit_p,vit_t",
        "train.micro_batch=8",
        "train.epochs=800",
        "checkpoint.every_steps=10",
        "eval.loss_every=5",
    )
    shared, points = read_points(words, 50, "per-process")
    assert [point.name for point in points] == ["nodes-2_vit_p", "nodes-2_vit_t", "nodes-4_vit_p", "nodes-4_vit_t"]
    assert [point.cfg.train.global_batch for point in points] == [64, 64, 128, 128]
    assert [point.series for point in points] == ["vit_p", "vit_t"] * 2
    cfg = points[3].cfg
    assert points[3].folder == tmp_path / "runs" / "nodes-4_vit_t" and Path(shared.run.dir) == tmp_path / "runs"
    assert (cfg.train.steps, cfg.train.epochs, cfg.train.micro_batch, cfg.model.name) == (50, None, 8, "vit_t")
    assert (cfg.checkpoint.every_steps, cfg.eval.loss_every, cfg.tracking.uri) == (50, None, "none")
    assert shared.tracking.uri == "auto" and cfg.slurm.max_crashes == 1
    _, fixed = read_points(words, 50, "fixed")
    assert [point.cfg.train.global_batch for point in fixed] == [64] * 4


def test_a_folder_is_named_by_all_axes_and_belongs_to_one_point(tmp_path: Path) -> None:
    _, points = read_points(settings(tmp_path, "optim.betas=[0.9,0.95],[0.9,0.99]"), 50, "fixed")
    assert [point.name for point in points] == ["betas-0.9-0.95", "betas-0.9-0.99"]
    assert points[0].series == "betas-0.9-0.95"
    _, points = read_points(settings(tmp_path, "slurm.tasks_per_node=1,2", "nodes=1,2"), 50, "fixed")
    assert [point.series for point in points] == ["tasks_per_node-1"] * 2 + ["tasks_per_node-2"] * 2, (
        "nodes are counted first"
    )
    _, points = read_points(settings(tmp_path, "slurm.tasks_per_node=1,2"), 50, "fixed")
    assert [point.series for point in points] == ["mae vit_p"] * 2
    with pytest.raises(UserError, match="two points would have one folder: constraint-a-b"):
        read_points(settings(tmp_path, "slurm.constraint=a|b,a&b"), 50, "fixed")


def test_all_wrong_settings_are_named_with_their_points(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        read_points(settings(tmp_path, "nodes=1,2", "model.name=vit_p,vit_x", "optim.clip=-1"), 50, "fixed")
    everywhere, some = sorted(found.value.problems)
    assert everywhere.startswith("nodes-1_vit_p, nodes-1_vit_x, nodes-2_vit_p, nodes-2_vit_x: optim.clip = ")
    assert some.startswith("nodes-1_vit_x, nodes-2_vit_x: model.name = 'vit_x'")


def test_the_folder_of_a_run_is_not_for_points(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log.jsonl").touch()
    with pytest.raises(UserError, match="is the folder of a run"):
        read_points(settings(tmp_path, "nodes=1,2"), 50, "fixed")


def write_log(
    run: Path, speeds: dict[int, float], *, since: int = 0, device: str = "cpu", before: tuple[Any, ...] = ()
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        *before,
        {"kind": "start" if not since else "resume", "time": 1.0, "step": since, "device": device, "total_steps": 30},
    ]
    lines += [{"kind": "train", "time": 2.0 + step, "step": step, "loss": 1.0, "images_per_s": speed, "data_wait": step / 100}
              for step, speed in speeds.items()]  # fmt: skip
    lines.append({"kind": "stop", "time": 99.0, "step": max(speeds, default=0), "reason": "done", "peak_gib": 1.5})
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_measured_is_the_steps_after_the_warm_up(tmp_path: Path) -> None:
    write_log(tmp_path, {step: 1.0 if step <= 10 else 100.0 + step for step in range(1, 31)})
    found = measure(tmp_path, 10)
    assert found is not None
    speeds = np.arange(111, 131)
    assert (found.images_per_s, found.low, found.high) == pytest.approx((120.5, *np.percentile(speeds, [5, 95])))
    assert found.data_wait == pytest.approx(0.205) and (found.memory_gib, found.device, found.time) == (
        1.5,
        "cpu",
        32.0,
    )
    # An interval that the warm-up ends in does not count.
    assert measure(tmp_path, 8) == found and measure(tmp_path, 11).low > 115
    assert measure(tmp_path, 30) is None and measure(tmp_path / "nowhere", 10) is None


def test_a_restart_has_a_warm_up_of_its_own(tmp_path: Path) -> None:
    early = (
        {"kind": "start", "time": 0.0, "step": 0},
        {"kind": "train", "time": 0.5, "step": 7, "images_per_s": 1.0, "data_wait": 0},
    )
    write_log(tmp_path, {step: float(step) for step in range(8, 31)}, since=7, before=early)
    found = measure(tmp_path, 10)
    assert found is not None and found.images_per_s == np.median(np.arange(21, 31))


def row(
    name: str, series: str, processes: int, speed: float | None, predicted: float | None = None, **more: Any
) -> Row:
    spread = {} if speed is None else {"low": 0.9 * speed, "high": 1.1 * speed, "time": 5.0}
    return Row(name, series, more.pop("state", "done"), processes, 32 * processes, 32, speed,
               estimate_images_per_s=predicted, **spread, **more)  # fmt: skip


ROWS = [row("nodes-4_a", "a", 4, 240.0, 300.0), row("nodes-1_a", "a", 1, 100.0, 100.0), row("nodes-2_a", "a", 2, 180.0, 200.0),
        row("nodes-2_b", "b", 2, 50.0), row("nodes-8_b", "b", 8, 150.0),
        row("nodes-1_c", "c", 1, None, state="failed", why="killed"), row("nodes-2_c", "c", 2, 70.0)]  # fmt: skip


def test_efficiency_is_against_the_fewest_processes_of_a_series() -> None:
    found = {one.point: one for one in compare(ROWS)}
    assert [found[name].efficiency for name in ("nodes-1_a", "nodes-2_a", "nodes-4_a")] == pytest.approx([1, 0.9, 0.6])
    assert [found[name].estimate_efficiency for name in ("nodes-1_a", "nodes-2_a", "nodes-4_a")] == pytest.approx(
        [1, 1, 0.75]
    )
    assert [found[name].efficiency for name in ("nodes-2_b", "nodes-8_b")] == pytest.approx([1, 0.75])
    assert found["nodes-2_c"].efficiency is None and found["nodes-2_b"].estimate_efficiency is None


def test_the_table_has_a_row_for_what_failed_too() -> None:
    console = Console(width=220, record=True)
    console.print(table(compare(ROWS), "weak scaling"))
    lines = {line.split()[0]: line.split() for line in console.export_text().splitlines()}
    assert lines["nodes-4_a"] == [
        "nodes-4_a",
        "4",
        "128",
        "240.0",
        "216.0",
        "264.0",
        "60%",
        "-",
        "-",
        "-",
        "300",
        "75%",
        "-",
        "-",
        "done",
    ]
    assert lines["nodes-1_c"] == ["nodes-1_c", "1", "32", *["-"] * 11, "failed"]


def test_the_estimate_is_of_the_job_s_own_gpus_and_micro_batch(tmp_path: Path) -> None:
    more = ("slurm.gpus_per_node=2", "slurm.nodes=2", "slurm.gpu=A100", "train.micro_batch=8", "engine.precision=bf16")
    cfg = load_config(*([w for w in settings(tmp_path, *more) if ("=" in w) is is_set] for is_set in (False, True)))
    machine = Machine(find_gpu("A100"), 4, 2, network=25.0, mfu=0.3)
    found = scale_table.predict(cfg, {"network": 25.0, "mfu": 0.3})
    assert found is not None
    assert found.images_per_s == pytest.approx(64 / predict_step(cfg, machine, Layout("ddp"), 8).total)
    assert (
        predict_step(cfg, machine, Layout("ddp"), 8).launch == 2 * predict_step(cfg, machine, Layout("ddp"), 16).launch
    )
    assert found.memory_gib == peak_bytes(cfg, machine, Layout("ddp"), 8) / GIB and found.peak == 4 * 312e12
    without = cfg.model_copy(update={"slurm": cfg.slurm.model_copy(update={"gpu": None})})
    assert scale_table.predict(without, {}) is None


@pytest.mark.parametrize(
    "layout", [Layout("ddp"), Layout("fsdp2", reshard=True), Layout("zero2")], ids=lambda found: found.engine
)
def test_the_most_that_fits_is_what_memory_holds(layout: Layout, tmp_path: Path) -> None:
    cfg = load_config(
        ["imagenet/mae_vit_l"], [f"run.dir={tmp_path}", "data.train=x", "train.global_batch=8", "train.micro_batch=1"]
    )
    machine = Machine(find_gpu("A100"), 8)
    most = largest_batch(cfg, machine, layout)
    big = cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch": 8 * most})})
    assert peak_bytes(big, machine, layout, most) <= machine.bytes
    big = cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch": 8 * (most + 1)})})
    assert peak_bytes(big, machine, layout, most + 1) > machine.bytes


class Cluster:
    """Slurm as the points' folders have it: what was queued, and how it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: dict[str, str] = {}
        self.queued: list[str] = []
        self.refused: dict[str, str] = {}
        self.lines: list[Line | None] = []
        monkeypatch.setattr(status, "slurm_state", lambda job: (self.states.get(job, "UNKNOWN"), ""))
        monkeypatch.setattr(scale, "plan", self.plan)
        monkeypatch.setattr(scale, "submit", self.submit)
        monkeypatch.setattr(scale, "POLL_S", 0.01)

    def plan(self, cfg: Any, *, queue: bool) -> None:
        assert queue
        if problem := self.refused.get(Path(cfg.run.dir).name):
            raise ConfigError([problem, "slurm: no such partition"])

    def submit(self, cfg: Any, line: Line | None = None) -> str:
        self.lines.append(line)
        run, job = Path(cfg.run.dir), str(len(self.queued) + 1)
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        (run / "slurm" / "job.json").write_text(json.dumps({"job": job}))
        (run / "slurm" / "config.yaml").write_text(cfg.to_yaml())
        self.queued.append(run.name)
        self.states[job] = "PENDING"
        return job

    def end(self, run: Path, *, speed: float | None) -> None:
        job = json.loads((run / "slurm" / "job.json").read_text())["job"]
        self.states[job] = "FAILED" if speed is None else "COMPLETED"
        line = {"time": 1.0, "attempt": f"{job}-0", "event": "end", "step": 0, "reason": "rank 1 was killed"}
        (run / "slurm" / "attempts.jsonl").write_text(json.dumps(line) + "\n")
        if speed is not None:
            write_log(run, dict.fromkeys(range(1, 31), speed))
            (run / "why_stopped.json").write_text('{"done": true, "reason": "done"}')


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Cluster(monkeypatch)


def test_each_call_queues_what_has_no_result_and_no_job(tmp_path: Path, cluster: Cluster, capsys) -> None:
    words, runs = settings(tmp_path, "nodes=1,2", "tracking.uri=none"), tmp_path / "runs"
    scale_run.scale(words, CHOICE, None, wait=False)
    assert cluster.queued == ["nodes-1", "nodes-2"] and not (runs / "scale.png").exists()
    said = capsys.readouterr().out
    assert (
        "weak scaling" in said
        and "steps 11 to 30" in said
        and said.count("pending") == 2
        and "nodes-1: queued; job 1" in said
    )
    scale_run.scale(words, CHOICE, None, wait=False)
    assert len(cluster.queued) == 2, "both have a job"
    cluster.end(runs / "nodes-1", speed=50.0)
    cluster.end(runs / "nodes-2", speed=None)
    scale_run.scale(words, CHOICE, tmp_path / "out.json", wait=False)
    assert cluster.queued[2:] == ["nodes-2"]
    assert "nodes-2: queued again, it had failed: rank 1 was killed; job 3" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(one["state"], one["images_per_s"]) for one in report["rows"]] == [("done", 50.0), ("pending", None)]
    assert report["hardware"] == "cpu" and report["versions"]["torch"] and "weak scaling" in report["title"]
    cluster.end(runs / "nodes-2", speed=90.0)
    scale_run.scale(words, CHOICE, None, wait=True)
    assert len(cluster.queued) == 3 and "90%" in capsys.readouterr().out
    assert (runs / "scale.png").stat().st_size > 10_000 and json.loads((runs / "scale.json").read_text())["rows"][1][
        "efficiency"
    ] == 0.9
    assert not (runs / "mlflow.json").exists(), "tracking.uri=none"


def test_nothing_is_queued_before_all_points_are_in_order(tmp_path: Path, cluster: Cluster) -> None:
    cluster.refused = {"nodes-1": "data.train: is broken", "nodes-4": "memory: 3 GiB too much"}
    with pytest.raises(ConfigError) as found:
        scale_run.scale(settings(tmp_path, "nodes=1,2,4"), CHOICE, None, wait=False)
    assert found.value.problems == ["nodes-1: data.train: is broken", "nodes-1, nodes-4: slurm: no such partition",
                                    "nodes-4: memory: 3 GiB too much"]  # fmt: skip
    assert cluster.queued == []


def test_without_slurm_a_point_waits_for_the_one_before(tmp_path: Path, cluster: Cluster) -> None:
    scale_run.scale(settings(tmp_path, "nodes=1,2", "tracking.uri=none"), CHOICE, None, wait=False)
    assert cluster.lines == [None, None]
    cluster.queued.clear()
    words = settings(tmp_path / "here", "slurm.tasks_per_node=1,2", "slurm.executor=local", "tracking.uri=none")
    scale_run.scale(words, CHOICE, None, wait=False)
    line, (_, points) = cluster.lines[2], read_points(words, 30, "per-process")
    assert line is not None and cluster.lines[3] is line, "all are in one"
    place = tmp_path / "here" / "runs" / "slurm" / "place"
    assert line.words(points[0].cfg, points[0].folder, 7)[3:] == ["7", "", str(place), ""], "which has one place"


def test_a_wait_ends_with_the_names_of_what_has_no_result(
    tmp_path: Path, cluster: Cluster, monkeypatch, capsys
) -> None:
    runs, seen = tmp_path / "runs", []

    def look(run: Path) -> Any:
        seen.append(run.name)
        if len(seen) > 6:  # three rounds later
            cluster.end(runs / "nodes-1", speed=50.0)
            cluster.end(runs / "nodes-2", speed=None)
        return status.look(run)

    monkeypatch.setattr(scale, "look", look)
    with pytest.raises(RunFailed, match="1 of 2 points have no result: nodes-2; the same command queues them again"):
        scale_run.scale(settings(tmp_path, "nodes=1,2", "tracking.uri=none"), CHOICE, None, wait=True)
    assert "nodes-2: rank 1 was killed" in capsys.readouterr().out and len(seen) > 6


def test_a_wait_does_not_take_a_silent_slurm_for_the_end(tmp_path: Path, cluster: Cluster, monkeypatch) -> None:
    _, points = read_points(settings(tmp_path, "nodes=1,2"), 30, "fixed")
    for point in points:
        cluster.submit(point.cfg)
    cluster.states.clear()
    rounds = iter(range(9))

    def sleep(_: float) -> None:
        if next(rounds) == 3:
            for point in points:
                cluster.end(point.folder, speed=1.0)

    monkeypatch.setattr(scale, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
    assert [one.state for one in scale.follow(points)] == ["done", "done"] and next(rounds) == 4
    for point in points:
        (point.folder / "why_stopped.json").unlink()
    cluster.states.clear()
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(scale, "time", SimpleNamespace(sleep=lambda _: None, monotonic=lambda: float(next(clock))))
    assert [one.state for one in scale.follow(points)] == ["failed", "failed"], "it cannot last for ever either"


def test_points_of_other_settings_are_not_mixed(tmp_path: Path, cluster: Cluster) -> None:
    words = settings(tmp_path, "nodes=1,2", "tracking.uri=none")
    scale_run.scale(words, CHOICE, None, wait=False)
    cluster.end(tmp_path / "runs" / "nodes-1", speed=50.0)
    with pytest.raises(
        ConfigError, match=r"nodes-1, nodes-2: was measured with engine.compile = False \(not True\); choose"
    ):
        scale_run.scale([*words, "engine.compile=true"], CHOICE, None, wait=False)
    with pytest.raises(ConfigError, match=r"train.steps = 30 \(not 40\)"):
        scale_run.scale(words, Choice(40, 10, "per-process", {}), None, wait=False)
    free = ["nodes=1,2,4", "slurm.time=60", "slurm.gpu=H100", "slurm.signal_lead_s=150"]
    scale_run.scale([*words[:-2], *free, "tracking.uri=none"], CHOICE, None, wait=False)
    assert cluster.queued == ["nodes-1", "nodes-2", "nodes-4"]


def test_a_run_too_short_to_measure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="--steps 19: leaves nothing to measure after --warmup 11; set it to 20 or more"
    ):
        scale_run.scale(settings(tmp_path, "nodes=1,2"), Choice(19, 11, "fixed", {}), None, wait=False)
    assert Choice(50, 11, "fixed", {}).title == "strong scaling (one batch for all), medians of steps 16 to 50"


def test_mfu_and_the_share_of_the_estimate_are_told_where_the_gpu_is_known(tmp_path: Path, cluster: Cluster) -> None:
    _, points = read_points(settings(tmp_path, "nodes=1,2", "slurm.gpus_per_node=2", "slurm.gpu=V100"), 30, "fixed")
    cluster.submit(points[1].cfg)
    cluster.end(points[1].folder, speed=1000.0)
    missing, found = (scale_table.row_of(one, 10, {"mfu": 0.5}) for one in scale.find(points))
    predicted = scale_table.predict(points[1].cfg, {"mfu": 0.5})
    assert predicted is not None and found.of_estimate == pytest.approx(1000 / predicted.images_per_s)
    assert found.mfu == pytest.approx(1000 * flops_per_image(points[1].cfg).step / (4 * 15.7e12))
    assert (missing.state, missing.mfu, missing.processes, missing.micro_batch) == ("missing", None, 2, 32)
    assert missing.estimate_images_per_s is not None and missing.estimate_gib is not None


def test_the_figure_shows_speed_and_efficiency_of_each_series() -> None:
    figure = draw(compare(ROWS), "weak scaling")
    above, below = figure.axes
    assert (above.get_xscale(), above.get_yscale(), above.get_ylabel()) == ("log", "log", "images/s, all processes")
    assert below.get_xlabel() == "processes" and list(below.get_xticks()) == [1, 2, 4, 8]
    lines = [line for line in above.lines if line.get_gid() == "ideal"]
    assert [list(line.get_ydata()) for line in lines] == [[100, 200, 400], [50, 200]], "c has no smallest point"
    assert [line.get_linestyle() for line in lines] == ["--"] * 2
    estimates = [line for line in above.lines if line.get_gid() == "estimate" and np.isfinite(line.get_ydata()).any()]
    assert [list(line.get_ydata()) for line in estimates] == [[100, 200, 300]] and estimates[0].get_linestyle() == ":"
    shares = [list(line.get_ydata()) for line in below.lines if line.get_gid() == "measured"]
    assert shares[0] == pytest.approx([100, 90, 60]) and math.isnan(shares[2][1])
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert (
        legend == ["a", "b", "c", "measured", "ideal", "estimate"]
        and figure.get_suptitle() == "weak scaling; bars: 5 to 95 % of them"
    )
    plain = draw(compare([row("x", "mae", 1, 5.0)]), "one")
    assert [text.get_text() for text in plain.legends[0].texts] == ["mae", "measured", "ideal"]


def test_mlflow_has_one_run_with_a_point_for_each_number_of_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "runs" / "scale"
    folder.mkdir(parents=True)
    (folder / "scale.json").write_text("{}")
    cfg = load_config(["cifar10/mae"], ["data.loader=synthetic", f"run.dir={folder}"])
    rows = compare(ROWS)
    for some in (rows[:3], rows, rows):
        publish(folder, cfg, some, [folder / "scale.json"], {"steps": "30"})
    with sqlite3.connect(tmp_path / "runs" / "mlflow.db") as database:
        assert database.execute("select name, status from runs").fetchall() == [("scale", "RUNNING")], (
            "one point is missing"
        )
        metrics = database.execute(
            "select key, step, value from metrics where key like 'images_per_s/%' order by key, step"
        ).fetchall()
        assert database.execute("select key, value from params").fetchall() == [("steps", "30")]
    assert metrics == [("images_per_s/a", 1, 100.0), ("images_per_s/a", 2, 180.0), ("images_per_s/a", 4, 240.0),
                       ("images_per_s/b", 2, 50.0), ("images_per_s/b", 8, 150.0), ("images_per_s/c", 2, 70.0)]  # fmt: skip
    assert [path.name for path in (tmp_path / "runs" / "mlartifacts").rglob("*.json")] == ["scale.json"]


def test_a_store_that_does_not_answer_is_named(tmp_path: Path) -> None:
    cfg = load_config(
        ["cifar10/mae"], ["data.loader=synthetic", f"run.dir={tmp_path}", "tracking.uri=sqlite:////proc/no/m.db"]
    )
    with pytest.raises(RunFailed, match="not sent to MLflow: .*call again, or set tracking.uri=none"):
        publish(tmp_path, cfg, compare(ROWS), [], {})


def test_scale_needs_no_torch(tmp_path: Path) -> None:
    code = ("import sys\nfrom pipeline.cli import main\n"
            f"sys.argv = ['patchmill', 'scale', {', '.join(map(repr, settings(tmp_path, 'nodes=1,2')))}]\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
            "assert not {'torch', 'mlflow', 'ffcv', 'matplotlib'} & sys.modules.keys()\n")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert "nodes-1, nodes-2: sbatch is not on this host" in done.stderr
