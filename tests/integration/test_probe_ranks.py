"""Probes by one process, by two that each have the encoder, and by two that each have a part of it; and killed ones."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from pipeline.config import load_config
from pipeline.evaluate import ProbeReport, evaluate, probe
from pipeline.evaluate.session import evaluation_config, start
from pipeline.evaluate.trained import TokenNorm
from pipeline.launch import World
from pipeline.runlog import read_log
from pipeline.tensors import read_tensors

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

SETTINGS = [
    "method.name=mae", "model.name=vit_p", "data.loader=synthetic", "data.image_size=32", "data.num_samples=43",
    "data.num_classes=4", "train.global_batch=8", "train.steps=10", "method.decoder_depth=1", "method.decoder_width=96",
    "method.decoder_heads=3", "eval.batch_size=4", "eval.knn_k=5", "eval.linear_epochs=2", "model.patch_size=8",
    "eval.mae={epochs: 4, warmup_epochs: 1, batch: 16, base_lr: 3.0}",
    "eval.attentive={epochs: 3, warmup_epochs: 1, batch: 16, lrs: [0.001, 0.003]}",
]  # fmt: skip
NAMES = ("knn", "linear_heads", "linear_mae", "attentive")
TRAINED = ("linear_mae", "attentive")
ENGINES = ("ddp", "fsdp2")


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    cfg = load_config([], [*SETTINGS, f"run.dir={folder}"])
    (folder / "config.yaml").write_text(cfg.to_yaml())
    return folder


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    world = World(rank, 2, rank, dist.new_group(backend="gloo"))
    for engine in ENGINES:
        run = Path(folder) / engine
        cfg = evaluation_config(run, [f"engine.name={engine}"])
        session = start(run, cfg, world, torch.device("cpu"), "untrained")
        held = sum(parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()
                   for parameter in session.encoder.parameters())  # fmt: skip
        (run / f"held-{rank}").write_text(str(held))
        for name in NAMES:
            assert (evaluate(session, name) is not None) == world.is_main  # type: ignore[arg-type]
    norm = TokenNorm(2, 3)
    mean, var = norm.observe([tokens()[4 * rank : 4 * rank + 3], tokens()[4 * rank + 3 : 4 * rank + 4]], world)
    torch.testing.assert_close((mean, var, norm.mean, norm.var), statistics())
    dist.destroy_process_group()


def tokens() -> Tensor:
    return 2 + torch.randn(8, 2, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1])


def statistics() -> tuple[Tensor, ...]:
    norm = TokenNorm(2, 3)
    return *norm.observe([tokens()], World()), norm.mean, norm.var


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, ProbeReport]]:
    folder = tmp_path_factory.mktemp("probes")
    for name in ("single", *ENGINES):
        make_run(folder / name)
    alone = {name: probe(folder / "single", name, "untrained") for name in NAMES}  # type: ignore[arg-type]
    mp.start_processes(_work, (str(folder),), 2, start_method="spawn")
    return folder, alone


def state_of(run: Path, name: str) -> dict[str, Tensor]:
    found = read_tensors(run / "probes" / f"{name}_untrained.safetensors")
    assert found is not None
    return found[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_features_are_the_same_bits_of_every_image_once(runs: Any, engine: str) -> None:
    for which in ("train", "val"):
        paths = [runs[0] / each / "features" / f"untrained-{which}.safetensors" for each in ("single", engine)]
        (one, its), (two, others) = (read_tensors(path) for path in paths)  # type: ignore[misc]
        assert its == others and one.keys() == two.keys() == {"features", "last4", "cls", "labels"}
        assert len(one["features"]) == 43 and all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_have_all_of_the_encoder_or_half(runs: Any) -> None:
    held = {engine: [int((runs[0] / engine / f"held-{rank}").read_text()) for rank in range(2)] for engine in ENGINES}
    assert held["ddp"][0] == held["ddp"][1]
    assert sum(held["fsdp2"]) == held["ddp"][0] and max(held["fsdp2"]) < 0.6 * held["ddp"][0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_report_what_one_does(runs: Any, engine: str, name: str) -> None:
    folder, alone = runs
    (line,) = [line for line in read_log(folder / engine / "log.jsonl") if f"{name}_untrained" in line]
    assert line[f"{name}_untrained"] == pytest.approx(alone[name].top1, abs=100 / 43 + 0.01)  # an image on the edge
    if name not in TRAINED:
        assert line[f"{name}_untrained"] == alone[name].top1
        return
    found, expected = state_of(folder / engine, name), state_of(folder / "single", name)
    assert found.keys() == expected.keys()
    for each, value in expected.items():
        if each.startswith("exp_avg_sq"):
            torch.testing.assert_close(found[each], value, rtol=1e-3, atol=1e-9)
        else:
            torch.testing.assert_close(found[each], value, rtol=1e-4, atol=2e-6)


ALONE = [sys.executable, "-m", "pipeline", "eval"]


def kill_after_a_save(process: "subprocess.Popen[str]", state: Path) -> int:
    """SIGKILL once a state is there; the step it holds."""
    while not state.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = read_tensors(state)
    assert found is not None
    return int(found[1]["step"])


def test_a_killed_probe_goes_on_with_equal_results(tmp_path: Path) -> None:
    run, more = make_run(tmp_path / "run"), ["eval.mae.epochs=60"]
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    expected = probe(whole, "linear_mae", "untrained", more)
    command = [*ALONE, "linear", "--mae", "--weights", "untrained", str(run), *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    step = kill_after_a_save(process, run / "probes" / "linear_mae_untrained.safetensors")
    assert 0 < step < 2 * 60
    assert not (run / "log.jsonl").exists()
    assert probe(run, "linear_mae", "untrained", more) == expected
    found, wanted = state_of(run, "linear_mae"), state_of(whole, "linear_mae")
    assert found.keys() == wanted.keys() and all(torch.equal(found[each], wanted[each]) for each in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_killed_ranks_and_a_signal_cost_nothing_on_two_processes(tmp_path: Path, engine: str) -> None:
    run, more = make_run(tmp_path / "run"), ["eval.attentive.epochs=80", f"engine.name={engine}"]
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    words = [*ALONE, "attentive", "--nproc", "2", "--weights", "untrained"]
    expected = subprocess.run([*words, str(whole), *more], capture_output=True, text=True, check=True).stdout
    process = subprocess.Popen([*words, str(run), *more], stderr=subprocess.PIPE, text=True)
    state = run / "probes" / "attentive_untrained.safetensors"
    kill_after_a_save(process, state)
    time.sleep(3)  # its ranks die with it
    process = subprocess.Popen([*words, str(run), *more], stderr=subprocess.PIPE, text=True)
    before = state.stat().st_mtime_ns
    while state.stat().st_mtime_ns == before:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=180)[1]
    assert process.returncode == 75, said
    assert said.count("of the probe; the same command goes on") == 1 and "Traceback" not in said
    assert subprocess.run([*words, str(run), *more], capture_output=True, text=True, check=True).stdout == expected
    found, wanted = state_of(run, "attentive"), state_of(whole, "attentive")
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)


@pytest.mark.slow
def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    words = [*ALONE, "linear", "--mae", "--nproc", "2", "--weights", "untrained", str(run)]
    for change, message in (("eval.mae.batch=15", "eval.mae.batch = 15: a batch of 15 should be a multiple of the 2 processes"),
                            ("engine.name=single", "engine.name = single: 2 processes were started")):  # fmt: skip
        done = subprocess.run([*words, change], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("patchmill: ") == 1
        assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_torchrun_starts_the_same(tmp_path: Path, engine: str) -> None:
    run = make_run(tmp_path / "run")
    words = ["eval", "linear", "--mae", "--weights", "untrained", str(run)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "pipeline"]
    done = subprocess.run([*torchrun, *words, f"engine.name={engine}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run / "probes")
    assert (
        done.stdout == subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True).stdout
    )
