"""Runs side by side: every figure against hand-made logs, whatever was restarted, rolled back or cut off in them."""

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.compare import describe, differing, metrics, names_of, notes, read_runs, show, stores, window_means
from pipeline.compare_figure import draw, smooth
from pipeline.config import Config, UserError
from pipeline.history import History, read_folder
from pipeline.runlog import DISCARDED, LOG
from pipeline.tracking import sync

BATCH, FLOPS = 8, 1e9
Line = dict[str, Any]
Write = Callable[..., Path]


def turn(kind: str, time: float, step: int, processes: int = 1, engine: str = "single") -> Line:
    return {"kind": kind, "time": time, "step": step, "total_steps": 10, "flops_per_image": FLOPS, "engine": engine,
            "processes": processes, "precision": "fp32"}  # fmt: skip


def steps(first: int, last: int, time: float, loss: Callable[[int], Any] = lambda step: 10 / step) -> list[Line]:
    """A line a step, ten seconds apart from ``time`` on."""
    return [{"kind": "train", "time": time + 10 * (step - first), "step": step, "samples_seen": step * BATCH,
             "loss": loss(step), "images_per_s": 100 * step**2} for step in range(first, last + 1)]  # fmt: skip


def stop(time: float, step: int, reason: str) -> Line:
    return {"kind": "stop", "time": time, "step": step, "reason": reason}


def note(time: float, step: int, **values: float) -> Line:
    return {"kind": "eval", "time": time, "step": step, **values}


def dump(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def write(tmp_path: Path, tiny_config: Callable[..., Config]) -> Write:
    def write_run(name: str, lines: Sequence[Line], gone: Sequence[Line] = (), tail: str = "", method: str = "mae",
                  why: Line | None = None, **overrides: Any) -> Path:  # fmt: skip
        folder = tmp_path / name
        folder.mkdir(parents=True)
        cfg = tiny_config(method, run__dir=str(folder), tracking__uri="none", **overrides)
        (folder / "config.yaml").write_text(cfg.to_yaml())
        (folder / LOG).write_text(dump(lines) + tail)
        if gone:
            (folder / DISCARDED).write_text(dump(gone))
        if why:
            (folder / "why_stopped.json").write_text(json.dumps(why))
        return folder

    return write_run


BEGINNING = [turn("start", 1000, 0, 2, "ddp"), *steps(1, 4, 1010), {"kind": "checkpoint", "time": 1041, "step": 4}]
LOST = steps(5, 6, 1050, lambda step: 77.0)
END = [turn("resume", 2000, 4), *steps(5, 8, 2010), {"kind": "skip", "time": 2030, "step": 7},
       stop(2041, 8, "stopped by SIGTERM"), note(90_000, 8, knn_model=61.5)]  # fmt: skip


@pytest.fixture
def resumed(write: Write) -> Path:
    """Two processes, killed at step 6; went on from step 4 as one process; a later line is cut off."""
    return write("resumed", [*BEGINNING, *END], LOST, tail='{"kind": "tra')


@pytest.fixture
def rolled_back(write: Write) -> Path:
    """Four processes; steps 5 and 6 were not finite and done again with other batches; to the end."""
    gone = [line for step in (5, 6) for line in ({"kind": "skip", "time": 1000 + 10 * step, "step": step},
                                                 *steps(step, step, 1000 + 10 * step, lambda _: "NaN"))]  # fmt: skip
    lines = [turn("start", 1000, 0, 4, "fsdp2"), *steps(1, 4, 1010),
             {"kind": "rollback", "time": 1065, "step": 4, "first": 5, "last": 6},
             *steps(5, 10, 1070, lambda step: 0.1), stop(1121, 10, "done")]  # fmt: skip
    return write("back", lines, gone, method="pcae", why={"done": True, "reason": "done", "step": 10, "restarts": 0})


# What a run is


def test_what_a_resumed_run_is(resumed: Path) -> None:
    run = read_folder(resumed)
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run.loss == pytest.approx([10 / step for step in range(1, 9)])
    assert describe(run) == {
        "run": str(resumed), "method": "mae", "model": "vit_p", "step": "8 of 10", "images seen": "64", "FLOPs so far": "6.4e+10",
        "engine": "ddp, then single", "processes": "2, then 1", "precision": "fp32",
        # 1000 to 1060, the last line that was discarded, and 2000 to 2041, the stop line: not the probe of a day later.
        "hours trained": f"{(60 + 41) / 3600:.3g}", "process-hours": f"{(60 * 2 + 41) / 3600:.3g}",
        "images/s (median)": "2,050.0", "restarts": "1", "roll-backs": "0", "skipped steps": "1", "ended": "stopped by SIGTERM",
        "device": "-", "MLflow run": "-",
    }  # fmt: skip


def test_process_hours_grow_through_restarts(resumed: Path) -> None:
    at = read_folder(resumed).hours * 3600
    assert at.tolist() == pytest.approx([20, 40, 60, 80, 120 + 10, 120 + 20, 120 + 30, 120 + 40])


def test_images_and_flops_at_each_step(resumed: Path) -> None:
    run = read_folder(resumed)
    assert run.images.tolist() == [8 * step for step in range(1, 9)]
    assert run.flops.tolist() == [8 * step * FLOPS for step in range(1, 9)]


def test_what_a_rolled_back_run_is(rolled_back: Path) -> None:
    run = read_folder(rolled_back)
    assert run.steps.tolist() == list(range(1, 11)) and run.loss[4:].tolist() == [0.1] * 6
    assert run.hours[[3, 4, 9]].tolist() == pytest.approx([40 * 4 / 3600, 70 * 4 / 3600, 120 * 4 / 3600])
    found = describe(run)
    told = {key: found[key] for key in ("method", "step", "engine", "processes", "process-hours", "restarts", "roll-backs",
                                        "skipped steps", "ended")}  # fmt: skip
    assert told == {"method": "pcae", "step": "10 of 10", "engine": "fsdp2", "processes": "4",
                    "process-hours": f"{121 * 4 / 3600:.3g}", "restarts": "0", "roll-backs": "1", "skipped steps": "0",
                    "ended": "done"}  # fmt: skip


def test_lines_that_a_restart_left_in_the_log_count_as_those_that_it_discarded(write: Write, resumed: Path) -> None:
    left = read_folder(write("left", [*BEGINNING, *LOST, *END]))
    moved = read_folder(resumed)
    assert left.facts == moved.facts and left.loss.tolist() == moved.loss.tolist()
    assert left.hours.tolist() == moved.hours.tolist()


def test_lines_that_a_roll_back_left_in_the_log_do_not_count(write: Write) -> None:
    back = {"kind": "rollback", "time": 65, "step": 4, "first": 5, "last": 6}
    assert read_folder(write("left", [turn("start", 0, 0), *steps(1, 6, 10), back])).steps.tolist() == [1, 2, 3, 4]


def test_a_session_lasts_to_its_last_held_out_loss(write: Write) -> None:
    run = read_folder(write("run", [turn("start", 0, 0), *steps(1, 2, 10), note(50, 2, heldout_loss=1.0)]))
    assert run.facts["hours"] == 50 / 3600


def test_online_signals_are_scores_and_the_trainers_own(write: Write) -> None:
    rows = [note(at, step, online_knn=knn, effective_rank=9.0, mean_cosine=cosine, online_images=8, online_s=2.0, collapse="so")
            for at, step, knn, cosine in ((25, 2, 40.0, 0.5), (60, 4, 30.0, 0.9))]  # fmt: skip
    run = read_folder(write("run", [turn("start", 0, 0), *steps(1, 4, 10), *rows]))
    assert run.facts["hours"] == 60 / 3600
    found = metrics(run)
    assert list(found) == ["loss", "effective_rank", "mean_cosine", "online_knn"]
    assert (found["online_knn"]["best"], found["mean_cosine"]["best"], found["mean_cosine"]["last"]) == (40, 0.5, 0.9)


def test_lines_before_the_first_start_have_no_process_hours(write: Write) -> None:
    hours = read_folder(write("run", [*steps(1, 2, 10), turn("resume", 30, 2), *steps(3, 3, 40)])).hours
    assert np.isnan(hours[:2]).all() and hours[2] == 10 / 3600


def test_a_step_that_is_there_twice_counts_once(write: Write) -> None:
    run = read_folder(write("twice", [turn("start", 0, 0), *steps(1, 4, 10), *steps(3, 4, 60, lambda step: 1.0)]))
    assert run.steps.tolist() == [1, 2, 3, 4] and run.loss.tolist() == [10, 5, 1, 1]


def test_an_older_log_without_engine_and_processes(write: Write, tiny_config: Callable[..., Config]) -> None:
    lines = [{"kind": "start", "time": 0, "step": 0, "total_steps": 10}, *steps(1, 4, 10)]
    for line in lines:
        line.pop("samples_seen", None)
    run = read_folder(write("old", lines))
    found = describe(run)
    assert [found[key] for key in ("engine", "processes", "precision", "process-hours")] == ["-"] * 4
    assert found["hours trained"] == f"{40 / 3600:.3g}" and np.isnan(run.hours).all()
    assert found["images seen"] == "32"  # of the configuration's batch
    from pipeline.estimate import flops_per_image

    assert run.facts["flops"] == 32 * flops_per_image(tiny_config("mae")).step


def test_an_older_session_makes_process_hours_unknown(write: Write) -> None:
    older = {"kind": "start", "time": 0, "step": 0, "total_steps": 10}
    found = describe(
        read_folder(write("mixed", [older, *steps(1, 2, 10), turn("resume", 100, 2, 2, "ddp"), *steps(3, 4, 110)]))
    )
    assert (found["processes"], found["engine"], found["process-hours"]) == ("-, then 2", "-, then ddp", "-")


def test_a_run_without_training_lines(write: Write, resumed: Path) -> None:
    found = describe(read_folder(write("empty", [])))
    assert found["method"] == "mae" and found["step"] == "- of 10"
    assert {found[key] for key in ("images seen", "FLOPs so far", "engine", "hours trained", "process-hours", "restarts",
                                   "images/s (median)", "roll-backs", "skipped steps", "ended")} == {"-"}  # fmt: skip
    (write("refused", []) / LOG).unlink()
    result = CliRunner().invoke(app, ["compare", str(resumed), str(resumed.parent / "refused")])
    assert result.exit_code == 0 and row(result.output, "loss, last") == [
        "3.397 (8)",
        "-",
    ]  # 10 (1 + 1/2 + ... + 1/8) / 8


@pytest.mark.parametrize(
    ("last", "why", "said"),
    [
        ([stop(20, 1, "done")], {"reason": "done", "restarts": 0}, "done"),
        ([stop(20, 1, "done")], {"reason": "done, but the last state could not be saved", "restarts": 0},
         "done, but the last state could not be saved"),
        ([stop(20, 1, "RunFailed: a\n b")], None, "RunFailed: a b"),
        ([], {"reason": "the disk is gone", "restarts": 0}, "the disk is gone"),
        ([stop(20, 1, "stopped by SIGINT"), turn("resume", 30, 1)], {"reason": "stopped by SIGINT", "restarts": 0}, "running or"),
    ],
)  # fmt: skip
def test_how_it_ended(write: Write, last: list[Line], why: Line | None, said: str) -> None:
    found = describe(read_folder(write("run", [turn("start", 0, 0), *steps(1, 1, 10), *last], why=why)))["ended"]
    assert found.startswith(said) and (said == "running or" or found == said)


# Parameters


def test_only_the_parameters_that_differ(write: Write) -> None:
    one = write("one", [], optim__base_lr=1e-3, train__seed=1)
    other = write("other", [], optim__base_lr=2e-3, train__seed=1)
    assert differing([read_folder(one), read_folder(other)]) == {"optim.base_lr": ["0.001", "0.002"]}


def test_parameters_of_different_methods(resumed: Path, rolled_back: Path) -> None:
    found = differing([read_folder(resumed), read_folder(rolled_back)])
    assert found["method.name"] == ["mae", "pcae"] and found["method.stages"] == [None, "3"]
    assert found["optim.ema"] == ["null", "0.99"] and "run.dir" not in found and "method.mask_ratio" not in found


def test_a_configuration_of_another_version_is_shown_as_it_stands(write: Write, resumed: Path) -> None:
    (resumed.parent / "future").mkdir()
    text = (resumed / "config.yaml").read_text().replace("\n  seed: 0", "\n  seed: 5\n  novelty: 1")
    (resumed.parent / "future" / "config.yaml").write_text(text.replace("/resumed", "/future"))
    found = differing([read_folder(resumed), read_folder(resumed.parent / "future")])
    assert found == {"train.seed": ["0", "5"], "train.novelty": [None, "1"]}


def test_a_run_without_a_configuration_differs_in_nothing_that_is_known(write: Write) -> None:
    one, other, bare = write("one", []), write("other", [], train__seed=1), write("bare", [turn("start", 0, 0)])
    (bare / "config.yaml").unlink()
    assert differing([read_folder(one), read_folder(bare)]) == {}
    assert differing([read_folder(path) for path in (one, bare, other)]) == {"train.seed": ["0", None, "1"]}


def test_passwords_are_not_shown(write: Write) -> None:
    one, other = write("one", []), write("other", [])
    config = (other / "config.yaml").read_text().replace("uri: none", "uri: http://me:secret@host:5000")
    (other / "config.yaml").write_text(config)
    assert differing([read_folder(one), read_folder(other)]) == {"tracking.uri": ["none", "http://host:5000"]}


# Metrics


def test_window_means_by_hand() -> None:
    assert window_means(np.array([1.0, 2, 3, 6]), 2).tolist() == [1.5, 2.5, 4.5]
    assert window_means(np.array([1.0, math.nan, 3, math.inf]), 2).tolist() == [1, 3, 3]
    assert window_means(np.array([1.0, 2]), 50).tolist() == [1.5]
    assert np.isnan(window_means(np.array([math.nan]), 50)).all() and len(window_means(np.array([]), 50)) == 0


def test_last_and_best_of_loss_are_means_of_fifty_lines(write: Write) -> None:
    run = read_folder(write("rising", [turn("start", 0, 0), *steps(1, 60, 10, float)]))
    assert metrics(run) == {"loss": {"last": 35.5, "last_step": 60, "best": 25.5, "best_step": 50}}


def test_held_out_loss_and_probes(write: Write) -> None:
    held = [
        note(15 + step, step, heldout_loss=loss, heldout_images=8) for step, loss in ((2, 1.0), (4, 0.5), (6, 0.75))
    ]
    probes = [
        note(100, 2, knn_model=50.0),
        note(101, 4, knn_model=60.0),
        note(102, 6, knn_model=55.0),
        note(103, 0, linear_untrained=9.0),
    ]
    found = metrics(read_folder(write("probed", [turn("start", 0, 0), *steps(1, 6, 10), *held, *probes])))
    assert list(found) == ["loss", "heldout_loss", "knn_model", "linear_untrained"]
    assert found["heldout_loss"] == {"last": 0.75, "last_step": 6, "best": 0.5, "best_step": 4}
    assert found["knn_model"] == {"last": 55, "last_step": 6, "best": 60, "best_step": 4}


def test_the_least_loss_is_the_best_and_of_two_probes_of_a_step_the_latest_counts(write: Write) -> None:
    tested = [
        note(20, 2, val_loss=2.0, val_loss_ema=1.5, val_top1=30.0),
        note(21, 4, val_loss=1.0, val_loss_ema=1.7, val_top1=20.0),
    ]
    probed = [note(30, 4, knn_model=70.0), note(31, 4, knn_model=60.0)]
    run = write(
        "tuned", [turn("start", 0, 0), *steps(1, 6, 10), *tested, *probed], method="finetune", method__num_classes=4
    )
    found = metrics(read_folder(run))
    assert (found["val_loss"]["best"], found["val_loss_ema"]["best"], found["val_top1"]["best"]) == (1.0, 1.5, 30.0)
    assert (found["knn_model"]["best"], found["knn_model"]["last"]) == (60.0, 60.0)
    other = write("other", [turn("start", 0, 0), *steps(1, 6, 10)])
    output = CliRunner().invoke(app, ["compare", str(run), str(other)]).output
    assert row(output, "val_loss_ema, best (chosen on data.val)") == ["1.5 (2)", "-"]
    assert row(output, "knn_model, last") == ["60.00 (4)", "-"] and "knn_model, best" not in output, "it is the same"


def test_a_probe_of_changed_settings_is_told_below_the_tables(write: Write, tmp_path: Path) -> None:
    changed = note(30, 6, knn_model=70.0) | {"changed": {"eval.knn_k": 3}}
    one = write("one", [turn("start", 0, 0), *steps(1, 6, 10), note(20, 6, linear_model=5.0), changed])
    two = write("two", [turn("start", 0, 0), *steps(1, 6, 10), changed, note(31, 6, knn_model=60.0)])
    output = CliRunner().invoke(app, ["compare", str(one), str(two), "--json", str(tmp_path / "a.json")]).output
    assert "one: knn_model was measured with eval.knn_k=3" in output and output.count("was measured with") == 1
    runs = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert [run["changed"] for run in runs] == [{"knn_model": {"eval.knn_k": 3}}, {}]


def test_what_was_rolled_back_is_no_best_held_out_loss(write: Write) -> None:
    lines = [*BEGINNING, *LOST, note(1061, 6, heldout_loss=0.01), *END, note(2041, 8, heldout_loss=0.5)]
    assert metrics(read_folder(write("run", lines)))["heldout_loss"]["best"] == 0.5


# The verb


def row(output: str, heading: str) -> list[str]:
    (line,) = (line for line in output.splitlines() if line.startswith(f"{heading}  "))
    return [cell.strip() for cell in line[len(heading) :].split("  ") if cell.strip()]


def test_the_tables_where_there_is_no_terminal(resumed: Path, rolled_back: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(resumed), str(rolled_back)])
    assert result.exit_code == 0, result.output
    told = {key: row(result.output, key) for key in ("method.name", "step", "process-hours", "roll-backs", "loss, last",
                                                              "loss, best", "knn_model, last")}  # fmt: skip
    back = (sum(10 / step for step in range(1, 5)) + 6 * 0.1) / 10
    assert told == {
        "method.name": ["mae", "pcae"], "step": ["8 of 10", "10 of 10"], "process-hours": ["0.0447", "0.134"],
        "roll-backs": ["0", "1"], "loss, last": [f"{sum(10 / step for step in range(1, 9)) / 8:.4g} (8)", f"{back:.4g} (10)"],
        "loss, best": ["3.397 (8)", f"{back:.4g} (10)"], "knn_model, last": ["61.50 (8)", "-"],
    }  # fmt: skip
    assert "no common scale" in result.output and "\x1b" not in result.output and "│" not in result.output


def test_without_a_terminal_all_runs_are_in_one_line_and_text_is_shown_as_it_is(write: Write) -> None:
    runs = [str(write(f"run{n}", [], data__train=f"/[red]{n}", data__crop_scale=[0.1 * n, 1.0])) for n in (1, 2, 3)]
    output = CliRunner().invoke(app, ["compare", *runs]).output
    assert row(output, "data.train") == ["/[red]1", "/[red]2", "/[red]3"]
    assert row(output, "data.crop_scale") == ["[0.1, 1.0]", "[0.2, 1.0]", "[0.30000000000000004, 1.0]"]


def test_the_tables_on_a_terminal_are_parted_to_fit(write: Write) -> None:
    runs = [read_folder(write(f"run{number}", [], train__seed=number)) for number in range(8)]
    out = io.StringIO()
    show(runs, Console(file=out, force_terminal=True, width=100, highlight=False))
    lines = out.getvalue().splitlines()
    assert sum("train.seed" in line for line in lines) == 3 and all("…" not in line for line in lines)  # 3 + 3 + 2 runs
    assert "no common scale" not in out.getvalue()


def test_the_same_in_json(resumed: Path, rolled_back: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["compare", str(resumed), str(rolled_back), "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["parameters"]["optim.ema"] == {"resumed": None, "back": 0.99}
    assert found["parameters"]["method.stages"] == {"back": 3}
    one, other = found["runs"]
    assert one["process_hours"] == pytest.approx(161 / 3600) and one["processes"] == [2, 1] and one["images"] == 64
    assert one["metrics"]["knn_model"] == {"last": 61.5, "last_step": 8, "best": 61.5, "best_step": 8}
    assert (other["name"], other["rollbacks"], other["ended"]) == ("back", 1, "done")


def test_a_log_whose_lines_are_of_other_types_is_none(write: Write) -> None:
    wrong = {"kind": "train", "time": None}, {"kind": "train", "time": 1, "step": "x"}, {"kind": 1, "time": 1}
    for number, line in enumerate(wrong):
        with pytest.raises(UserError, match="is not the log of a run"):
            read_folder(write(f"run{number}", [line]))


def test_names_tell_the_runs_apart(write: Write) -> None:
    folders = [write(name, []) for name in ("a/mae", "b/mae", "b/pcae")]
    assert names_of([read_folder(folder) for folder in folders]) == ["a/mae", "b/mae", "pcae"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "two runs or more, not 0"),
        (["back"], "two runs or more, not 1"),
        (["back", "resumed", "back"], "back and back are the same run"),
        (["back", "resumed/../back"], "are the same run"),
        (["back", "nowhere"], "nowhere is no run: no such folder"),
        (["back", "void"], "void is no run folder"),
        (["back", "odd"], "odd/log.jsonl is not the log of a run"),
        (["back", "damaged"], "line 1 is damaged"),
        (["back", "resumed", "--out", "figure.gif"], "name a .png, .pdf, .svg file"),
        (["back", "resumed", "--html", "page.pdf"], "--html page.pdf: name a .html, .htm file"),
        (["back", "resumed", "--html", "no/such.html"], "--html no/such.html: cannot be written (there is no folder no)"),
        (["back", "resumed", "--out", "no/such/figure.png"], "cannot be written (there is no folder no/such)"),
        (["back", "resumed", "--out", "folder.png"], "cannot be written (is a folder)"),
        (["back", "resumed", "--json", "no/such.json"], "--json no/such.json: cannot be written"),
        (["back", "0" * 32, "--uri", "sqlite:///none.db"], "there is no such file"),
        (["back", "0" * 32, "--uri", "sqlite:///void.db"], "holds no MLflow runs"),
        (["back", "0" * 32, "--uri", "sqlite:///text.db"], "cannot be opened"),
        (["back", "0" * 32], "no MLflow store is known"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(resumed: Path, rolled_back: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               arguments: list[str], message: str) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in ("void", "odd", "damaged", "folder.png"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / LOG).write_text('{"loss": 1}\n')
    (tmp_path / "damaged" / LOG).write_text('{"kind\n')
    (tmp_path / "void.db").write_bytes(b"")
    (tmp_path / "text.db").write_text("no database at all " * 100)
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception) and len(str(result.exception).splitlines()) == 1
    assert result.stdout == "" and not (tmp_path / "none.db").exists()  # a warning of the log may be on stderr


def test_a_figure_that_cannot_be_written_in_the_end(resumed: Path, rolled_back: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.asked.replace_file", full)
    result = CliRunner().invoke(app, ["compare", str(resumed), str(rolled_back), "--out", str(tmp_path / "a.png")])
    assert str(result.exception) == f"--out {tmp_path / 'a.png'}: cannot be written (No space left on device)"


# MLflow


def test_a_run_of_mlflow_beside_a_folder(
    write: Write, resumed: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    lines = [turn("start", 1000, 0), *steps(1, 4, 1010), note(1041, 4, heldout_loss=0.5), stop(1042, 4, "done"),
             note(2000, 4, knn_model=40.0)]  # fmt: skip
    sent = write("sent", lines, optim__base_lr=1e-3, why={"done": True, "reason": "done", "restarts": 0})
    run_id = sync(sent, uri).run_id
    one, other = read_runs([str(resumed), run_id])  # in mlflow.db beside the folder
    assert differing([one, other]) == {"optim.base_lr": ["0.00015", "0.001"]}
    assert other.loss.tolist() == [10, 5, 10 / 3, 2.5] and other.images.tolist() == [8, 16, 24, 32]
    found = describe(other)
    assert found["run"] == f"{run_id} in {uri}" and found["ended"] == "finished"
    assert (found["method"], found["step"], found["images/s (median)"]) == ("mae", "4 of 10", "650.0")
    assert {
        found[key] for key in ("engine", "processes", "process-hours", "restarts", "roll-backs", "skipped steps")
    } == {"-"}
    assert metrics(other)["knn_model"]["last"] == 40 and metrics(other)["heldout_loss"]["best"] == 0.5
    assert names_of([one, other]) == ["resumed", "sent"]
    assert any("MLflow" in line for line in notes([one, other])) and not any("MLflow" in line for line in notes([one]))

    with pytest.raises(UserError, match=f"sent and {run_id} are the same run"):
        read_runs([str(sent), run_id])
    with pytest.raises(UserError, match="are the same run"):
        read_runs([run_id, run_id], uri)
    with pytest.raises(UserError, match=f"{'0' * 32}: no such run in MLflow"):
        read_runs([str(sent), "0" * 32], uri)


def test_a_store_that_does_not_answer(resumed: Path, closed_port: str) -> None:
    with pytest.raises(UserError, match="cannot be reached or refuses"):
        read_runs([str(resumed), "0" * 32], closed_port)


def test_where_ids_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert stores(None, [tmp_path / "a/run"]) == []
    for folder in ("a", "runs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mlflow.db").touch()
    assert stores(None, [Path("a/run"), Path("a/other")]) == [
        f"sqlite:///{tmp_path}/{name}/mlflow.db" for name in ("a", "runs")
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert stores(None, [Path("a/run")]) == ["http://server:5000"]
    assert stores("sqlite:///b.db", []) == [f"sqlite:///{tmp_path}/b.db"]


# The figure


def lines_of(axes: Any, gid: str) -> list[Any]:
    return [line for line in axes.lines if line.get_gid() == gid]


def test_the_figure_has_four_panels_of_losses_and_four_of_probes(resumed: Path, rolled_back: Path) -> None:
    runs = [read_folder(resumed), read_folder(rolled_back)]
    figure = draw(runs, ["one", "two"])
    assert [axes.get_xlabel() for axes in figure.axes] == ["steps", "images seen", "FLOPs so far", "process-hours"] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "", "loss", ""] + ["top-1 %", "", "top-1 %", ""]
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 4 + ["linear"] * 4
    for axes, name in zip(figure.axes, ("steps", "images", "flops", "hours"), strict=False):
        for run, line, raw in zip(runs, lines_of(axes, "loss"), lines_of(axes, "raw"), strict=True):
            assert line.get_xdata().tolist() == raw.get_xdata().tolist() == getattr(run, name).tolist()
            assert (
                raw.get_ydata().tolist() == run.loss.tolist() and line.get_ydata().tolist() == smooth(run.loss).tolist()
            )
            assert raw.get_alpha() < 0.5 and line.get_color() == raw.get_color()
        assert axes.get_title(loc="right") == ""
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "knn"]


def test_the_held_out_loss_is_drawn_where_it_was_taken(write: Write) -> None:
    lines = [turn("start", 0, 0, 2), *steps(1, 6, 10), note(45, 4, heldout_loss=0.5)]
    runs = [read_folder(write(name, lines)) for name in ("a", "b")]
    figure = draw(runs, ["a", "b"])
    for axes, at in zip(figure.axes, (4, 32, 32 * FLOPS, 40 * 2 / 3600), strict=True):
        (line, _) = lines_of(axes, "heldout")
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([pytest.approx(at)], [0.5])
    assert figure.legends[0].get_texts()[-1].get_text() == "held-out loss"


def test_a_panel_says_what_is_not_known(write: Write, resumed: Path) -> None:
    old = read_folder(write("old", [{"kind": "start", "time": 0, "step": 0}, *steps(1, 4, 10)]))
    figure = draw([read_folder(resumed), old], ["new", "old"])
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["", "", "", "not known of old"] * 2
    nothing = [read_folder(write(name, [])) for name in ("x", "y")]
    assert {axes.get_title(loc="right") for axes in draw(nothing, ["x", "y"]).axes} == {"not known of x, y"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("loss", "low", "high"),
    [(lambda step: 1 + step / 10, 1.075, 1.625), (lambda step: 3.0 - step, -3.25, 2.25), (lambda step: step - 1.0, -0.25, 5.25),
     (lambda step: 1.0, 0.95, 1.05), (lambda step: 0.0, -0.05, 0.05)],
    ids=["flat", "negative", "from zero", "constant", "zero"],
)  # fmt: skip
def test_a_loss_axis_is_linear_where_a_logarithm_helps_nobody(
    write: Write, loss: Callable[[int], float], low: float, high: float
) -> None:
    run = read_folder(write("run", [turn("start", 0, 0), *steps(1, 6, 10, loss)]))
    axes = draw([run, run], ["a", "b"]).axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim() == pytest.approx((low, high))


def test_spikes_do_not_stretch_the_loss_axis(write: Write) -> None:
    run = read_folder(
        write("spike", [turn("start", 0, 0), *steps(1, 2000, 10, lambda step: 1e6 if step == 99 else 1 + 9 / step)])
    )
    means = smooth(run.loss)
    assert draw([run, run], ["a", "b"]).axes[0].get_ylim()[1] < 1.1 * np.nanmax(means)
    assert means.max() < 3e4


def test_smoothing_by_hand() -> None:
    values = np.arange(160.0)  # a fortieth: 4 values, two to each side
    values[[80, 90]] = math.nan, math.inf
    means = smooth(values)
    assert means[:3].tolist() == [0, 1, 2] and means[-1] == 159
    assert means[40] == 40 and means[79] == np.mean([77, 78, 79, 81]) and means[80] == np.mean([78, 79, 81, 82])


def test_large_numbers_have_their_power_in_the_label(write: Write) -> None:
    run = read_folder(write("large", [turn("start", 0, 0) | {"flops_per_image": 1e15}, *steps(1, 6, 10)]))
    axes = draw([run, run], ["a", "b"]).axes[2]
    assert axes.get_xlabel() == "FLOPs so far, $10^{15}$"
    assert axes.xaxis.get_major_formatter()(20e15, 0) == "20"


def test_eight_runs_have_eight_colours_and_whole_names_on_the_picture(write: Write) -> None:
    runs: list[History] = []
    for number in range(8):
        name = f"imagenet_pcae_vit_l_with_a_long_name_that_goes_on_and_on_{number}"
        runs.append(read_folder(write(name, [turn("start", 0, 0), *steps(1, 9, 10, lambda step: 5 / step + 1)])))
    figure = draw(runs, names_of(runs))
    figure.draw_without_rendering()
    assert len({line.get_color() for line in lines_of(figure.axes[0], "loss")}) == 8
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.width and len({text.get_text() for text in legend.get_texts()}) == 8
    for axes in figure.axes:
        assert axes.get_tightbbox().y0 >= box.y1  # the legend lies on no panel


def test_names_are_not_shortened_to_the_same(write: Write) -> None:
    run = read_folder(write("run", [turn("start", 0, 0), *steps(1, 9, 10)]))
    names = [f"{'a' * 30}{middle}{'b' * 30}" for middle in "12"]
    assert [text.get_text() for text in draw([run] * 2, names).legends[0].get_texts()] == names


def test_more_runs_than_colours_differ_by_their_lines(write: Write) -> None:
    run = read_folder(write("run", [turn("start", 0, 0), *steps(1, 9, 10)]))
    found = lines_of(draw([run] * 12, [str(number) for number in range(12)]).axes[0], "loss")
    assert len({(line.get_color(), line.get_linestyle()) for line in found}) == 12


def test_long_logs_are_thinned_for_the_picture(write: Write) -> None:
    run = read_folder(write("long", [turn("start", 0, 0), *steps(1, 9000, 10)]))
    for gid in ("raw", "loss"):
        assert len(lines_of(draw([run, run], ["a", "b"]).axes[0], gid)[0].get_xdata()) == 3000


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_figure_is_written_where_it_is_asked_for(
    resumed: Path, rolled_back: Path, tmp_path: Path, suffix: str, magic: bytes
) -> None:
    path = tmp_path / f"figure{suffix}"
    result = CliRunner().invoke(app, ["compare", str(resumed), str(rolled_back), "--out", str(path)])
    assert result.exit_code == 0 and path.read_bytes().startswith(magic) and f"drawn in {path}" in result.output


def test_a_folder_of_runs_is_its_runs(write: Write, tmp_path: Path) -> None:
    for name in ("lr/001", "lr/000", "one"):
        write(name, [turn("start", 0, 0), *steps(1, 3, 10), stop(40, 3, "done")])
    (tmp_path / "lr" / "slurm").mkdir()
    found = read_runs([str(tmp_path / "lr"), str(tmp_path / "one")])
    assert [run.params["run.dir"] for run in found] == [str(tmp_path / name) for name in ("lr/000", "lr/001", "one")]
