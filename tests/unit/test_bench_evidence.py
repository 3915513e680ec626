"""The evidence benchmark: its rows, its queue (with a stand-in for the trainer), and what it says of whole and partial results."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from image_files import encoded, pixels
from source_files import as_cifar
from typer.testing import CliRunner

from pipeline.bench import evidence, evidence_data, evidence_queue, evidence_report
from pipeline.bench.cli import bench
from pipeline.bench.evidence import Run, num_steps, plan, rows
from pipeline.bench.evidence_figure import draw
from pipeline.bench.evidence_queue import COSTS, Queue, locked
from pipeline.bench.evidence_run import Options, run
from pipeline.config import UserError, load_config
from pipeline.estimate import flops_per_image
from pipeline.metrics import Progress
from pipeline.stop import StopRequest

STUB = Path(__file__).with_name("evidence_stub.py")
ROOT = Path(__file__).resolve().parents[2]
SHORT = ("data.loader=synthetic", "train.epochs=null", "train.steps=20", "optim.warmup_steps=2", "tracking.uri=none")
TWO = ("mae", "randsac_square")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_queue, "command_line", lambda command: [sys.executable, str(STUB), *command.words])
    monkeypatch.setattr(evidence_queue, "POLL_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def short_runs(folder: Path, only: tuple[str, ...] = TWO, seeds: tuple[int, ...] = (0,)) -> list[Run]:
    return plan(folder, rows(only, SHORT), seeds)


def work(folder: Path, runs: list[Run], *, jobs: int = 2, minutes: float | None = None) -> evidence_queue.Outcome:
    with Progress("evidence", None, "CPU s", shown=False) as progress, StopRequest() as stop:
        return Queue(folder, runs, jobs).work(stop, progress, minutes)


def options(folder: Path, **changes: object) -> Options:
    settings = {"changes": SHORT, "data": None, "jobs": 2, "seeds": "0", "only": TWO, "minutes": None, "dry_run": False,
                "report": False, "out": None, "others": ()}  # fmt: skip
    return Options(folder=folder, **(settings | changes))


def trained_steps(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "train"]


def commands_run(folder: Path) -> list[tuple[str, str]]:
    return [(line["run"], line["command"]) for line in map(json.loads, (folder / COSTS).read_text().splitlines())]


def test_the_rows_differ_in_their_method_only():
    found = rows()
    assert {row.name for row in found} >= {"mae", "pcae_similarity", "pcae_random", "randsac_raster", "randsac_random",
                                           "randsac_square", "randsac_blob", "mae_equal_flops"}  # fmt: skip
    whole = [load_config([row.config], [*row.changes, "run.dir=x", "data.train=x"]) for row in found]
    same = [
        cfg.model_dump(exclude={"method": True, "optim": {"ema", "warmup_steps"}, "train": {"epochs", "steps"}})
        for cfg in whole
    ]
    assert all(one == same[0] for one in same)
    assert len({(cfg.method.decoder_depth, cfg.method.decoder_width, cfg.method.decoder_heads) for cfg in whole}) == 1
    equal = [num_steps(cfg) for row, cfg in zip(found, whole, strict=True) if not row.name.endswith("_flops")]
    assert set(equal) == {2 * (50_000 // 64)}
    methods = {row.name: cfg.method for row, cfg in zip(found, whole, strict=True)}
    assert [methods[f"randsac_{order}"].order for order in ("raster", "random", "square")] == [
        "raster",
        "random",
        "hierarchical",
    ]
    assert methods["randsac_blob"].segments == "blob" and methods["pcae_random"].selection == "random"


def test_a_row_at_equal_flops_costs_what_the_reference_does_and_warms_up_as_long():
    by_name = {one.row.name: one for one in plan(Path("runs"), rows(), [0])}
    reference = by_name["randsac_square"]
    for name in ("mae", "pcae_similarity"):
        longer = by_name[f"{name}_equal_flops"]
        batch = 64 * flops_per_image(longer.cfg).step
        assert abs(longer.flops - reference.flops) <= batch / 2 and longer.steps > 2 * by_name[name].steps
        assert longer.cfg.optim.warmup_steps / longer.steps == pytest.approx(156 / 1562, rel=0.01)


def test_untrained_encoders_are_probed_once_a_method_and_seed_and_pixels_once():
    runs = plan(Path("runs"), rows(), [0, 1])
    assert [one.seed for one in runs] == sorted(one.seed for one in runs)
    others = [(one.cfg.method.name, one.seed, weights) for one in runs for weights in one.others]
    assert len(others) == len(set(others)) == 7 and [one[2] for one in others].count("pixels") == 1
    assert {one[:2] for one in others if one[2] == "untrained"} == {
        (m, s) for m in ("mae", "pcae", "randsac") for s in (0, 1)
    }


def test_any_configuration_can_be_a_row_and_a_wrong_name_is_told(tmp_path):
    (one,) = plan(tmp_path, rows(["cifar10/pcae_vit_s"], ["train.epochs=50"]), [3])
    assert one.name == "cifar10_pcae_vit_s-seed3" and (one.steps, one.cfg.train.seed) == (50 * 48, 3)
    assert one.words[-2:] == (f"data.train={tmp_path}/data/train.beton", f"data.val={tmp_path}/data/test.beton")
    with pytest.raises(UserError, match="--only maee: no such row; there are mae, .*mae_equal_flops"):
        rows(["maee"])
    with pytest.raises(UserError, match="no configuration 'cifar10/maee'"):
        rows(["cifar10/maee"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--seeds", "0,x"], "--seeds 0,x: write whole numbers"),
        (["--out", "table.txt"], "name a .json file"),
        (["--report"], "no run there has been probed yet"),
        (["--folder", "/dev/null/x"], "--folder /dev/null/x: cannot be written"),
        (["--only", "mae"], "--data: name the folder that holds CIFAR-10"),
        (["--only", "mae", "--data", "/no/such"], "--data /no/such: holds neither cifar-10-python.tar.gz nor"),
    ],
)
def test_a_wrong_option_is_one_clear_line(words, problem, tmp_path, monkeypatch):
    monkeypatch.delenv("PATCHMILL_DATA", raising=False)
    with pytest.raises(UserError, match=problem):
        CliRunner().invoke(bench, ["evidence", "--folder", str(tmp_path), *words], catch_exceptions=False)


def test_all_is_run_once_and_a_second_call_finds_nothing_to_do(tmp_path, stub):
    runs = short_runs(tmp_path)
    assert work(tmp_path, runs).code == 0
    done = commands_run(tmp_path)
    assert len(done) == len(set(done)) == 2 + 2 * 3 + 3 * 3, "train, three probes of each, untrained twice, pixels"
    for one in runs:
        assert trained_steps(one.folder) == list(range(1, 21))
        assert [command for name, command in done if name == one.name] == [command.name for command in one.commands()]
    assert work(tmp_path, runs).code == 0 and commands_run(tmp_path) == done
    assert all(line["cpu_s"] > 0 for line in map(json.loads, (tmp_path / COSTS).read_text().splitlines()))


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path, stub, capsys):
    (tmp_path / "mae-seed0").mkdir()
    (tmp_path / "mae-seed0" / "fail").touch()
    assert run(options(tmp_path)) == 1
    shown = capsys.readouterr()
    assert "failed: mae-seed0: train ended with 1: patchmill: out of luck" in shown.err
    assert "randsac_square" in shown.out and "untrained randsac vit_p/4" in shown.out and "raw pixels" not in shown.out
    (tmp_path / "mae-seed0" / "fail").unlink()
    assert run(options(tmp_path, jobs=1)) == 0
    assert "raw pixels" in capsys.readouterr().out


def test_the_time_limit_saves_what_runs_and_the_next_call_goes_on(tmp_path, stub, monkeypatch):
    runs = plan(tmp_path, rows(["mae"], [*SHORT[:2], "train.steps=300", *SHORT[3:]]), [0])
    log = runs[0].folder / "log.jsonl"

    def hurried() -> float:
        steps = len(trained_steps(log.parent)) if log.exists() else 0
        return 0 if steps < 5 else 119 * 60 - 1 if steps < 60 else 119 * 60 + 1

    with monkeypatch.context() as patch:
        patch.setattr(evidence_queue.time, "monotonic", hurried)
        outcome = work(tmp_path, runs, minutes=119)
    assert outcome.code == 75 and not outcome.failed
    assert 60 <= len(trained_steps(log.parent)) < 300 and commands_run(tmp_path) == [("mae-seed0", "train")]
    assert work(tmp_path, runs).code == 0
    assert trained_steps(log.parent) == list(range(1, 301))


DRIVER = """
import sys
from pathlib import Path
from pipeline.bench import evidence_queue
from pipeline.bench.evidence_run import Options, run
evidence_queue.command_line = lambda command: [sys.executable, {stub!r}, *command.words]
evidence_queue.POLL_S = 0.02
sys.exit(run(Options({changes!r}, Path({folder!r}), None, 2, "0", ("mae",), None, False, False, None, ())))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 75), (signal.SIGTERM, 75)])
def test_a_queue_that_was_killed_or_stopped_takes_its_processes_along_and_goes_on(number, code, tmp_path, stub):
    changes = (*SHORT[:2], "train.steps=300", *SHORT[3:])
    source = DRIVER.format(stub=str(STUB), folder=str(tmp_path), changes=changes)
    folder = tmp_path / "mae-seed0"
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (folder / "log.jsonl").exists() or len(trained_steps(folder)) < 5:
        time.sleep(0.02)
        assert process.poll() is None
    with pytest.raises(UserError, match="another queue works there"), locked(tmp_path):
        pass
    process.send_signal(number)
    assert process.wait(20) == code
    time.sleep(0.1)
    before = trained_steps(folder)
    time.sleep(0.2)
    assert trained_steps(folder) == before and len(before) < 300, "the trainer went with it"
    runs = plan(tmp_path, rows(["mae"], changes), [0])
    assert work(tmp_path, runs).code == 0 and trained_steps(folder) == list(range(1, 301))
    (row, *_) = evidence_report.summarise(tmp_path, runs)
    assert (row.cpu_s is None) == (number == signal.SIGKILL), "what a killed process has used is not known"


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path, stub):
    work(tmp_path, short_runs(tmp_path))
    (one,) = plan(tmp_path, rows(["mae"], [*SHORT, "train.global_batch=32"]), [0])
    assert not one.trained() and short_runs(tmp_path)[0].trained()
    for how in ({"report": True}, {"dry_run": True}, {}):
        with pytest.raises(
            UserError, match="mae-seed0 has other settings there: train.global_batch = 64 .not 32.; give the"
        ):
            run(options(tmp_path, only=("mae",), changes=(*SHORT, "train.global_batch=32"), **how))
    (tmp_path / "mae-seed0" / "log.jsonl").unlink()  # as a start leaves it that was refused
    assert run(options(tmp_path, only=("mae",), changes=(*SHORT, "train.global_batch=32"), dry_run=True)) == 0


def scored(folder: Path, scores: dict[str, list[float]]) -> list[Run]:
    """Runs whose logs hold these scores: row -> a figure a seed; linear is one more, untrained 20 with the seed."""
    runs = plan(folder, rows(list(scores), SHORT), [0, 1])
    for one in runs:
        if one.seed < len(scores[one.row.name]):
            value = scores[one.row.name][one.seed]
            one.folder.mkdir(parents=True)
            lines = [{"step": 20, "knn_model": 1.0}, {"step": 20, "knn_model": value}, {"step": 10, "linear_heads_model": 99.0},
                     {"step": 20, "linear_heads_model": value + 1, "linear_model": value + 2}]  # fmt: skip
            if "untrained" in one.others:
                lines.append(
                    {
                        "step": 0,
                        "knn_untrained": 20.0 + one.seed,
                        "linear_heads_untrained": 21.0,
                        "linear_untrained": 19.0,
                    }
                )
            if "pixels" in one.others:
                lines.append({"step": 0, "knn_pixels": 32.0, "linear_heads_pixels": 38.0, "linear_pixels": 37.0})
            (one.folder / "log.jsonl").write_text(
                "".join(json.dumps({"kind": "eval", "time": 1, **line}) + "\n" for line in lines)
            )
    return runs


def test_the_report_has_means_spreads_and_gains_seed_by_seed(tmp_path):
    runs = scored(tmp_path, {"mae": [30.0, 34.0], "randsac_square": [36.0]})
    found = {row.name: row for row in evidence_report.summarise(tmp_path, runs)}
    assert list(found) == ["mae", "randsac_square", "untrained mae vit_p/4", "untrained randsac vit_p/4", "raw pixels"]
    mae, square = found["mae"], found["randsac_square"]
    assert (mae.scores["knn"].mean, mae.scores["knn"].spread) == (32.0, 2.0)
    assert mae.scores["linear"].by_seed == {0: 31.0, 1: 35.0}, "of the end of the run, the newest"
    assert mae.scores["exact"].by_seed == {0: 32.0, 1: 36.0} and mae.gains["exact"].by_seed == {0: 13.0, 1: 17.0}
    assert mae.gains["knn"].by_seed == {0: 10.0, 1: 13.0}
    assert square.scores["knn"].by_seed == {0: 36.0} and str(square.scores["knn"]) == "36.00"
    assert str(mae.scores["knn"]) == "32.00 ± 2.00"
    assert mae.images == 20 * 64 and mae.flops == mae.images * mae.flops_per_image and mae.cpu_s is None


def test_an_ordering_is_seen_where_all_seeds_agree_by_more_than_noise(tmp_path):
    runs = scored(tmp_path, {"randsac_raster": [30.0, 34.0], "randsac_random": [31.0, 36.0], "randsac_square": [30.0, 37.0],
                             "randsac_blob": [20.0, 33.0], "mae": [31.0], "pcae_similarity": [50.2, 60.2],
                             "pcae_random": [50.0, 60.0]})  # fmt: skip
    told = {(one.above, one.below): one for one in evidence_report.orderings(evidence_report.summarise(tmp_path, runs))}
    assert set(told) == {
        ("randsac_random", "randsac_raster"),
        ("randsac_square", "randsac_random"),
        ("randsac_square", "mae"),
        ("randsac_blob", "randsac_square"),
        ("pcae_similarity", "pcae_random"),
        ("pcae_similarity", "mae"),
    }
    assert told["randsac_random", "randsac_raster"].verdict == {"knn": "seen", "linear": "seen", "exact": "seen"}
    assert told["randsac_random", "randsac_raster"].differences["knn"] == {0: 1.0, 1: 2.0}
    assert told["randsac_square", "randsac_random"].verdict["knn"] == "open", "the seeds disagree"
    assert told["pcae_similarity", "pcae_random"].verdict["knn"] == "open", "0.2 points are noise"
    assert told["randsac_blob", "randsac_square"].verdict["knn"] == "reversed"
    assert told["randsac_square", "mae"].verdict["knn"] == "open", "a point of one seed is noise"
    assert told["pcae_similarity", "mae"].verdict["knn"] == "seen"
    assert "knn seen (+1.00, +2.00)" in str(told["randsac_random", "randsac_raster"])


def test_a_probe_with_changed_settings_does_not_count(tmp_path):
    runs = scored(tmp_path, {"mae": [30.0, 34.0]})
    with (runs[1].folder / "log.jsonl").open("a") as log:
        log.write(
            json.dumps({"kind": "eval", "time": 2, "step": 20, "knn_model": 99.0, "changed": {"eval.knn_k": 1}}) + "\n"
        )
    assert evidence_report.summarise(tmp_path, runs)[0].scores["knn"].by_seed == {0: 30.0, 1: 34.0}


def test_each_size_of_encoder_has_an_untrained_one_of_its_own():
    runs = plan(Path("x"), rows(["randsac_square", "randsac_blob", "cifar10/randsac_vit_s"]), [0])
    assert [one.others for one in runs] == [("untrained", "pixels"), (), ("untrained",)]
    assert len({evidence_report.untrained(one.encoder) for one in runs}) == 2


def test_two_rows_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text((ROOT / "configs/evidence/mae.yaml").read_text())
    chosen = rows([str(tmp_path / folder / "x.yaml") for folder in ("a", "b")], SHORT)
    with pytest.raises(UserError, match="--only: two rows would be called x"):
        plan(tmp_path, chosen, [0])


def test_cpu_seconds_are_those_of_the_processes_that_trained(tmp_path, monkeypatch):
    [one] = short_runs(tmp_path, ("mae",))
    monkeypatch.setattr(Run, "trained", lambda self: True)
    one.folder.mkdir(parents=True)
    starts = [{"kind": "start", "time": 1000.0, "step": 0}, {"kind": "resume", "time": 2000.0, "step": 10}]
    (one.folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    costs = [{"kind": "cost", "run": one.name, "command": "train", "time": end, "wall_s": 100.0, "cpu_s": cpu_s}
             for end, cpu_s in ((500.0, 1.0), (1050.0, 20.0), (1900.0, 3.0), (2050.0, 40.0))]  # fmt: skip
    (tmp_path / COSTS).write_text("".join(json.dumps(line) + "\n" for line in costs))
    assert evidence_report._cpu_s(tmp_path, [one]) == 60.0, "without an earlier folder's, and one that never started"
    (tmp_path / COSTS).write_text("".join(json.dumps(line) + "\n" for line in costs if line["time"] != 1050.0))
    assert evidence_report._cpu_s(tmp_path, [one]) is None, "the first was killed"


def test_the_report_is_written_as_json_with_a_figure(tmp_path, capsys):
    scored(tmp_path / "runs", {"mae": [30.0, 34.0], "randsac_square": [36.0, 35.0]})
    out = tmp_path / "evidence.json"
    assert run(options(tmp_path / "runs", seeds="0,1", report=True, out=out)) == 0
    written = json.loads(out.read_text())
    assert {
        "command",
        "date",
        "hardware",
        "load_average",
        "versions",
        "rows",
        "orderings",
        "image_sets",
    } <= written.keys()
    assert written["seeds"] == [0, 1] and written["rows"][0]["scores"]["knn"]["by_seed"] == {"0": 30.0, "1": 34.0}
    assert {row["name"] for row in written["rows"]} >= {"mae", "untrained randsac vit_p/4", "raw pixels"}
    assert written["orderings"][0]["verdict"]["knn"] == "seen"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "32.00 ± 2.00" in capsys.readouterr().out


def test_pcae_is_fine_tuned_once_and_tested_at_its_drop_ratios(tmp_path, stub, capsys):
    out = tmp_path / "evidence.json"
    assert run(options(tmp_path, only=("pcae_similarity",), seeds="0,1", out=out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-2:]] == [
        ["0", "30.0", "60.00", "±", "0.00", "900"],
        ["0.4", "22.0", "56.00", "±", "0.00", "900"],
    ]
    assert [row["ratio"] for row in json.loads(out.read_text())["compression"]] == [0, 0.4]
    done = commands_run(tmp_path)
    assert [command for name, command in done if name == "pcae_similarity-seed1"][-2:] == ["fine-tune", "compression"]
    assert run(options(tmp_path, only=("pcae_similarity",), seeds="0,1")) == 0 and commands_run(tmp_path) == done
    assert not any(
        command.name == "fine-tune"
        for one in plan(tmp_path, rows(["mae", "pcae_random"]), [0])
        for command in one.commands()
    )


def test_the_figure_names_its_axes_and_shows_every_seed(tmp_path):
    runs = scored(tmp_path, {"mae": [30.0, 34.0], "randsac_square": [36.0, 35.0]})
    figure = draw(evidence_report.summarise(tmp_path, runs))
    by_row, _, _, against, *others = figure.axes
    assert [axes.get_xlabel() for axes in (by_row, against)] == ["kNN top-1, %", "FLOPs of a run's training, $10^{12}$"]
    names = ["kNN top-1, %", "best linear head top-1, %", "softmax regression top-1, %"]
    assert [axes.get_ylabel() for axes in (against, *others)] == names
    assert [label.get_text() for label in by_row.get_yticklabels()] == [
        "mae",
        "randsac_square",
        "untrained mae vit_p/4",
        "untrained randsac vit_p/4",
    ]
    points = [line.get_xdata() for line in by_row.lines if line.get_linestyle() == "None"]
    assert [sorted(map(float, x)) for x in points] == [[30.0, 34.0], [35.0, 36.0], [20.0, 21.0], [20.0, 21.0]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["mae", "randsac_square", "raw pixels"]


def test_a_dry_run_says_what_is_done_and_what_the_rest_costs(tmp_path, stub, capsys):
    run(options(tmp_path, dry_run=True))
    before = capsys.readouterr().out
    assert (
        "patchmill train evidence/mae data.loader=synthetic" in before
        and "done" not in before
        and not any(tmp_path.iterdir())
    )
    assert f"patchmill eval linear {tmp_path}/mae-seed0 --weights pixels" in before
    expected = sum(command.cpu_s for one in short_runs(tmp_path) for command in one.commands())
    assert f"expected: {expected / 3600:.2f} hours of CPU" in before
    run(options(tmp_path))
    capsys.readouterr()
    run(options(tmp_path, dry_run=True))
    after = capsys.readouterr().out
    assert after.count("     done  patchmill") == 17 and "expected: 0.00 hours" in after


def npz(path: Path, num_train: int = 6, num_test: int = 4) -> Path:
    """As many JPEGs of three classes as asked for."""
    arrays = {"names": np.array(["cat", "dog", "eel"])}
    for seed, (split, count) in enumerate((("train", num_train), ("test", num_test))):
        files = [encoded(pixels(100 * seed + n, 32, 32), "JPEG", quality=75) for n in range(count)]
        arrays |= {f"{split}_jpeg": np.frombuffer(b"".join(files), np.uint8), f"{split}_labels": np.arange(count) % 3,
                   f"{split}_offsets": np.cumsum([0, *map(len, files)])}  # fmt: skip
    np.savez(path, **arrays)
    return path


def test_jpegs_in_an_npz_are_packed_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_data, "SPLITS", {"train": 6, "test": 4})
    source = npz(tmp_path / evidence_data.JPEGS)
    assert evidence_data.find_images(tmp_path) == source
    folder = tmp_path / "data"
    evidence_data.pack(source, folder, 1)
    assert evidence_data.image_sets(folder)["source"] == evidence_data.JPEGS
    with tarfile.open(folder / "cifar10.tar") as tar, np.load(source) as arrays:
        assert sorted(tar.getnames())[:2] == ["test/cat/00000.jpg", "test/cat/00003.jpg"]
        third = tar.extractfile("train/eel/00002.jpg").read()
        start, end = arrays["train_offsets"][2:4]
        assert third == arrays["train_jpeg"][start:end].tobytes() and third in (folder / "train.beton").read_bytes()
    seal = json.loads((folder / "test.beton.seal.json").read_text())
    assert seal["classes"] == ["cat", "dog", "eel"] and seal["num_samples"] == seal["num_kept"] == 4
    evidence_data.pack(source, folder, 1)


def test_the_official_archive_is_packed_too_and_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_data, "SPLITS", {"train": 6, "test": 3})
    npz(tmp_path / evidence_data.JPEGS)
    shown = np.stack([pixels(seed, 32, 32) for seed in range(9)])
    as_cifar(tmp_path / evidence_data.ARCHIVE, shown, [0, 1, 2] * 3, ["cat", "dog", "eel"], batches=3)
    evidence_data.pack(evidence_data.find_images(tmp_path), tmp_path / "data", 1)
    seal = json.loads((tmp_path / "data" / "train.beton.seal.json").read_text())
    assert (seal["num_samples"], seal["num_kept"], seal["classes"]) == (6, 0, ["cat", "dog", "eel"])
    assert not (tmp_path / "data" / "cifar10.tar").exists()
    told = evidence_data.image_sets(tmp_path / "data")
    assert (told["source"], told["train"]) == (evidence_data.ARCHIVE, seal["image_set"]) and told["test"] != told[
        "train"
    ]


def test_other_images_than_cifar10s_are_refused(tmp_path):
    with pytest.raises(UserError, match="has 6 good train images instead of 50000"):
        evidence_data.pack(npz(tmp_path / evidence_data.JPEGS), tmp_path / "data", 1)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / evidence_data.JPEGS
    np.savez(other, x=np.arange(3))
    for damage in (lambda: None, lambda: other.write_bytes(other.read_bytes()[:200]), lambda: other.write_bytes(b"")):
        damage()
        with pytest.raises(UserError, match="is not CIFAR-10 as JPEGs, or damaged"):
            evidence_data.pack(other, tmp_path / "more", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_real_rows_through_a_kill_of_the_queue(tmp_path):
    out = tmp_path / "evidence.json"
    words = ["bench", "evidence", *SHORT, "data.num_samples=256", "--folder", str(tmp_path), "--seeds", "0", "--out", str(out),
             "checkpoint.every_steps=5", "--only", "mae", "--only", "randsac_square"]  # fmt: skip
    command, environment = [sys.executable, "-m", "pipeline", *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    while not (tmp_path / "mae-seed0" / "checkpoints").exists():
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in TWO:
        assert trained_steps(tmp_path / f"{name}-seed0") == list(range(1, 21))
    written = json.loads(out.read_text())
    found = {row["name"]: row for row in written["rows"]}
    assert set(found) == {*TWO, "untrained mae vit_p/4", "untrained randsac vit_p/4", "raw pixels"}
    assert all(len(row["scores"][probe]["by_seed"]) == 1 for row in found.values() for probe in evidence.PROBES)
