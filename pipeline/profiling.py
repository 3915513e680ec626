"""A profile of some steps, and what is left when a GPU's memory runs out; all of it in the run's ``profile`` folder."""

import logging
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Config, RunFailed
from pipeline.launch import World

log = logging.getLogger("patchmill")

ROWS = 15  # of the table of operations


class Profiler:
    """torch.profiler over the steps that ``profile.start_step`` and ``profile.num_steps`` name; else it does nothing."""

    def __init__(self, cfg: Config, folder: Path, world: World) -> None:
        """``folder`` is the run's."""
        settings, self._rank, self._world = cfg.profile, world.rank, world
        self._cfg, self._folder = cfg, folder / "profile"
        self._first = settings.start_step
        self._last = settings.start_step + settings.num_steps - 1 if settings.start_step else None
        self._profile: Any = None
        self._memory = settings.memory and torch.cuda.is_available()
        if self._memory:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def before(self, step: int) -> None:
        """Call it before step ``step``, counted from 1."""
        if step == self._first:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, profile_memory=True)
            self._profile.start()

    def after(self, step: int) -> None:
        """Call it after step ``step``: at the last one the profile is written."""
        if step == self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """End a profile that goes on, of the steps up to ``step``: its trace and a table of the dearest operations.

        To be called before the process ends, which otherwise crashes. A full disk is said, no more.
        """
        if self._profile is None:
            return
        self._profile.stop()
        profile, self._profile = self._profile, None
        try:
            self._write(profile, f"steps-{self._first:08d}-{step:08d}-rank-{self._rank:05d}")
        except OSError as error:
            log.error("profile: cannot be written to %s (%s)", self._folder, error.strerror)

    def _write(self, profile: Any, name: str) -> None:
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        (self._folder / f"{name}.txt").write_text(profile.key_averages().table(sort_by=order, row_limit=ROWS))
        log.info(
            "profile: %s (open it in ui.perfetto.dev) and its table %s.txt", self._folder / f"{name}.json.gz", name
        )
        if self._memory:
            self._snapshot(name)

    def _snapshot(self, name: str) -> str:
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"memory-{name}.pickle"  # CUDA's own format, for pytorch.org/memory_viz; never read here
        torch.cuda.memory._dump_snapshot(str(path))
        return f"; its allocations are in {path}"

    def explain(self, error: BaseException, step: int, micro_batch: int) -> BaseException:
        """RunFailed with the settings to change where the device's memory ran out, else ``error``."""
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        engine, advice = self._cfg.engine, [f"train.micro_batch below {micro_batch}"] * (micro_batch > 1)
        if engine.checkpoint_layers == "none":
            advice.append("engine.checkpoint_layers=full")
        if engine.precision == "fp32":
            advice.append("engine.precision=bf16")
        more = "engine.name=fsdp2 on" if engine.name in ("single", "ddp") else "or take"
        advice.append(f"{more} more processes")
        where = self._snapshot(f"step-{step:08d}-rank-{self._rank:05d}") if self._memory else ""
        return RunFailed(f"{self._world.name}: the device's memory ran out in step {step}; set {', '.join(advice)} "
                         f"({' '.join(str(error).split())[:200]}){where}")  # fmt: skip
