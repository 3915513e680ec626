"""Training: build in order, then the loop. The only module that sees everything."""

import gc
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import checkpoint, mlflow_layout, order
from pipeline.config import Config, RunFailed, UserError, flatten
from pipeline.data import Batches, decode_threads
from pipeline.engine import Engine, build_engine
from pipeline.estimate import flops_per_image
from pipeline.eval_settings import FinetuneConfig
from pipeline.evaluate.finetune import choose_source, require_labels, start_from
from pipeline.guard import Agreement, Heartbeat, NonFinite, NonFiniteGuard, Stragglers
from pipeline.launch import Portion, World, connect
from pipeline.metrics import Progress, device_name, peak_gib, setup_logging
from pipeline.optim import lr_at, momentum_at
from pipeline.order import Plan
from pipeline.profiling import Profiler
from pipeline.runs import open_run, open_training, write_why
from pipeline.saver import Saved, Saver
from pipeline.steps import Silent, StepBuffer, update
from pipeline.stop import StopRequest
from pipeline.tracking import MlflowSink, RunLog, discard_after, read_log, resolve_uri
from pipeline.watches import Watch, open_watches

log = logging.getLogger("patchmill")

DONE, STOPPED = 0, 75


def _versions() -> dict[str, str]:
    names = ("patchmill", "torch", "timm", "ffcv", "deepspeed", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


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
            self.loader = open_training(cfg)
            self.plan = Plan.of(cfg, self.loader.num_samples)
            require_labels(cfg, self.loader)
            self.watches = open_watches(cfg, self.plan)
        self._require_same_images()
        self.restarts, self.rollbacks, self.trouble, self.save_owed = 0, 0, 0, False
        self.profiler = Profiler(cfg, folder, world)
        self._take_up()
        self.sink: MlflowSink | Silent = Silent()
        if world.is_main:
            self.restarts = sum(line["kind"] in ("start", "resume") for line in read_log(folder / "log.jsonl"))
            self._keep_seal()
            images = self.loader
            self.sink = MlflowSink(folder, resolve_uri(cfg.tracking.uri, folder), cfg.tracking.experiment, folder.name,
                                   params=flatten(cfg.model_dump(mode="json")),
                                   tags=mlflow_layout.tags(cfg, folder, world_size=world.size, device=device_name(device),
                                                           versions=_versions()),
                                   inputs=mlflow_layout.inputs(cfg, images.image_set, images.num_samples,
                                                               images.num_classes))  # fmt: skip
        self._open_log()
        self.agreement, self.stragglers = Agreement(world), Stragglers(world, device)
        self.saver = Saver(self.checkpoints, cfg.checkpoint.keep, world, device)

    def _open_log(self) -> None:
        """The log without what lies past the step at hand."""
        self.run_log: RunLog | Silent = Silent()
        if self.world.is_main:
            discard_after(self.folder, self.step)
            self.run_log = RunLog(self.folder / "log.jsonl")
        self.buffer = StepBuffer(self.cfg.train.global_batch, self.engine.trained_names, self.run_log, self.sink,
                                 self.guard, self.world, flops_per_image(self.cfg).step)  # fmt: skip

    def _require_same_images(self) -> None:
        for rank, other in enumerate(self.world.gather(self.loader.image_set)):
            if other != self.loader.image_set:
                raise UserError(f"data.train = {self.cfg.data.train}: rank {rank} and rank {self.world.rank} hold different image "
                                f"sets ({other[:12]} and {self.loader.image_set[:12]}); give all hosts the same file")  # fmt: skip

    def _take_up(self, *, before_streak: bool = False) -> None:
        """An engine with the state of the newest whole checkpoint, or with its first weights.

        ``before_streak``: where steps that were not finite had begun, that is the state before the first of them.
        """
        cfg, self.origin = self.cfg, dict[str, Any]()
        with self.world.together():
            self.engine: Engine = build_engine(cfg, self.device)
        began = time.perf_counter()
        with self.world.together():
            chosen = checkpoint.choose(self.checkpoints) if self.world.is_main else None
            source = isinstance(cfg.method, FinetuneConfig) and cfg.method.init
            first = choose_source(Path(source)) if source and self.world.is_main and chosen is None else None
        path, first = self.world.from_main((chosen, first))
        state: dict[str, Any] = checkpoint.read_state(path) if path else {}
        with self.world.together():
            if path is not None:
                self._load(path, state)
            elif first is not None and isinstance(cfg.method, FinetuneConfig):
                self.origin = start_from(self.engine, first, cfg.method.init_weights)
        self.load_s = time.perf_counter() - began
        streak = state.get("nonfinite_streak", 0)
        self.guard = NonFiniteGuard(self.cfg.guard.max_nonfinite, 0 if before_streak else streak)
        self.skipped_ranges = [tuple(pair) for pair in state.get("skipped_ranges", [])]
        self.step = int(state.get("step", 0)) - (streak if before_streak else 0)
        self.saved_step = self.step if path else None

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        if "imported" in state:
            raise UserError(
                f"run.dir = {self.folder}: holds imported weights, for evaluation and export; train in another folder"
            )
        if state["image_set"] != self.loader.image_set:
            raise UserError(f"data.train = {self.cfg.data.train}: holds another image set than the one that {path} was trained "
                            f"on ({self.loader.image_set[:12]} instead of {state['image_set'][:12]})")  # fmt: skip
        if state["torch_threads"] != torch.get_num_threads():
            log.warning("torch runs on %d threads, the checkpoint's run on %d: sums may differ in the last bits",
                        torch.get_num_threads(), state["torch_threads"])  # fmt: skip
        tensors = self.engine.state()
        checkpoint.load(path, tensors)
        self.engine.load(tensors)

    def _keep_seal(self) -> None:
        """The data's seal in the run folder: what these images were stays known when the file is gone."""
        seal = Path(f"{self.cfg.data.train}.seal.json")
        if self.cfg.data.loader == "ffcv" and seal.is_file():
            shutil.copyfile(seal, self.folder / "data_seal.json")

    def _save(self) -> None:
        """Begin to save; a save that still goes on is waited for."""
        self.heart.beat("save", self.step)
        self._report(self.saver.wait())
        began = time.perf_counter()
        self.saver.start(self.step, self.engine.state(), {
            "samples_seen": self.step * self.cfg.train.global_batch, "skipped_ranges": self.skipped_ranges,
            "nonfinite_streak": self.guard.streak, "image_set": self.loader.image_set,
            "torch_threads": torch.get_num_threads(), "config": self.cfg.model_dump(mode="json"), "versions": _versions(),
        }, copied=self.engine.state_is_copy, began=began)  # fmt: skip
        self.buffer.flush()  # the pause is not training time

    def _report(self, saved: Saved | None) -> None:
        """On failure the last good checkpoint stays, the log says so, and training goes on."""
        if saved is None:
            return
        if saved.path is None:
            if self.world.is_main:  # all know it
                log.error("%s; the last good checkpoint stays, training goes on", saved.reason)
            self.run_log.write("checkpoint", step=saved.step, saved=False, reason=saved.reason)
            return
        self.saved_step = saved.step
        if saved.step > self.trouble:
            self.rollbacks = 0
        self.run_log.write("checkpoint", step=saved.step, saved=True, path=saved.path.name, seconds=saved.seconds,
                           stall_s=saved.stall_s)  # fmt: skip

    def _save_last(self) -> bool:
        """Whether the state at hand is saved, now if it is not."""
        self.heart.beat("save", self.step)
        self._report(self.saver.wait())
        if self.saved_step != self.step:
            self._save()
            self._report(self.saver.wait())
        return self.saved_step == self.step

    def run(self, stop: StopRequest) -> int:
        """Train to the end or to a signal; returns the exit code."""
        cfg, plan = self.cfg, self.plan
        kind, engine = "resume" if self.step else "start", cfg.engine
        layout = mlflow_layout.engine_name(cfg)
        self.run_log.write(kind, step=self.step, total_steps=plan.total_steps, lr=cfg.lr, base_lr=cfg.optim.base_lr,
                           engine=layout, processes=self.world.size, precision=engine.precision, micro_batch=self.portion.micro,
                           load_s=self.load_s, flops_per_image=flops_per_image(cfg).step, device=device_name(self.device),
                           versions=_versions(), **self.origin)  # fmt: skip
        log.info("%s %s %s: step %d of %d, %d images, batch %d, lr %.3g (base_lr %.3g x %d / 256); %s, "
                 "processes: %d, %s", kind, cfg.method.name, cfg.model.name, self.step, plan.total_steps, self.loader.num_samples,
                 cfg.train.global_batch, cfg.lr, cfg.optim.base_lr, cfg.train.global_batch, layout, self.world.size,
                 engine.precision)  # fmt: skip
        log.info("decoding threads: %d (%s)", *decode_threads(cfg.data.threads))
        status = "FAILED"
        try:
            with Heartbeat(self.folder, self.world, cfg.guard.hang_s, cfg.engine.timeout_s, self._hung) as self.heart:
                with Progress(
                    f"train {cfg.method.name}", plan.total_steps, "step", shown=self.world.is_main
                ) as progress:
                    while not self._attempt(stop, progress):
                        pass
                    saved = self._save_last()
                code = self._finish(stop.requested or "a signal to another rank", saved)
            status = {DONE: "FINISHED", STOPPED: "KILLED"}.get(code, "FAILED")
            return code
        except BaseException as found:
            error = self.profiler.explain(self.world.explain(found), self.step + 1, self.portion.micro)
            if isinstance(error, OSError):
                error = RunFailed(
                    f"{error.filename}: {error.strerror}; the newest checkpoint stays, start the run again"
                )
            with suppress(OSError):  # the log is closed when a roll-back fails
                self.run_log.write("stop", step=self.step, reason=f"{type(error).__name__}: {error}")
            self._write_why(done=False, reason=str(error) or type(error).__name__)
            raise error from found
        finally:
            self.profiler.close(self.step)
            self.saver.close()
            self.loader.close()
            for watch in self.watches:
                watch.close()
            self.sink.close(status)

    def _attempt(self, stop: StopRequest, progress: Progress) -> bool:
        """Train on; False when the run went back to a checkpoint instead."""
        windows = self.loader.windows(self.cfg.data.window_pages) if self.cfg.data.shuffle == "windowed" else None
        steps = order.run_order(self.cfg.train.seed, self.step, self.plan.total_steps, self.loader.num_samples,
                                self.cfg.train.global_batch, self.skipped_ranges, windows)  # fmt: skip
        try:
            with self.loader.batches(steps, self.device, self.portion.samples) as batches:
                self._loop(batches, stop, progress)
            return True
        except NonFinite as found:
            self._roll_back(found)
            return False

    def _loop(self, batches: Batches, stop: StopRequest, progress: Progress) -> None:
        """The loop."""
        cfg, plan, heart, waited = self.cfg, self.plan, self.heart, 0.0
        progress.update(self.step)
        heart.beat("data", self.step)
        for batch in batches:
            heart.beat("compute", self.step)
            self.profiler.before(self.step + 1)
            epoch = order.data_position(self.step, self.skipped_ranges) // plan.steps_per_epoch
            lr = lr_at(self.step, plan.total_steps, plan.warmup_steps, cfg.lr)
            momentum = momentum_at(self.step, plan.total_steps, *cfg.momentum)
            scalars = update(self.engine, batch, self.portion, lr, cfg.optim.clip, momentum, self.saver.ready)
            self.step += 1
            self.buffer.add(self.step, epoch, lr, scalars, batches.waited - waited, batch.keys)
            waited = batches.waited
            heart.beat("profile", self.step)
            self.profiler.after(self.step)
            self._between(progress)
            if self.agreement(stop.requested is not None):
                log.info("stopping: the state is saved; Ctrl-C gives that up, and the steps since the last checkpoint")
                break
            heart.beat("data", self.step)
        self.buffer.flush()
        progress.update(self.step)

    def _between(self, progress: Progress) -> None:
        """What is due after a step: the log, the held-out loss, the online signals, a checkpoint."""
        cfg, step = self.cfg, self.step
        self._report(self.saver.outcome())
        log_due, save_due = step % cfg.log.every_steps == 0, step % cfg.checkpoint.every_steps == 0 or self.save_owed
        watches = [watch for watch in self.watches if watch.due(step)]
        if not (log_due or save_due or watches):
            return
        self.heart.beat("log", step)
        means = self.buffer.flush()
        if log_due:
            progress.update(step, text=f"loss {means['loss']:.4f}  {means['images_per_s']:.0f} images/s")
            for line in self.stragglers.observe(means["data_wait"]):
                self.run_log.write("straggler", step=step, reason=line)
                if self.world.is_main:
                    log.warning("%s", line)
        for watch in watches:  # before the save: what a kill in here takes away is done again
            self._observe(watch)
        # In a streak the newest checkpoint is what a roll-back goes to, and must stay: the one that is due waits for its end.
        self.save_owed = save_due and self.guard.streak > 0
        if save_due and not self.save_owed:
            self._save()

    def _observe(self, watch: Watch) -> None:
        self.heart.beat(watch.name, self.step)
        fields, text = watch.observe(self.engine, self.portion, self.world)
        line = self.run_log.write("eval", step=self.step, **fields)
        if not self.guard.streak:  # else it may be rolled back, and MLflow forgets nothing; sync sends what stays
            self.sink.log(self.step, line)
        log.info("step %d: %s", self.step, text)
        if "collapse" in fields:
            log.warning("step %d: the features look collapsed: %s; training goes on", self.step, fields["collapse"])
        self.buffer.flush()  # the pause is not training time

    def _roll_back(self, found: NonFinite) -> None:
        """Go back to the newest checkpoint and leave out the batches of the bad steps. Raises RunFailed after too many."""
        self.heart.beat("start", self.step)
        tensor, limit = self.buffer.culprit, self.cfg.guard.max_rollbacks
        self._report(self.saver.wait())
        self.rollbacks, self.trouble = self.rollbacks + 1, found.last
        if self.rollbacks > limit:
            if not self.world.is_main:
                raise SystemExit(1)
            raise RunFailed(f"{found}, and {limit} roll-backs (guard.max_rollbacks) have not helped; in the backward pass it began "
                            f"at {tensor}. Lower optim.base_lr, set optim.clip, or look at the data.")  # fmt: skip
        ranges = order.leave_out(self.skipped_ranges, found.first - 1, found.last)
        scale = self.engine.loss_scale
        self.engine.close()
        del self.engine, self.buffer  # before there is a second one
        gc.collect()
        self._take_up(before_streak=True)
        if scale is not None and self.engine.loss_scale is not None:
            # What has not overflowed at the end of the streak; else the same search begins again.
            self.engine.loss_scale.scale.copy_(scale.scale)
        self.skipped_ranges = ranges
        self.run_log.close()
        self._open_log()
        self.run_log.write("rollback", step=self.step, first=found.first, last=found.last, tensor=tensor,
                           skipped_ranges=ranges)  # fmt: skip
        say = log.warning if self.world.is_main else log.debug  # all know it
        say("%s (in the backward pass it began at %s); back to step %d, without the batches of these steps", found,
            tensor, self.step)  # fmt: skip

    def _hung(self, reason: str) -> None:
        self.run_log.write("stop", step=self.step, reason=reason)
        self._put_why(done=False, reason=reason)

    def _write_why(self, *, done: bool, reason: str) -> None:
        if self.world.is_main:
            self._put_why(done=done, reason=reason)

    def _put_why(self, *, done: bool, reason: str) -> None:
        try:
            write_why(self.folder, done=done, reason=reason, step=self.step, restarts=self.restarts)
        except OSError as error:
            log.error("why_stopped.json cannot be written (%s): %s", error.strerror, reason)

    def _finish(self, signal_name: str, saved: bool) -> int:
        """Say why it ended; draw a figure at the end of a run."""
        done = self.step == self.plan.total_steps
        reason = "done" if done else f"stopped by {signal_name}"
        peak: dict[str, float] = {}
        if done:
            peak = {"peak_gib": max(self.world.gather(peak_gib(self.device)))}  # of training, without the figure
            self.heart.beat("figure", self.step)
            self._figure()
        self.heart.beat("end", self.step)
        self.run_log.write("stop", step=self.step, reason=reason, **peak)
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
        figure = self.engine.call("figure", batch.images, self.engine.method.draw(batch.keys, labels=batch.labels))
        if self.world.is_main:
            path = self.folder / "figures" / f"{self.cfg.method.name}_step{self.step:08d}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                figure.save(path)
            except OSError as error:
                log.error("%s cannot be written (%s); the run is done all the same", path, error.strerror)
                return
            self.sink.log_figure(path)


@contextmanager
def _open(cfg: Config, world: World) -> Iterator[Path]:
    """The run folder, opened by the main process for all."""
    with ExitStack() as stack:
        with world.together():
            if world.is_main:
                stack.enter_context(open_run(cfg))
        yield Path(cfg.run.dir)


def train(cfg: Config, stop: StopRequest) -> int:
    """Train a configuration to its end; returns the process's exit code (0 done, 75 stopped on a signal, 1 not saved).

    Under torchrun or srun this is one of the run's processes.
    """
    with connect(cfg) as (world, device), _open(cfg, world) as folder:
        setup_logging(folder if world.is_main else None, world.rank)
        return Trainer(cfg, folder, world, device).run(stop)
