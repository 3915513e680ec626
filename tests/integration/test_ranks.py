"""Several processes as one run, started by --nproc: signals, killed ranks, restarts, and what is wrong from the start."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.config import UserError
from pipeline.launch import find_place
from pipeline.runlog import read_log

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

SETTINGS = [
    "method.name=pcae",
    "model.name=vit_p",
    "data.loader=synthetic",
    "data.image_size=32",
    "train.global_batch=8",
    "train.steps=24",
    "method.decoder_depth=1",
    "method.decoder_width=96",
    "method.decoder_heads=3",
    "optim.ema=0.9",
    "model.drop_path=0.1",
    "train.micro_batch=1",
    "tracking.uri=none",
    "log.every_steps=1",
    "checkpoint.every_steps=4",
]


def start(run: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "train", *SETTINGS, f"run.dir={run}", *more]
    return subprocess.Popen(command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)


def curve(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "epoch", "samples_seen", "loss", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in read_log(run / "log.jsonl") if line["kind"] == "train"]


def steps_of(run: Path) -> int:
    path = run / "log.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    while steps_of(run) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that it started, by rank."""
    return sorted(psutil.Process(process.pid).children(), key=lambda child: int(child.environ()["RANK"]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[tuple[float, ...]]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(run, "engine.name=ddp", "--nproc", "4")
    assert process.wait() == 0, process.stderr.read()
    rows = curve(run)
    assert [row[0] for row in rows] == list(range(1, 25))
    return rows


@pytest.mark.slow  # tests/slurm does the same on two hosts
def test_ddp_on_four_ranks_restarts_bit_equal_after_a_killed_rank_and_a_signal(undisturbed, tmp_path):
    run, more = tmp_path / "run", ("engine.name=ddp", "--nproc", "4")
    process = start(run, *more)
    wait_for_step(process, run, 6)
    victim = ranks_of(process)[2]
    victim.kill()
    assert process.wait(timeout=180) == 1
    said = process.stderr.read()
    assert "rank 2 was killed by SIGKILL" in said
    assert "has lost another rank" in said
    assert "Traceback" not in said
    assert not json.loads((run / "why_stopped.json").read_text())["done"]

    process = start(run, *more)
    wait_for_step(process, run, 11)
    others = ranks_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == 75, process.stderr.read()
    assert not any(other.is_running() for other in others)
    assert json.loads((run / "why_stopped.json").read_text())["reason"] == "stopped by SIGTERM"

    process = start(run, *more)
    assert process.wait() == 0, process.stderr.read()
    assert curve(run) == undisturbed
    assert json.loads((run / "why_stopped.json").read_text()) == {
        "done": True,
        "reason": "done",
        "step": 24,
        "restarts": 2,
    }


def test_one_rank_that_gets_a_signal_stops_all_and_other_engines_go_on(undisturbed, tmp_path):
    run = tmp_path / "run"
    process = start(run, "engine.name=fsdp2", "--nproc", "2")
    wait_for_step(process, run, 5)
    ranks_of(process)[1].send_signal(signal.SIGUSR2)
    assert process.wait(timeout=180) == 75, process.stderr.read()
    assert not (run / "log.discarded.jsonl").exists(), "a signal must lose no step"
    zero = ["engine.name=deepspeed", "engine.zero_stage=3", "--nproc", "2"]
    for more in (["train.micro_batch=8"], ["engine.name=hsdp", "engine.shard_size=2", "--nproc", "4"], zero):
        process, before = start(run, *more), steps_of(run)
        wait_for_step(process, run, before + 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=180) == 75, process.stderr.read()
    process = start(run, "engine.name=ddp", "--nproc", "2")
    assert process.wait() == 0, process.stderr.read()
    for found, expected in zip(curve(run), undisturbed, strict=True):
        assert found == pytest.approx(expected, rel=2e-6)


def test_a_rank_that_stands_still_is_named_and_the_run_goes_on_where_it_was_saved(undisturbed, tmp_path):
    run, more = tmp_path / "run", ("engine.name=ddp", "--nproc", "4")
    process = start(run, *more, "guard.hang_s=5", "checkpoint.every_steps=8")
    wait_for_step(process, run, 9)
    ranks_of(process)[1].suspend()
    assert process.wait(timeout=240) == 1
    said = process.stderr.read()
    assert said.count("rank 1 on") == 1
    assert "does not answer (stopped, or its host is gone) in phase" in said
    why = json.loads((run / "why_stopped.json").read_text())
    assert not why["done"] and why["reason"].startswith("rank 1 on")
    assert "in _attempt" in (run / "ranks" / "rank-00000.stacks.txt").read_text()
    process = start(run, *more)
    assert process.wait() == 0, process.stderr.read()
    assert curve(run) == undisturbed


ZERO = [pytest.param(f"engine.name=deepspeed engine.zero_stage={stage}", marks=pytest.mark.slow) for stage in (2, 3)]


@pytest.mark.parametrize("engine", ["engine.name=fsdp2", *ZERO])
def test_a_full_disk_and_a_rank_that_is_killed_in_a_save_lose_nothing(undisturbed, small_disk, engine):
    run, more = small_disk.parent, (*engine.split(), "--nproc", "2")
    subprocess.run(["mount", "-o", "remount,size=9m", str(small_disk)], check=True)  # for one checkpoint
    process = start(run, *more)
    assert process.wait(timeout=240) == 1
    said = process.stderr.read()
    assert said.count("step-00000008 could not be written: rank ") == said.count("step-00000012 could not") == 1
    assert "No space left on device" in said and "Traceback" not in said
    assert os.listdir(small_disk) == ["step-00000004"]
    alone = curve(run)
    assert [row[0] for row in alone] == list(range(1, 25))

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    process = start(run, *more)
    while not (small_disk / ".step-00000008.partial").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    ranks_of(process)[1].kill()
    assert process.wait(timeout=180) == 1
    assert "rank 1 was killed by SIGKILL" in process.stderr.read()

    process = start(run, *more)
    assert process.wait() == 0, process.stderr.read()
    assert sorted(os.listdir(small_disk)) == ["step-00000020", "step-00000024"]
    assert curve(run) == alone
    for found, expected in zip(curve(run), undisturbed, strict=True):
        assert found == pytest.approx(expected, rel=2e-6)


def test_the_ranks_die_with_the_process_that_started_them(tmp_path):
    process = start(tmp_path / "run", "engine.name=ddp", "--nproc", "2")
    wait_for_step(process, tmp_path / "run", 2)
    ranks = ranks_of(process)
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=20)[1]


@pytest.fixture(scope="module", params=["engine.name=fsdp2", *ZERO])
def killed(request, tmp_path_factory) -> tuple[list[str], list[tuple[float, ...]], Path]:
    """How two ranks start, what they log undisturbed, and a run of them that was killed after its save in step 8."""
    folder, more = tmp_path_factory.mktemp("killed"), [*request.param.split(), "--nproc", "2"]
    process = start(folder / "alone", *more)
    assert process.wait() == 0, process.stderr.read()
    process = start(folder / "run", *more)
    while not (folder / "run" / "checkpoints" / "step-00000008").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    return more, curve(folder / "alone"), folder / "run"


def overwrite(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))


SHARD = "shard-00002-model-00001-of-00001.safetensors"
DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda newest: overwrite(newest / SHARD, 5000),
    "a shard that is cut off": lambda newest: os.truncate(newest / SHARD, 5000),
    "a shard that is missing": lambda newest: (newest / SHARD).unlink(),
    "a seal that is missing": lambda newest: (newest / "complete.json").unlink(),
    "a seal that is cut off": lambda newest: os.truncate(newest / "complete.json", 50),
    "another state": lambda newest: (newest / "state.json").write_text((older(newest) / "state.json").read_text()),
}


def older(newest: Path) -> Path:
    return newest.parent / "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(killed, undisturbed, tmp_path, damage):
    more, alone, folder = killed
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    newest = max((run / "checkpoints").glob("step-*"))
    DAMAGES[damage](newest)
    process = start(run, *more)
    assert process.wait(timeout=240) == 0, process.stderr.read()
    said = process.stderr.read()
    assert said.count(f"{newest} is broken") == 1
    assert f"resume pcae vit_p: step {older(newest).name.removeprefix('step-').lstrip('0')} of 24" in said
    assert curve(run) == alone
    for found, expected in zip(alone, undisturbed, strict=True):
        assert found == pytest.approx(expected, rel=2e-6)


def test_broken_checkpoints_are_passed_over_and_never_started_over(tmp_path):
    run, more = tmp_path / "run", ("engine.name=fsdp2", "--nproc", "2")
    process = start(run, *more, "checkpoint.every_steps=2")
    wait_for_step(process, run, 6)
    process.kill()
    process.wait()
    newest, older = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    (newest / "shard-00002-model-00001-of-00001.safetensors").unlink()
    process = start(run, *more, "checkpoint.every_steps=1000")
    wait_for_step(process, run, 7)
    process.kill()
    said = process.stderr.read()
    assert f"{newest} is broken (shard-00002-model-00001-of-00001.safetensors is missing)" in said
    assert f"resume pcae vit_p: step {int(older.name.removeprefix('step-'))} of 24" in said
    (older / "state.json").write_text("{}")
    process = start(run, *more)
    assert process.wait(timeout=180) == 2
    said = process.stderr.read()
    assert said.count("patchmill: every checkpoint in") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "engine.name = single: 2 processes were started; set engine.name=ddp, fsdp2, hsdp or deepspeed"),
        pytest.param(
            ["engine.name=ddp", "train.global_batch=9"],
            "train.global_batch = 9: should be a multiple of the 2 processes",
            marks=pytest.mark.slow,
        ),
        (["engine.name=ddp", "train.micro_batch=8"], "train.micro_batch = 8: should divide 4, the images of each of 2"),
        pytest.param(
            ["engine.name=hsdp", "engine.shard_size=3"],
            "engine.shard_size = 3: should divide the 2 processes of this run",
            marks=pytest.mark.slow,
        ),
        (["engine.name=ddp", "data.loader=folder", "data.train=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_said_once_and_ends_all_ranks(tmp_path, more, message):
    process = start(tmp_path / "run", *more, "--nproc", "2")
    assert process.wait(timeout=180) == 2
    said = process.stderr.read()
    assert said.count("patchmill: ") == 1
    assert message in said
    assert "Traceback" not in said


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def place(rank: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def test_ranks_of_different_configurations_do_not_start(tmp_path):
    port, more = free_port(), ("engine.name=ddp", "engine.timeout_s=60")
    ranks = [start(tmp_path / "run", *more, f"train.seed={seed}", **place(seed, port)) for seed in (0, 1)]
    assert [rank.wait(timeout=180) for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "rank 1 on" in (said := rank.stderr.read())
        assert "train.seed = 1 instead of 0" in said
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_come_is_named(tmp_path):
    rank = start(tmp_path / "run", "engine.name=ddp", "engine.timeout_s=3", **place(0, free_port()))
    assert rank.wait(timeout=180) == 2
    assert "of 2 processes rank 1 did not come within engine.timeout_s = 3 s" in rank.stderr.read()


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = start(tmp_path / "run", "engine.name=ddp", "engine.timeout_s=3", **place(0, port))
        assert rank.wait(timeout=180) == 2
        assert f"MASTER_PORT = {port}: rank 0 cannot listen there" in rank.stderr.read()


SLURM = {
    "SLURM_JOB_ID": "81",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    "nodes, first",
    [("node7", "node7"), ("node[03-05,9],gpu1", "node03"), ("a1,b2", "a1"), ("rack2-[7,9]-gpu", "rack2-7-gpu")],
)
def test_a_place_is_read_from_what_srun_sets(nodes, first):
    found = find_place(SLURM | {"SLURM_STEP_NODELIST": nodes})
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": first}
    assert 20_000 <= int(port) < 60_000
    assert find_place(SLURM | {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_ID": "3"})["MASTER_PORT"] != port
    chosen = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert find_place(SLURM | {"SLURM_STEP_NODELIST": nodes} | chosen).items() >= chosen.items()


def test_a_batch_script_and_a_shell_are_alone_and_half_a_place_is_refused():
    assert find_place({}) == {}
    assert find_place({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}) == {}
    with pytest.raises(UserError, match="RANK = 0 is set and WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"):
        find_place({"RANK": "0"})


def test_online_signals_of_two_ranks_that_hold_a_part_each_are_those_of_one(tmp_path):
    """Weights that stay as they were, so that only the signals could differ."""
    still = "optim.base_lr=1e-30", "optim.weight_decay=0.0", "train.steps=2"
    more = "eval.online_every=1", "eval.online_images=150", "checkpoint.every_steps=2"
    rows = []
    for name, engine in (("one", ["engine.name=single"]), ("two", ["engine.name=fsdp2", "--nproc", "2"])):
        process = start(tmp_path / name, *still, *more, *engine)
        assert process.wait() == 0, process.stderr.read()
        (row,) = (line for line in read_log(tmp_path / name / "log.jsonl") if line["kind"] == "eval")
        rows.append([row[key] for key in ("step", "online_knn", "effective_rank", "mean_cosine", "online_images")])
    assert rows[0] == rows[1] and rows[0][0] == 2
