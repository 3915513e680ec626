"""What scan, write and verify take of memory: bounded, whatever the number of images."""

import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import source_files as make
from image_files import encoded, pixels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def peak(*arguments: object) -> float:
    """The highest memory in MiB of `patchmill prep` and its workers: its own resident set and what they do not share with it."""
    program = [sys.executable, "-m", "pipeline", "prep", *map(str, arguments)]
    highest = 0
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                workers = sum(worker.memory_full_info().uss for worker in parent.children())
                highest = max(highest, parent.memory_info().rss + workers)
            except psutil.Error:
                pass  # one has just ended
            time.sleep(0.02)
    assert process.returncode == 0
    return highest / 2**20


def tiny(path: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for k in range(count):
            image = b"P6 8 8 255\n" + rng.bytes(192)
            make.add(tar, f"n{k % 100:08}/n{k % 100:08}_{k}.ppm", image)
    return path


def test_ten_times_the_images_take_little_more(tmp_path, capsys):
    peaks = {}
    for count in (10_000, 100_000):
        source, manifest, beton = (
            tiny(tmp_path / f"{count}.tar", count),
            tmp_path / "m.jsonl",
            tmp_path / f"{count}.beton",
        )
        peaks[count] = [peak("scan", source, manifest), peak("write", manifest, beton), peak("verify", beton)]
    ratios = np.divide(peaks[100_000], peaks[10_000])
    with capsys.disabled():
        sys.stdout.write(f"\nMiB of scan, write, verify at 10,000 and 100,000 images: {peaks}, ratios {ratios}\n")
    assert (ratios < 1.2).all()


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_a_writer_with_two_workers_takes_less_than_a_gibibyte(mode, tmp_path, capsys):
    images = {"a": {f"{k}.jpg": encoded(pixels(k, 1000, 750), "JPEG", quality=90) for k in range(400)}}
    peak("scan", make.as_tar(tmp_path / "x.tar", images), tmp_path / "m.jsonl")
    options = ["--mode", mode, *(["--max-side", "990"] if mode == "jpg" else [])]
    highest = peak("write", tmp_path / "m.jsonl", tmp_path / "x.beton", *options, "--workers", 2)
    with capsys.disabled():
        sys.stdout.write(f"\n{mode}: {highest:.0f} MiB\n")
    assert highest < 1024
