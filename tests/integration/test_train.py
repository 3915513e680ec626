"""The trainer against bad input and a bad world: one clear line, nothing lost."""

import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import UserError, load_config
from pipeline.data import Loader
from pipeline.runlog import read_log
from pipeline.train import train


def settings(run: Path, *overrides: str) -> list[str]:
    return [f"run.dir={run}", "data.loader=synthetic", "data.num_samples=64", "train.epochs=3", "train.global_batch=16",
            "optim.warmup_epochs=1", "checkpoint.every_steps=4", "log.every_steps=2", "tracking.uri=none", *overrides]  # fmt: skip


def run_it(run: Path, *overrides: str, method: str = "mae") -> int:
    return train(load_config([f"quickstart/{method}"], settings(run, *overrides)))


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
    assert load_config([finished / "config.yaml"]).train.epochs == 3
    assert re.search(r"decoding on \d+ threads: ", (finished / "log.txt").read_text())


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
    with pytest.raises(UserError, match=r"optim\.base_lr: 0\.008 -> 0\.1; train\.seed: 0 -> 3"):
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


def test_when_all_checkpoints_are_broken_the_run_does_not_start_over(copy):
    for path in checkpoint.candidates(copy / "checkpoints"):
        (path / checkpoint.SEAL).unlink()
    with pytest.raises(UserError, match="every checkpoint"):
        run_it(copy)
    assert len(losses(copy)) == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run folder whose checkpoints lie on a file system of 8 MiB: one fits, two do not."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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
    bad.update(range(1, 13))
    with pytest.raises(RuntimeError, match="not finite in 4 steps in a row"):
        run_it(tmp_path / "all", "guard.max_nonfinite=4")
    assert not json.loads((tmp_path / "all" / "why_stopped.json").read_text())["done"]


def test_two_trainers_in_one_folder(tmp_path):
    import fcntl

    run = tmp_path / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training"):
            run_it(run)
