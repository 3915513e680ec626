"""ViT-L at full size: two processes under FSDP2, two under ZeRO-3, one that goes on, and timm; beside one that is alone."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from exported import as_printed, own_features
from safetensors import safe_open

from pipeline.runlog import read_log
from pipeline.runs import restore
from pipeline.vit import normalise

GIB = 2**30
LIMIT = 20 * GIB  # resident at one moment, these tests included
# By default glibc keeps what was freed in blocks of up to 32 MiB, here of gathered layers: 2 to 3 GiB a rank.
FRUGAL = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20)}

# Rates at which the loss moves in seven steps, and a clip that bites. With one image a micro-batch a process rounds in bf16
# as two do.
SETTINGS = ("data.loader=synthetic", "data.num_samples=14", "data.image_size=224", "train.epochs=null", "train.steps=7",
            "train.global_batch=2", "train.micro_batch=1", "optim.warmup_epochs=0", "optim.clip=1",
            "engine.checkpoint_layers=full", "checkpoint.keep=1", "log.every_steps=1", "tracking.uri=none")  # fmt: skip
OF_METHOD = {
    # A teacher that moves but does not choose: one other of the 36 tokens of two images moves the loss by 1e-3.
    "pcae": ("optim.base_lr=0.0016", "optim.ema=0.9", "optim.ema_batch=null", "method.selection=random"),
    # Segments that divide 14 x 14 patches.
    "randsac": ("optim.base_lr=0.0064", "method.segment_size=2", "method.partition_size=7"),
}
# bf16 in the steps moves weights by 3e-5, the average by 2e-6, moments by 3e-3. Weights that a hop had rounded to bf16 would be
# off by 1.4e-3, an average that had begun anew there by 7e-4, lost moments by 0.3, or 0.8 at the last hop, which no loss shows.
BARS = {"step": 0, "model": 1e-4, "ema": 1e-4, "exp_avg": 0.02, "exp_avg_sq": 0.02}


def cpu_seconds() -> float:
    """Of all processes that have ended and that this one, or one of theirs, has waited for."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


class Command:
    """A command of patchmill that has run: its exit code, what it printed, when it began and how long it took.

    ``cpu``: the seconds that its processes computed, whatever else runs here. ``peaks``: the highest resident memory of each of
    them in bytes, ``total`` that of all at one moment.
    """

    def __init__(
        self, *arguments: object, meanwhile: Callable[[subprocess.Popen[str]], object] = lambda process: None
    ) -> None:
        self.peaks, self.total, self.began, before = Counter[str](), 0, time.time(), cpu_seconds()
        command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
        with subprocess.Popen(command, env=FRUGAL, stdout=subprocess.PIPE, text=True) as process:
            watch = threading.Thread(target=self._watch, args=(process,))
            watch.start()
            try:
                meanwhile(process)
                self.printed, _ = process.communicate()
            finally:
                process.kill()
                self.code = process.wait()
                watch.join()
        self.seconds, self.cpu = time.time() - self.began, cpu_seconds() - before

    def _watch(self, process: subprocess.Popen[str]) -> None:
        parent = psutil.Process(process.pid)
        while process.returncode is None:
            total = psutil.Process().memory_info().rss
            with suppress(psutil.Error, OSError, KeyError):  # one that has just ended has no memory
                for one in (*parent.children(), parent):
                    total += self._look(one)
            self.total = max(self.total, total)
            time.sleep(0.1)

    def _look(self, process: psutil.Process) -> int:
        """What it holds now. The highest is the kernel's own mark: it misses nothing between two looks."""
        rank = process.environ().get("RANK")
        name = "process" if rank is None else f"rank {rank}"
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        self.peaks[name] = max(self.peaks[name], int(status["VmHWM"].split()[0]) * 1024)
        return process.memory_info().rss


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(run / "log.jsonl") if line["kind"] == "train"]


def train(run: Path, method: str, *engine: object, until: int | None = None) -> Command:
    """Train to the end, or be stopped by a signal after the step ``until``."""
    arguments = ("train", f"imagenet/{method}_vit_l", f"run.dir={run}", *SETTINGS, *OF_METHOD[method], *engine)
    if until is None:
        return Command(*arguments)
    stopped = Command(*arguments, meanwhile=lambda process: stop_after(until, process, run))
    assert stopped.code == 75
    assert json.loads((run / "why_stopped.json").read_text())["step"] == until
    return stopped


def stop_after(step: int, process: subprocess.Popen[str], run: Path) -> None:
    """All ranks stop one step after the one in which any of them gets a signal."""
    while (step - 2) not in dict(losses(run)):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)  # the line is written a moment before its step ends
    process.send_signal(signal.SIGTERM)


def phases(run: Path, *commands: Command) -> Iterator[str]:
    """The seconds of each phase, from the log and the clock."""
    starts, before = iter(commands), 0.0
    for line in read_log(run / "log.jsonl"):
        took = line["time"] - before
        if line["kind"] in ("start", "resume"):
            yield f"{line['kind']} {line['time'] - next(starts).began - line['load_s']:.0f}, load {line['load_s']:.0f}"
        elif line["kind"] == "train":
            yield f"step {line['step']} {took:.0f}"
        elif line["kind"] == "checkpoint":
            yield f"save {line['seconds']:.0f} (stall {line['stall_s']:.1f})"
        before = line["time"]


def distances(found: Path, expected: Path) -> dict[str, float]:
    """How far the two checkpoints of one process are from each other, relative, by the kind of their tensors."""
    apart, size = Counter[str](), Counter[str]()
    for path in sorted(expected.glob("*.safetensors")):
        with safe_open(path, "pt") as a, safe_open(found / path.name, "pt") as b:
            assert sorted(a.keys()) == sorted(b.keys())
            for name in a.keys():  # noqa: SIM118
                kind, value = name.partition(".")[0], a.get_tensor(name)
                apart[kind] += float((b.get_tensor(name) - value).square().sum())
                size[kind] += float(value.square().sum())
    return {kind: (apart[kind] / size[kind]) ** 0.5 for kind in size}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: pytest would keep the gigabytes of the last three times."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["pcae", "randsac"])
def test_fsdp2_then_zero3_then_one_process_then_timm_are_as_one_process_alone(method, folder, capsys):
    run, other, out = folder / "run", folder / "alone", folder / "encoder.safetensors"
    fsdp2 = train(run, method, "engine.name=fsdp2", "--nproc", 2, until=3)
    zero3 = train(run, method, "engine.name=deepspeed", "engine.zero_stage=3", "--nproc", 2, until=6)
    single, alone = train(run, method), train(other, method)
    exported = Command("export", run, out)
    assert [single.code, alone.code, exported.code] == [0, 0, 0]

    found, expected = losses(run), losses(other)
    states = distances(*(path / "checkpoints" / "step-00000007" for path in (run, other)))
    commands = {"fsdp2": fsdp2, "zero3": zero3, "single": single, "alone": alone, "export": exported}
    lines = [f"{method}: losses {found}", f"alone {expected}", f"apart {states}"]
    for name, command in commands.items():
        peaks = ", ".join(f"{part} {peak / GIB:.2f}" for part, peak in sorted(command.peaks.items()))
        lines.append(f"{name}: {command.seconds:.0f} s ({command.cpu:.0f} s of CPU); GiB at most: {peaks}, "
                     f"all together {command.total / GIB:.2f}")  # fmt: skip
    lines += [f"seconds: {', '.join(phases(run, fsdp2, zero3, single))}", f"alone: {', '.join(phases(other, alone))}"]
    lines.append(f"all: {sum(command.seconds for command in commands.values()):.0f} s at a load of {os.getloadavg()}")
    with capsys.disabled():
        sys.stdout.write("\n" + "\n  ".join(lines) + "\n")

    assert [step for step, _ in found] == [*range(1, 8)]
    # What is left is bf16: 2e-4 of PCAE's loss, 8e-5 of RandSAC's.
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-3)
    assert abs(expected[-1][1] / expected[0][1] - 1) > 0.05, "losses that stay would hide a fault"
    assert states.keys() <= BARS.keys() and all(apart <= BARS[kind] for kind, apart in states.items())
    assert max(command.total for command in commands.values()) < LIMIT

    model, encoder = as_printed(exported.printed.rstrip(), out), restore(run).method.encoder.eval()
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        got = model.forward_features(normalise(images))
        torch.testing.assert_close(got, own_features(encoder, images, 16), atol=1e-5, rtol=0)
