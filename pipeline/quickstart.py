"""The whole chain on drawn images: pack, pretrain with the three methods, probe, draw, track."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.metrics import Progress
from pipeline.runlog import Record, read_log

# The longest first: with two at a time the others run beside it.
METHODS = ("pcae", "randsac", "mae")
NUM_TRAIN, NUM_TEST, SEED = 2000, 2000, 0


def _prepare(folder: Path) -> None:
    """Draw the images and pack them, unless that was done."""
    from data_prep.scan import scan
    from data_prep.write import write
    from pipeline.drawn import draw_images

    with Progress("draw images", NUM_TRAIN + NUM_TEST, "image") as progress:
        draw_images(folder / "images", num_train=NUM_TRAIN, num_test=NUM_TEST, seed=SEED, progress=progress.update)
    for name in ("train", "test"):
        manifest, beton = folder / f"{name}.jsonl", folder / f"{name}.beton"
        if not manifest.exists():
            with Progress(f"scan {name}", None, "image") as progress:
                scan(folder / "images" / name, manifest, workers=2, progress=progress.update)
        with Progress(f"write {name}.beton", None, "image") as progress:
            write(manifest, beton, mode="jpg", workers=2, progress=progress.update)


@contextlib.contextmanager
def _training(method: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer in a process and on a core of its own; its output goes to the run folder."""
    run, data = folder / method, folder / "data"
    run.mkdir(parents=True, exist_ok=True, mode=0o700)
    command = [sys.executable, "-m", "pipeline", "train", f"quickstart/{method}", f"run.dir={run}",
               f"data.train={data / 'train.beton'}", f"data.val={data / 'test.beton'}"]  # fmt: skip
    with (run / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            yield process
        finally:
            if process.poll() is None:  # leave by an error or Ctrl-C: the trainer saves and stops
                process.terminate()
                process.wait()


def _records(run: Path) -> tuple[Record, Record]:
    """(the record that started the run, its last training line); empty ones before they are written. Reads no more than that."""
    path = run / "log.jsonl"
    if not path.exists():
        return {}, {}
    with path.open("rb") as file:
        first = file.readline()
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"\n")]
    start = json.loads(first) if first.endswith(b"\n") else {}
    return start, next((line for line in reversed(whole) if line["kind"] == "train"), {})


def _pretrain(folder: Path) -> bool:
    """Train the methods, as many at a time as there are cores; True when all came to their end."""
    waiting, good = list(METHODS), True
    lanes = max(1, min(len(METHODS), len(os.sched_getaffinity(0))))
    with contextlib.ExitStack() as stack:
        running: dict[str, tuple[subprocess.Popen[bytes], Progress]] = {}
        while waiting or running:
            while waiting and len(running) < lanes:
                method = waiting.pop(0)
                progress = stack.enter_context(Progress(f"train {method}", None, "step"))
                running[method] = stack.enter_context(_training(method, folder)), progress
            time.sleep(1)
            for method, (process, progress) in list(running.items()):
                start, last = _records(folder / method)
                if last:
                    text = f"loss {last['loss']:.3f}  {last['images_per_s']:.0f} images/s"
                    progress.update(last["step"], start["total_steps"], text)
                if process.poll() is not None:
                    del running[method]
                    if process.returncode:
                        good = False
                        sys.stderr.write(
                            f"training {method} ended with {process.returncode}; see {folder / method}/output.txt\n"
                        )
    return good


def _table(folder: Path) -> Table:
    """Probe every run; the table of the results."""
    from pipeline.evaluate import probe

    table = Table(title=f"top-1 % on {NUM_TEST} drawn test images, 10 classes (chance 10)")
    for heading in (
        "method",
        "steps",
        "loss",
        "kNN untrained",
        "kNN trained",
        "linear untrained",
        "linear trained",
        "images/s",
    ):
        table.add_column(heading, justify="right" if heading != "method" else "left")
    with Progress("probe", 4 * len(METHODS) + 2, "probe") as progress:
        done = 0

        def top1(method: str, name: str, weights: str) -> str:
            nonlocal done
            value = probe(folder / method, name, weights).top1  # type: ignore[arg-type]
            done += 1
            progress.update(done, text=f"{name} {method} {weights}")
            return f"{value:.1f}"

        for method in reversed(METHODS):
            scores = [top1(method, name, weights) for name in ("knn", "linear") for weights in ("untrained", "model")]
            lines = [line for line in read_log(folder / method / "log.jsonl") if line["kind"] == "train"]
            rates = [line["images_per_s"] for line in lines]
            table.add_row(
                method, str(lines[-1]["step"]), f"{lines[-1]['loss']:.3f}", *scores, f"{sum(rates) / len(rates):.0f}"
            )
        table.add_row("raw pixels", "", "", "", top1("mae", "knn", "pixels"), "", top1("mae", "linear", "pixels"), "")
    return table


def quickstart(folder: Path) -> int:
    """Run the chain in ``folder``; what is there already is not done again. Returns an exit code."""
    from pipeline.metrics import setup_logging
    from pipeline.tracking import sync

    folder = folder.resolve()
    setup_logging(None)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _prepare(folder / "data")
    if not _pretrain(folder):
        return 1
    table = _table(folder)
    for method in METHODS:
        sync(folder / method)
    console = Console(width=max(100, Console().width))
    console.print(table)
    console.print("What the methods did with the images:")
    for path in sorted(folder.glob("*/figures/*.png")):
        console.print(f"  {path}", soft_wrap=True)
    console.print("Compare the runs in a browser with")
    console.print(
        f"  {sys.executable} -m mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///{folder / 'mlflow.db'}",
        soft_wrap=True,
    )
    return 0
