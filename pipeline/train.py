"""Training: build in order, then the loop. The only module that sees everything."""

import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import checkpoint, order
from pipeline.config import Config, UserError, flatten
from pipeline.data import Batch, decode_threads
from pipeline.engine import Engine
from pipeline.engine.torch import TorchEngine
from pipeline.estimate import flops_per_image
from pipeline.guard import Agreement, NonFiniteGuard, StopRequest
from pipeline.launch import World, connect
from pipeline.metrics import Meter, Progress, setup_logging
from pipeline.optim import lr_at, momentum_at
from pipeline.order import Plan
from pipeline.runs import open_images, open_run, write_why
from pipeline.tracking import MlflowSink, RunLog, discard_after, read_log, resolve_uri

log = logging.getLogger("patchmill")

DONE, STOPPED = 0, 75


@dataclass(frozen=True)
class Portion:
    """What one rank does of a global batch: ``samples`` of it, in ``num_micro`` micro-batches of ``micro`` images."""

    samples: slice
    micro: int
    num_micro: int

    @classmethod
    def of(cls, cfg: Config, world: World) -> "Portion":
        """Raises UserError when the ranks and micro-batches do not divide the global batch."""
        batch = cfg.train.global_batch
        if batch % world.size:
            raise UserError(
                f"train.global_batch = {batch}: should be a multiple of the {world.size} processes of this run"
            )
        share = batch // world.size
        micro = share if cfg.train.micro_batch == "auto" else cfg.train.micro_batch
        if share % micro:
            raise UserError(f"train.micro_batch = {micro}: should divide {share}, the images of each of {world.size} processes "
                            f"in a batch of {batch}; take {math.gcd(share, micro)}")  # fmt: skip
        return cls(slice(world.rank * share, (world.rank + 1) * share), micro, share // micro)


class _Silent:
    """The log and the sink of a rank that is not the main one."""

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {}

    def log(self, *_: Any) -> None:
        pass

    log_figure = close = log


class StepBuffer:
    """Training lines whose numbers are still on the device; one transfer a log interval turns them into log lines."""

    def __init__(self, batch: int, run_log: "RunLog | _Silent", sink: "MlflowSink | _Silent", guard: NonFiniteGuard,
                 world: World) -> None:  # fmt: skip
        """Lines of steps of ``batch`` images go to ``run_log`` first, then to ``sink``."""
        self.batch, self.run_log, self.sink, self.guard = batch, run_log, sink, guard
        self.meter, self.known = Meter(world.gather if world.size > 1 else None), list[dict[str, float]]()

    def add(self, step: int, epoch: int, lr: float, scalars: dict[str, Tensor], waited_s: float) -> None:
        """One step's device scalars, and the seconds it waited for data."""
        self.meter.add(scalars, self.batch, waited_s)
        self.known.append({"step": step, "samples_seen": step * self.batch, "epoch": epoch, "lr": lr})

    def flush(self) -> dict[str, float]:
        """Write a line a step and restart the clock; returns the interval's means. Raises NonFinite by the guard's verdict."""
        means = self.meter.flush()
        known, self.known = self.known, []
        verdicts = []
        for fields, row in zip(known, self.meter.rows, strict=True):
            skipped = bool(row.pop("skipped"))
            verdicts.append((int(fields["step"]), skipped))
            if skipped:
                self.run_log.write("skip", step=fields["step"], reason="the gradient is not finite")
            self.sink.log(int(fields["step"]), self.run_log.write("train", **fields, **row))
        for verdict in verdicts:
            self.guard.observe(*verdict)
        return means


def _versions() -> dict[str, str]:
    names = ("patchmill", "torch", "timm", "ffcv", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def update(
    engine: Engine, batch: Batch, portion: Portion, lr: float, clip: float | None, momentum: float
) -> dict[str, Tensor]:
    """One optimizer step on this rank's part of a global batch: the step's device scalars."""
    micro, parts = portion.micro, dict[str, list[Tensor]]()
    for index in range(portion.num_micro):
        part = slice(index * micro, (index + 1) * micro)
        draw = engine.method.draw(batch.keys[part], batch.batch_key)
        logs = engine.micro_step(batch.images[part], draw, portion.num_micro, index == portion.num_micro - 1)
        for name, value in logs.items():
            parts.setdefault(name, []).append(value)
    # A monitor's NaN says that one micro-batch had nothing to show; the loss's would be a fault, and stays.
    scalars = {n: torch.stack(v).mean() if n == "loss" else torch.stack(v).nanmean() for n, v in parts.items()}
    report = engine.step(lr, clip, momentum)
    return {**scalars, "grad_norm": report.grad_norm, "skipped": report.skipped}


class Trainer:
    """One process of a run. ``run()`` trains to the end or to a signal and returns the exit code."""

    def __init__(self, cfg: Config, folder: Path, world: World, device: torch.device) -> None:
        """Opens the data, builds the engine and takes up the newest checkpoint."""
        self.cfg, self.folder, self.checkpoints = cfg, folder, folder / "checkpoints"
        self.world, self.device = world, device
        if cfg.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        with world.together():
            self.portion = Portion.of(cfg, world)
            self.loader = open_images(cfg, "train", augment=True)
            self.plan = Plan.of(cfg, self.loader.num_samples)
        self._require_same_images()
        with world.together():
            self.engine: Engine = TorchEngine(cfg, device)
        self.skipped_ranges: list[tuple[int, int]] = []
        with world.together():
            chosen = checkpoint.choose(self.checkpoints) if world.is_main else None
        path = world.from_main(chosen)
        with world.together():
            self.step = self._resume(path)
        self.restarts = 0
        self.run_log: RunLog | _Silent = _Silent()
        self.sink: MlflowSink | _Silent = _Silent()
        if world.is_main:
            self._open_log()
        self.agreement = Agreement(world)
        self.buffer = StepBuffer(cfg.train.global_batch, self.run_log, self.sink, self.guard, world)

    def _open_log(self) -> None:
        cfg, folder = self.cfg, self.folder
        self.restarts = sum(line["kind"] == "resume" for line in read_log(folder / "log.jsonl"))
        discard_after(folder, self.step)
        self._keep_seal()
        self.run_log = RunLog(folder / "log.jsonl")
        self.sink = MlflowSink(folder, resolve_uri(cfg.tracking.uri, folder), cfg.tracking.experiment, folder.name,
                               params=flatten(cfg.model_dump(mode="json")), tags={"method": cfg.method.name})  # fmt: skip

    def _require_same_images(self) -> None:
        for rank, other in enumerate(self.world.gather(self.loader.image_set)):
            if other != self.loader.image_set:
                raise UserError(f"data.train = {self.cfg.data.train}: rank {rank} and rank {self.world.rank} hold different image "
                                f"sets ({other[:12]} and {self.loader.image_set[:12]}); give all hosts the same file")  # fmt: skip

    def _resume(self, path: Path | None) -> int:
        """Load the newest whole checkpoint; the step it holds, or 0."""
        state: dict[str, Any] = checkpoint.read_state(path) if path else {}
        self.guard = NonFiniteGuard(self.cfg.guard.max_nonfinite, state.get("nonfinite_streak", 0))
        if path is None:
            return 0
        if state["image_set"] != self.loader.image_set:
            raise UserError(f"data.train = {self.cfg.data.train}: holds another image set than the one that {path} was trained "
                            f"on ({self.loader.image_set[:12]} instead of {state['image_set'][:12]})")  # fmt: skip
        if state["torch_threads"] != torch.get_num_threads():
            log.warning("torch runs on %d threads, the checkpoint's run on %d: sums may differ in the last bits",
                        torch.get_num_threads(), state["torch_threads"])  # fmt: skip
        tensors = self.engine.state()
        checkpoint.load(path, tensors)
        self.engine.load(tensors)
        self.skipped_ranges = [tuple(pair) for pair in state["skipped_ranges"]]
        return int(state["step"])

    def _keep_seal(self) -> None:
        """The data's seal in the run folder: what these images were stays known when the file is gone."""
        seal = Path(f"{self.cfg.data.train}.seal.json")
        if self.cfg.data.loader == "ffcv" and seal.is_file():
            shutil.copyfile(seal, self.folder / "data_seal.json")

    def save(self) -> bool:
        """Save and retain; on failure the last good checkpoint stays, the log says so, and training goes on."""
        self.buffer.flush()
        state = {
            "samples_seen": self.step * self.cfg.train.global_batch, "skipped_ranges": self.skipped_ranges,
            "nonfinite_streak": self.guard.streak, "image_set": self.loader.image_set,
            "torch_threads": torch.get_num_threads(), "config": self.cfg.model_dump(mode="json"), "versions": _versions(),
        }  # fmt: skip
        started = time.perf_counter()
        try:
            path = checkpoint.save(self.checkpoints, self.step, self.engine.state(), state, self.world)
        except checkpoint.CheckpointError as error:
            log.error("%s; the last good checkpoint stays, training goes on", error)
            self.run_log.write("checkpoint", step=self.step, saved=False, reason=str(error))
            return False
        finally:
            self.buffer.flush()  # the pause is not training time
        if self.world.is_main:
            checkpoint.retain(self.checkpoints, self.cfg.checkpoint.keep)
        self.run_log.write(
            "checkpoint", step=self.step, saved=True, path=path.name, seconds=time.perf_counter() - started
        )
        return True

    def run(self, stop: StopRequest) -> int:
        """Train to the end or to a signal; returns the exit code."""
        cfg, plan = self.cfg, self.plan
        kind = "resume" if self.step else "start"
        self.restarts += kind == "resume"
        self.run_log.write(kind, step=self.step, total_steps=plan.total_steps, lr=cfg.lr, base_lr=cfg.optim.base_lr,
                           flops_per_image=flops_per_image(cfg).step, versions=_versions())  # fmt: skip
        log.info("%s %s %s: step %d of %d, %d images, batch %d, lr %.3g (base_lr %.3g x %d / 256)", kind, cfg.method.name,
                 cfg.model.name, self.step, plan.total_steps, self.loader.num_samples, cfg.train.global_batch, cfg.lr,
                 cfg.optim.base_lr, cfg.train.global_batch)  # fmt: skip
        log.info("decoding on %d threads: %s", *decode_threads(cfg.data.threads))
        windows = self.loader.windows(cfg.data.window_pages) if cfg.data.shuffle == "windowed" else None
        steps = order.run_order(cfg.train.seed, self.step, plan.total_steps, self.loader.num_samples,
                                cfg.train.global_batch, self.skipped_ranges, windows)  # fmt: skip
        self.batches = self.loader.batches(steps, self.device, self.portion.samples)
        status = "FAILED"
        try:
            with Progress(f"train {cfg.method.name}", plan.total_steps, "step", shown=self.world.is_main) as progress:
                saved = self._loop(stop, progress)
            code = self._finish(stop.requested or "a signal to another rank", saved)
            status = {DONE: "FINISHED", STOPPED: "KILLED"}.get(code, "FAILED")
            return code
        except BaseException as found:
            error = self.world.explain(found)
            self.run_log.write("stop", step=self.step, reason=f"{type(error).__name__}: {error}")
            self._write_why(done=False, reason=str(error) or type(error).__name__)
            raise error from found
        finally:
            self.batches.close()
            self.loader.close()
            self.sink.close(status)

    def _loop(self, stop: StopRequest, progress: Progress) -> bool:
        """The loop; returns whether the last state is saved."""
        cfg, plan, saved, waited = self.cfg, self.plan, self.step > 0, 0.0
        progress.update(self.step)
        for batch in self.batches:
            epoch = self.step // self.plan.steps_per_epoch
            lr = lr_at(self.step, plan.total_steps, plan.warmup_steps, cfg.lr)
            momentum = momentum_at(self.step, plan.total_steps, *cfg.momentum)
            scalars = update(self.engine, batch, self.portion, lr, cfg.optim.clip, momentum)
            self.step += 1
            saved = False
            self.buffer.add(self.step, epoch, lr, scalars, self.batches.waited - waited)
            waited = self.batches.waited
            if self.step % cfg.log.every_steps == 0:
                means = self.buffer.flush()
                progress.update(self.step, text=f"loss {means['loss']:.4f}  {means['images_per_s']:.0f} images/s")
            if self.step % cfg.checkpoint.every_steps == 0:
                saved = self.save()
            if self.agreement(stop.requested is not None):
                break
        progress.update(self.step)
        return saved or self.save()

    def _write_why(self, *, done: bool, reason: str) -> None:
        if self.world.is_main:
            write_why(self.folder, done=done, reason=reason, step=self.step, restarts=self.restarts)

    def _finish(self, signal_name: str, saved: bool) -> int:
        """Say why it ended; draw a figure at the end of a run."""
        done = self.step == self.plan.total_steps
        reason = "done" if done else f"stopped by {signal_name}"
        if done:
            self._figure()
        self.run_log.write("stop", step=self.step, reason=reason)
        self._write_why(
            done=done and saved, reason=reason if saved else f"{reason}, but the last state could not be saved"
        )
        log.info("%s at step %d of %d", reason, self.step, self.plan.total_steps)
        if not saved:
            return 1
        return DONE if done else STOPPED

    def _figure(self, num_images: int = 6) -> None:
        """What the method does with some images, as a picture in the run folder and in MLflow."""
        # Files lie class by class: an even spread over the set shows several classes.
        ids = np.linspace(0, self.loader.num_samples - 1, min(num_images, self.loader.num_samples)).astype(np.int64)
        with self.loader.batches(iter([(0, ids)])) as batches:
            batch = next(iter(batches))
        figure = self.engine.call("figure", batch.images, self.engine.method.draw(batch.keys))
        if self.world.is_main:
            path = self.folder / "figures" / f"{self.cfg.method.name}_step{self.step:08d}.png"
            path.parent.mkdir(exist_ok=True)
            figure.save(path)
            self.sink.log_figure(path)


@contextmanager
def _open(cfg: Config, world: World) -> Iterator[Path]:
    """The run folder, opened by the main process for all."""
    with ExitStack() as stack:
        with world.together():
            if world.is_main:
                stack.enter_context(open_run(cfg))
        yield Path(cfg.run.dir)


def train(cfg: Config) -> int:
    """Train a configuration to its end; returns the process's exit code (0 done, 75 stopped on a signal, 1 not saved).

    Under torchrun or srun this is one of the run's processes.
    """
    with StopRequest() as stop, connect(cfg) as (world, device), _open(cfg, world) as folder:
        setup_logging(folder if world.is_main else None, world.rank)
        return Trainer(cfg, folder, world, device).run(stop)
