"""The trainer against bad input and a bad world: one clear line, nothing lost."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import RunFailed, UserError, load_config
from pipeline.data import Loader
from pipeline.heldout import HeldOut
from pipeline.methods.mae import MAE
from pipeline.runlog import read_log
from pipeline.stop import StopRequest
from pipeline.train import train


def settings(run: Path, *overrides: str) -> list[str]:
    return [f"run.dir={run}", "data.loader=synthetic", "data.num_samples=64", "train.epochs=3", "train.global_batch=16",
            "optim.warmup_epochs=1", "checkpoint.every_steps=4", "log.every_steps=2", "tracking.uri=none", *overrides]  # fmt: skip


def run_it(run: Path, *overrides: str, method: str = "mae") -> int:
    return train(load_config([f"quickstart/{method}"], settings(run, *overrides)), StopRequest())


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_log(run / "log.jsonl") if line["kind"] == "train"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_it(run) == 0
    return run


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_has_a_line_a_step_the_newest_checkpoints_a_figure_and_a_reason(finished):
    assert list(losses(finished)) == list(range(1, 13))
    assert [path.name for path in checkpoint.candidates(finished / "checkpoints")] == ["step-00000012", "step-00000008"]
    assert (finished / "figures" / "mae_step00000012.png").stat().st_size > 10_000
    assert json.loads((finished / "why_stopped.json").read_text()) == {
        "done": True,
        "reason": "done",
        "step": 12,
        "restarts": 0,
    }
    assert (finished.stat().st_mode & 0o777) == 0o700
    line = next(line for line in read_log(finished / "log.jsonl") if line["kind"] == "train")
    names = {"step", "samples_seen", "epoch", "loss", "grad_norm", "lr", "images_per_s", "data_wait", "time"}
    assert names <= line.keys()
    start, stop = (
        next(line for line in read_log(finished / "log.jsonl") if line["kind"] == kind) for kind in ("start", "stop")
    )
    assert start["device"] == "cpu" and 0.1 < stop["peak_gib"] < 16
    assert load_config([finished / "config.yaml"]).train.epochs == 3
    assert re.search(r"decoding threads: \d+ \(", (finished / "log.txt").read_text())


def test_batches_are_made_for_the_device_that_computes(tmp_path, monkeypatch):
    devices, batches = [], Loader.batches
    monkeypatch.setattr(
        Loader, "batches", lambda self, order, *device: devices.append(device) or batches(self, order, *device)
    )
    assert run_it(tmp_path / "run") == 0
    assert devices[0][0] == (torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def test_the_micro_batch_changes_nothing_but_rounding(finished, tmp_path):
    assert run_it(tmp_path / "micro", "train.micro_batch=4") == 0
    assert losses(tmp_path / "micro") == pytest.approx(losses(finished), rel=1e-5)


def test_the_micro_batch_changes_nothing_where_images_share_their_segments(tmp_path):
    """Blobs of the whole global batch, ragged, with dropped tokens: also what the log says of each rank."""
    switches = ("method.segments=blob", "method.share_segments=true", "method.token_keep=0.6", "train.epochs=1",
                "optim.warmup_epochs=null", "optim.warmup_steps=1")  # fmt: skip
    for name, micro in (("whole", 16), ("micro", 4)):
        assert run_it(tmp_path / name, *switches, f"train.micro_batch={micro}", method="randsac") == 0
    assert losses(tmp_path / "micro") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    lines = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if line["kind"] == "train"]
    assert all({"loss_rank_01", "loss_rank_10"} <= line.keys() for line in lines)


def test_a_rank_that_one_micro_batch_lacks_does_not_hide_the_others(tmp_path):
    switches = ("method.segments=blob", "method.num_segments=16", "train.steps=2", "train.epochs=null",
                "optim.warmup_epochs=null", "optim.warmup_steps=1")  # fmt: skip
    assert run_it(tmp_path, *switches, "train.micro_batch=1", method="randsac") == 0
    lines = [line for line in read_log(tmp_path / "log.jsonl") if line["kind"] == "train"]
    assert [math.isfinite(line["loss_rank_15"]) for line in lines] == [True, True]


def test_another_configuration_is_refused_with_the_difference_and_a_free_setting_is_not(copy):
    with pytest.raises(UserError, match=r"optim\.base_lr = 0\.008 \(not 0\.1\); train\.seed = 0 \(not 3\)"):
        run_it(copy, "optim.base_lr=0.1", "train.seed=3")
    before = losses(copy)
    assert run_it(copy, "log.every_steps=1", "checkpoint.keep=1") == 0
    assert losses(copy) == before


def test_resume_never_and_must(copy, tmp_path):
    with pytest.raises(UserError, match=r"run\.resume = never"):
        run_it(copy, "run.resume=never")
    with pytest.raises(UserError, match=r"holds no checkpoint and run\.resume = must"):
        run_it(tmp_path / "new", "run.resume=must")


def test_a_start_that_was_refused_leaves_nothing_in_the_way(tmp_path):
    with pytest.raises(UserError, match="warm-up"):
        run_it(tmp_path / "run", "optim.warmup_epochs=9")
    assert run_it(tmp_path / "run", "train.epochs=2") == 0


def test_other_images_than_the_checkpoints_are_refused(copy):
    path = checkpoint.choose(copy / "checkpoints")
    state = path / checkpoint.STATE
    state.write_text(state.read_text().replace("synthetic-0-64-10", "another set of images"))
    seal = json.loads((path / checkpoint.SEAL).read_text())
    seal["files"][state.name] = {"bytes": state.stat().st_size, "sha256": checkpoint._sha256(state)}
    (path / checkpoint.SEAL).write_text(json.dumps(seal))
    with pytest.raises(UserError, match="another image set"):
        run_it(copy)


def test_a_cut_off_newest_checkpoint_is_passed_over_and_the_run_comes_out_the_same(finished, copy, caplog):
    newest = checkpoint.choose(copy / "checkpoints")
    tensors = next(newest.glob("*.safetensors"))
    os.truncate(tensors, tensors.stat().st_size // 2)
    logger = checkpoint.log
    logger.propagate = True
    logger.addHandler(caplog.handler)
    assert checkpoint.choose(copy / "checkpoints").name == "step-00000008"
    assert "step-00000012 is broken" in caplog.text
    logger.removeHandler(caplog.handler)
    assert run_it(copy) == 0
    assert losses(copy) == losses(finished)
    assert checkpoint.choose(copy / "checkpoints").name == "step-00000012"
    starts = [line for line in read_log(copy / "log.jsonl") if line["kind"] in ("start", "resume")]
    assert 0 <= starts[0]["load_s"] < starts[1]["load_s"] < starts[1]["time"] - starts[0]["time"]
    assert {(line["engine"], line["processes"], line["precision"], line["micro_batch"]) for line in starts} == {
        ("single", 1, "fp32", 16)
    }


def test_a_signal_before_torch_is_imported_saves_and_stops(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "train",
        "quickstart/mae",
        *settings(tmp_path / "run", "train.epochs=500"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    status, deadline = Path(f"/proc/{process.pid}/status"), time.monotonic() + 60
    caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1  # noqa: E731
    while not caught():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    early = "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=200)[1]
    assert early and process.returncode == 75, said
    assert len(checkpoint.candidates(tmp_path / "run" / "checkpoints")) == 1 and len(losses(tmp_path / "run")) == 1


def test_when_all_checkpoints_are_broken_the_run_does_not_start_over(copy):
    for path in checkpoint.candidates(copy / "checkpoints"):
        (path / checkpoint.SEAL).unlink()
    with pytest.raises(UserError, match="every checkpoint"):
        run_it(copy)
    assert len(losses(copy)) == 12


def test_a_full_disk_keeps_the_last_good_checkpoint_and_training_goes_on(finished, small_disk):
    run = small_disk.parent
    assert run_it(run) == 1, "a run whose last state is not saved is not done"
    assert losses(run) == losses(finished)
    assert [path.name for path in checkpoint.candidates(small_disk)] == ["step-00000004"]
    # The last state is tried twice: by the clock, and once more at the end.
    failed = [line for line in read_log(run / "log.jsonl") if line["kind"] == "checkpoint" and not line["saved"]]
    assert [line["step"] for line in failed] == [8, 12, 12] and "No space left" in failed[0]["reason"]
    assert not json.loads((run / "why_stopped.json").read_text())["done"]
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run_it(run) == 0
    assert losses(run) == losses(finished)


def test_an_mlflow_server_that_is_away_does_not_stop_training(finished, tmp_path):
    run = tmp_path / "run"
    assert run_it(run, "tracking.uri=http://127.0.0.1:9") == 0
    assert losses(run) == losses(finished)


def test_gradients_that_are_not_finite_are_skipped_logged_and_in_the_end_stop_the_run(finished, tmp_path, monkeypatch):
    from pipeline.engine.torch import TorchEngine

    step, bad = TorchEngine.step, {5, 6}

    def poisoned(self, *args):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps in bad:
            next(iter(self.trained)).grad.to_local().fill_(float("nan"))
        return step(self, *args)

    monkeypatch.setattr(TorchEngine, "step", poisoned)
    assert run_it(tmp_path / "some") == 0
    lines = read_log(tmp_path / "some" / "log.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "skip"] == [5, 6]
    assert losses(tmp_path / "some")[5] == losses(finished)[5]
    assert losses(tmp_path / "some")[6] != losses(finished)[6]
    names = {line["tensor"] for line in lines if line["kind"] == "skip"}
    assert names == {"encoder.cls_token"}


def test_a_checkpoint_that_is_due_in_a_skipped_step_is_made_after_it(tmp_path, monkeypatch):
    from pipeline.engine.torch import TorchEngine

    step = TorchEngine.step

    def poisoned(self, *args):
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps in (4, 8):
            next(iter(self.trained)).grad.to_local().fill_(float("nan"))
        return step(self, *args)

    monkeypatch.setattr(TorchEngine, "step", poisoned)
    assert run_it(tmp_path / "run", "checkpoint.every_steps=4", "log.every_steps=3") == 0
    lines = read_log(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "checkpoint"] == [5, 9, 12]


def test_fp16_finds_its_scale_though_each_search_ends_in_a_roll_back(tmp_path, monkeypatch):
    from pipeline import launch, optim

    monkeypatch.setattr(launch, "_require_engine", lambda *_: None)  # which wants a GPU
    monkeypatch.setattr(optim, "FIRST_SCALE", 2.0**24)  # overflows, and so do its next halves
    assert run_it(tmp_path / "run", "engine.precision=fp16", "guard.max_nonfinite=1") == 0
    lines = read_log(tmp_path / "run" / "log.jsonl")
    scales = [line["loss_scale"] for line in lines if line["kind"] == "train"]
    assert len(scales) == 12 and max(scales) < 2.0**24
    assert sum(line["kind"] == "rollback" for line in lines) > 1


def log_of(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "epoch", "samples_seen", "loss", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in read_log(run / "log.jsonl") if line["kind"] == "train"]


def test_a_batch_that_breaks_the_gradient_is_left_out_and_the_rest_is_as_if_it_had_never_been(tmp_path, monkeypatch):
    from pipeline import train as module
    from pipeline.engine.torch import TorchEngine

    step, update, take_up = TorchEngine.step, module.update, module.Trainer._take_up

    def update_with(engine, batch, *rest):
        engine.poisoned = poisonous and 17 in batch.ids.tolist()
        return update(engine, batch, *rest)

    def poisoned(self, *args):
        if self.poisoned:
            self.trained[-1].grad.to_local().view(-1)[:1].fill_(float("inf"))
        return step(self, *args)

    monkeypatch.setattr(TorchEngine, "step", poisoned)
    monkeypatch.setattr(module, "update", update_with)
    poisonous, run = True, tmp_path / "run"
    assert run_it(run, "guard.max_nonfinite=1", "checkpoint.every_steps=2", "log.every_steps=3", method="pcae") == 0
    lines = read_log(run / "log.jsonl")
    backs = [line for line in lines if line["kind"] == "rollback"]
    assert len(backs) in (3, 4), "once an epoch, and once more when the batches left out reach into the next"
    assert {line["tensor"] for line in backs} == {"decoder.head.bias"}
    assert not [line for line in lines if line["kind"] == "skip"]
    ranges = [tuple(pair) for pair in backs[-1]["skipped_ranges"]]
    assert all(stop - start == 1 for start, stop in ranges)

    def with_gaps(self, **more):
        take_up(self, **more)
        self.skipped_ranges = ranges

    poisonous = False
    monkeypatch.setattr(module.Trainer, "_take_up", with_gaps)
    assert run_it(tmp_path / "undisturbed", "log.every_steps=3", method="pcae") == 0
    assert log_of(run) == log_of(tmp_path / "undisturbed")
    newest = checkpoint.read_state(checkpoint.candidates(run / "checkpoints")[0])
    assert [tuple(pair) for pair in newest["skipped_ranges"]] == ranges
    discarded = (run / "log.discarded.jsonl").read_text()
    assert discarded.count('"kind": "skip"') == len(backs)


def test_weights_that_break_the_gradient_stop_the_run_after_some_roll_backs_and_are_named(tmp_path):
    run = tmp_path / "run"
    more = "optim.base_lr=1e37", "optim.warmup_epochs=0", "guard.max_nonfinite=2", "guard.max_rollbacks=2"
    with pytest.raises(
        RunFailed, match=r"3 steps in a row, 2 to 4, and 2 roll-backs .* it began at decoder\.head\.bias\. Lower"
    ):
        run_it(run, *more)
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "rollback"] == [0, 0]
    assert not (run / "checkpoints").exists() or not checkpoint.candidates(run / "checkpoints")
    assert "Lower optim.base_lr" in json.loads((run / "why_stopped.json").read_text())["reason"]


def test_the_held_out_loss_has_one_line_a_time_and_disturbs_nothing(finished, tmp_path):
    assert run_it(tmp_path / "run", "eval.loss_every=3", "eval.loss_images=40") == 0
    assert log_of(tmp_path / "run") == log_of(finished)
    rows = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "eval"]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert {row["heldout_images"] for row in rows} == {32}
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]
    with pytest.raises(UserError, match=r"has 8 images, fewer than train.global_batch = 16"):
        HeldOut(load_config(["quickstart/mae"], settings(tmp_path / "few", "data.num_samples=8")))


def test_online_signals_come_every_n_epochs_and_disturb_nothing(finished, tmp_path):
    run, more = tmp_path / "run", ("eval.online_every=2", "eval.online_images=40", "eval.knn_k=5")
    assert run_it(run, *more) == 0
    assert log_of(run) == log_of(finished)
    rows = [line for line in read_log(run / "log.jsonl") if line["kind"] == "eval"]
    assert [row["step"] for row in rows] == [8, 12]
    assert all(
        1 < row["effective_rank"] < 96 and 0 < row["mean_cosine"] < 1 and row["online_images"] == 40 for row in rows
    )
    assert all(0 <= row["online_knn"] <= 100 and row["online_s"] > 0 for row in rows)
    text = (run / "log.txt").read_text()
    assert re.search(r"INFO step 12: kNN \d+\.\d\d %, effective rank \d+\.\d of 96, mean cosine \d", text)
    assert "collapsed" not in text


def test_features_that_collapse_are_told_and_training_goes_on(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(MAE, "features", lambda self, images, draw, teacher=None: torch.ones(len(images), 96))
    run = tmp_path / "run"
    assert run_it(run, "eval.online_every=3", "eval.knn_k=5") == 0
    assert log_of(run) == log_of(finished)
    (row,) = (line for line in read_log(run / "log.jsonl") if line["kind"] == "eval")
    assert row["collapse"] == "effective rank 1.00 of 96 is under 2.00" and "online_knn" not in row
    assert "WARNING step 12: the features look collapsed: effective rank 1.00" in (run / "log.txt").read_text()


def test_a_profile_is_written_and_memory_that_runs_out_names_the_settings(finished, tmp_path, monkeypatch):
    assert run_it(tmp_path / "run", "profile.start_step=3", "profile.num_steps=2") == 0
    assert log_of(tmp_path / "run") == log_of(finished)
    trace, table = sorted((tmp_path / "run" / "profile").iterdir())
    assert trace.name == "steps-00000003-00000004-rank-00000.json.gz"
    assert "aten::addmm" in table.read_text()
    assert run_it(tmp_path / "open", "profile.start_step=11", "profile.num_steps=9") == 0
    trace, _ = sorted((tmp_path / "open" / "profile").iterdir())
    assert trace.name == "steps-00000011-00000012-rank-00000.json.gz", "what there was when the run ended"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    from pipeline.engine.torch import TorchEngine

    monkeypatch.setattr(TorchEngine, "micro_step", full)
    with pytest.raises(
        RunFailed, match="ran out in step 1; set train.micro_batch below 16, engine.checkpoint_layers=full"
    ):
        run_it(tmp_path / "full")


def test_two_trainers_in_one_folder(tmp_path):
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            run_it(run)
