"""A job is looked at by all of its ranks: one that is in order, and one whose ranks do not share what they must."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_ranks import SETTINGS, free_port, place

pytestmark = pytest.mark.timeout(900)  # starting processes on a busy machine takes minutes

ENGINE = ["engine.name=ddp", "engine.timeout_s=120"]
HOST = socket.gethostname()


def start(run: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", "check", "--in-job", *SETTINGS, *ENGINE, f"run.dir={run}", *more]
    return subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_job_in_order_is_a_table_and_leaves_nothing_behind(tmp_path):
    process = start(tmp_path / "deep" / "run", "--nproc", "2")
    said, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    head, *ranks = [line.split() for line in said.splitlines()[:3]]
    assert head == ["rank", "host", "device", "all-reduce", "free", "disk", "clock"]
    assert [row[:2] for row in ranks] == [["0", HOST], ["1", HOST]]
    assert all("GB/s" in row and "GiB" in row and "ms" in row for row in ranks)
    assert said.splitlines()[-1] == "in order"
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_share_no_folder_and_miss_their_images_hear_it_all_at_once(tmp_path):
    port = free_port()
    runs = [tmp_path / name / "run" for name in ("shared", "elsewhere")]
    runs[1].mkdir(parents=True)  # there, but of this rank alone
    images = ["data.loader=folder", f"data.train={tmp_path / 'nowhere.jsonl'}"]
    ranks = [start(run, *images, **place(rank, port)) for rank, run in enumerate(runs)]
    (_, said), (_, other) = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert f"rank 1 on {HOST}: run.dir = {runs[1]}: is not the folder of rank 0" in said
    assert f"all 2 ranks: data.train: {tmp_path / 'nowhere.jsonl'}" in said
    assert len(said.strip().splitlines()) == 2
    assert "Traceback" not in said + other and "patchmill:" not in other
    assert not runs[0].parent.exists() and list(runs[1].iterdir()) == []
