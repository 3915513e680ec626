"""Chains without Slurm: all stages are one job of this host."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_slurm_local import processes, wait

from pipeline.config import UserError, load_config
from slurm import status
from slurm.chain import CHAIN, cancel_all, chain, stages
from slurm.job import read_json
from slurm.local import STAGES
from slurm.queue import local_job, slurm_state
from slurm.submit import JOB
from tests.image_files import encoded, pixels, put

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for process in processes(tmp_path):
        process.kill()


def start(tmp_path: Path, *settings: str) -> str:
    common = [f"run.dir={tmp_path / 'run'}", f"data.train={tmp_path / 'train.beton'}", f"data.val={tmp_path / 'val.beton'}",
              f"chain.train_images={tmp_path / 'images'}", f"chain.val_images={tmp_path / 'images'}", "train.global_batch=16",
              "chain.prep.cpus_per_task=1", "train.epochs=3", "optim.warmup_epochs=1", "data.threads=1", "tracking.uri=none",
              "slurm.executor=local", "slurm.environment={OMP_NUM_THREADS: '1'}"]  # fmt: skip
    return chain(load_config(["cifar10/mae", "engine/ddp"], [*common, *settings]), dry_run=False)


def told(run: Path) -> list[str]:
    return [line.split(maxsplit=2)[2] for line in stages(status.look(run))]


def ends(run: Path) -> None:
    wait("the end", lambda: slurm_state(read_json(run / JOB)["job"])[0] == "ENDED", 400)
    assert processes(run) == []


def by_hand(run: Path, **scripts: str) -> "subprocess.Popen[bytes]":
    """A chain of these scripts, as it is started; the training is done."""
    (run / "slurm").mkdir(parents=True)
    (run / "why_stopped.json").write_text('{"done": true}')
    for name, text in scripts.items():
        (run / "slurm" / f"{name}.sh").write_text(text)
    (run / STAGES).write_text(json.dumps({"names": list(scripts)}))
    job = subprocess.Popen([sys.executable, "-m", "slurm.local", "chain", str(run)])
    name = local_job(job.pid)
    (run / JOB).write_text(json.dumps({"job": name}))
    (run / CHAIN).write_text(json.dumps(dict.fromkeys(scripts, name)))
    return job


def test_what_comes_after_a_stage_that_fails_does_not_begin(tmp_path: Path) -> None:
    run = tmp_path / "run"
    put(tmp_path / "images" / "a" / "1.jpg", b"no image")
    said = start(tmp_path, "chain.prep.mem=9G").splitlines()
    job = read_json(run / JOB)["job"]
    assert said[-1] == f"started: job {job}, for prep, train, knn, linear; patchmill status {run}"
    assert "not used without Slurm: chain.prep.mem" in said
    assert told(run) == ["running", "waits for prep", "waits for train", "waits for knn"]
    with pytest.raises(UserError, match=f"its job {job} is running; patchmill cancel"):
        start(tmp_path)
    ends(run)
    failed, *others = told(run)
    assert failed.startswith("failed: ") and "none of the 1 files is a usable image" in failed
    assert others == ["cancelled, as prep failed"] * 3


def test_a_probe_that_fails_does_not_keep_the_next_one_from_running(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = by_hand(run, prep="exit 0", knn=f"sleep 600.{os.getpid()} & echo why; exit 3", linear="sleep 1; exit 0")
    assert job.wait(60) == 0
    assert read_json(run / STAGES)["codes"] == {"prep": 0, "knn": 3, "linear": 0}
    assert told(run)[:2] == ["done"] * 2
    assert told(run)[2] == f"failed: why ({run}/slurm/knn-{read_json(run / JOB)['job']}.out)"
    assert processes(Path(f"600.{os.getpid()}")) == [], "what it left behind is ended with it"


def test_a_chain_is_cancelled_or_killed_with_all_that_it_runs(tmp_path: Path) -> None:
    word = f"{sys.executable} -m slurm.local bound $$ logs --follow {tmp_path}"  # of this job, which does not end
    (tmp_path / "slurm").mkdir()
    (tmp_path / JOB).write_text(json.dumps({"job": local_job(os.getpid())}))
    for how in ("cancelled", "killed"):
        run = tmp_path / how
        job = by_hand(run, prep=f"{word}; exit 0", knn="exit 0")
        wait("the command", lambda: processes(tmp_path, "pipeline", "logs"))
        assert told(run) == ["running", "done", "waits for prep"]
        if how == "cancelled":
            (run / "slurm" / "cancelled").touch()
            job.send_signal(signal.SIGUSR2)
            assert job.wait(10) == 75
            assert told(run)[0].startswith("was cancelled") and told(run)[2] == "cancelled, as prep was cancelled"
        else:
            job.kill()
            job.wait()
            assert told(run) == ["ended", "done", "cancelled, as prep ended"]
        wait("all to die", lambda: processes(tmp_path) == [], 10)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_chain_goes_on_where_it_was_killed_and_comes_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in range(64):
        put(tmp_path / "images" / f"class{number % 2}" / f"{number}.jpg", encoded(pixels(number), "JPEG", quality=90))
    start(tmp_path)
    wait("packing", lambda: processes(tmp_path, "prep", "write"))
    os.kill(int(read_json(run / JOB)["job"].split("-")[-2]), signal.SIGKILL)
    wait("all to die", lambda: processes(tmp_path) == [], 10)
    assert told(run)[0].startswith("ended") and told(run)[1:] == ["cancelled, as prep ended"] * 3
    start(tmp_path)
    wait("the training", lambda: told(run)[1].startswith("running"), 400)
    assert list(cancel_all([run], 60))[0].endswith("the newest checkpoint is of step 0")
    ends(run)
    assert told(run) == ["done", "was cancelled", *["cancelled, as train was cancelled"] * 2]
    assert start(tmp_path).splitlines()[-1].split("; ")[0].endswith("for train, knn, linear")
    ends(run)
    assert told(run)[:2] == ["done", "done"] and all("% top-1" in line for line in told(run)[2:])
    assert "everything is done" in start(tmp_path)
