"""``engine.offload=nvme`` before DeepSpeed starts: what is missing is said, what a killed process left does no harm."""

import atexit
import contextlib
import errno
import fcntl
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from pipeline.check import check
from pipeline.config import Config, ConfigError, UserError, load_config
from pipeline.engine import nvme
from pipeline.engine.torch import join_alone
from pipeline.memory import parameters
from pipeline.zero_config import deepspeed_config, swap_folder


class Builder:
    """Stands for DeepSpeed's: what it would compile takes minutes (tests/integration/test_zero.py has the real one)."""

    def __init__(self, *, compatible: bool = True) -> None:
        self.compatible, self.loads = compatible, 0

    def is_compatible(self) -> bool:
        return self.compatible

    def load(self, *, verbose: bool) -> None:
        assert not verbose
        self.loads += 1


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kept"))
    join_alone()
    engine = f"{{name: deepspeed, zero_stage: 3, offload: nvme, offload_dir: {tmp_path / 'disk'}}}"
    return load_config(
        ["imagenet/mae_vit_b"], [f"run.dir={tmp_path / 'run'}", "data.train=x.beton", f"engine={engine}"]
    )


def test_a_runs_files_have_a_folder_of_their_own(cfg: Config, tmp_path: Path) -> None:
    other = cfg.model_copy(update={"run": cfg.run.model_copy(update={"dir": str(tmp_path / "other")})})
    assert swap_folder(cfg).parent == swap_folder(other).parent == tmp_path / "disk"
    assert swap_folder(cfg) != swap_folder(other)
    optimizer = deepspeed_config(cfg, 1)["zero_optimization"]["offload_optimizer"]
    assert optimizer == {"device": "nvme", "nvme_path": str(swap_folder(cfg))}
    assert "offload_param" not in deepspeed_config(cfg, 1)["zero_optimization"]
    whole = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"offload_params": True})})
    assert deepspeed_config(whole, 1)["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_the_extension_is_compiled_behind_a_lock_that_a_killed_process_does_not_keep(
    cfg: Config, tmp_path: Path
) -> None:
    left = tmp_path / "kept" / "async_io" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()  # torch would wait for its owner for ever
    builder = Builder()
    nvme.prepare_nvme(cfg, builder)
    assert builder.loads == 1 and not left.exists()
    assert (swap_folder(cfg) / "rank0").stat().st_size == 0, "the room is for DeepSpeed"


def test_no_other_process_compiles_meanwhile(cfg: Config, tmp_path: Path) -> None:
    builder, seen = Builder(), list[bool]()

    def held() -> bool:
        with (tmp_path / "kept" / "patchmill.lock").open(
            "w"
        ) as other:  # a lock is of the open file, not of the process
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    builder.load = lambda *, verbose: seen.append(held())
    nvme.prepare_nvme(cfg, builder)
    assert seen == [True] and not held()


def test_a_containers_list_of_architectures_does_not_reach_deepspeed(cfg: Config, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")  # its parser knows numbers only
    builder, seen = Builder(), list[str | None]()
    builder.load = lambda *, verbose: seen.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    nvme.prepare_nvme(cfg, builder)
    assert seen == [None] and os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0a"


def test_what_the_compiler_says_is_one_line(cfg: Config) -> None:
    def load(*, verbose: bool) -> None:
        raise RuntimeError("Error building extension 'async_io': no room")

    builder = Builder()
    builder.load = load
    with pytest.raises(UserError, match="cannot be compiled: Error building.*no room; set engine.offload=cpu"):
        nvme.prepare_nvme(cfg, builder)


def test_a_home_that_cannot_be_written_is_named(cfg: Config, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")
    with pytest.raises(UserError, match="/proc/nowhere cannot be written .*; set TORCH_EXTENSIONS_DIR"):
        nvme.prepare_nvme(cfg, Builder())


@pytest.mark.parametrize("starts", [True, False])
def test_the_files_go_with_the_process_also_when_it_could_not_start(cfg: Config, monkeypatch, starts: bool) -> None:
    last = contextlib.ExitStack()
    monkeypatch.setattr(atexit, "register", last.callback)
    with contextlib.nullcontext() if starts else pytest.raises(UserError):
        nvme.prepare_nvme(cfg, Builder(compatible=starts))
    swapped = swap_folder(cfg) / "zero_stage_3" / "optimizer" / "rank0"
    swapped.mkdir(parents=True)
    assert (swap_folder(cfg) / "rank0").exists()
    last.close()
    assert not swap_folder(cfg).exists()


def test_no_rank_starts_where_another_has_no_room(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    told, builder = list[float](), Builder()

    def another_fails(failed: torch.Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX and (swap_folder(cfg) / "rank0").stat().st_size > 0, (
            "this one has its room by now"
        )
        told.append(float(failed))
        failed.fill_(1.0)

    monkeypatch.setattr(dist, "all_reduce", another_fails)
    with pytest.raises(UserError, match="cannot be written: another rank says why; set it to another folder"):
        nvme.prepare_nvme(cfg, builder)
    assert told == [0.0] and builder.loads == 0


def test_the_last_rank_of_a_host_removes_the_folder(cfg: Config) -> None:
    nvme.prepare_nvme(cfg, Builder())
    folder = swap_folder(cfg)
    (folder / "rank1").touch()
    swapped = folder / "zero_stage_3" / "optimizer" / "rank0"
    swapped.mkdir(parents=True)
    nvme._remove(folder, 0)
    assert not swapped.exists() and folder.exists()
    nvme._remove(folder, 1)
    assert not folder.exists()


def test_check_says_what_files_need_and_what_is_missing(cfg: Config, tmp_path: Path, monkeypatch) -> None:
    here = cfg.model_copy(update={"data": cfg.data.model_copy(update={"loader": "synthetic", "num_samples": 4096})})
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=0))
    assert re.search(
        rf"offload: files in {tmp_path}/disk/\S+: 1\.2\d GiB over all hosts, \d+\.\d\d GiB free here", check(here)
    )
    assert "warning" not in check(here)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
        assert (
            f"warning: engine.offload_dir = {tmp_path}/disk: one host alone would have too little room in {tmp_path};"
            in check(here)
        )
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=1))
    with pytest.raises(ConfigError, match=r"needs g\+\+, libaio with its headers"):
        check(here)
    (tmp_path / "disk").touch()
    with pytest.raises(ConfigError, match=r"engine\.offload_dir = .*disk: .* cannot be written"):
        check(here)


def test_what_a_killed_run_left_makes_room_for_the_next(cfg: Config) -> None:
    """Its own files and those of ranks that are no more; not those of other ranks."""
    swapped = swap_folder(cfg) / "zero_stage_3" / "optimizer"
    for rank in (0, 1):
        (swapped / f"rank{rank}").mkdir(parents=True)
        (swap_folder(cfg) / f"rank{rank}").touch()
    nvme.prepare_nvme(cfg, Builder())
    assert list(swapped.glob("*")) == [] and (swap_folder(cfg) / "rank0").exists()


def test_what_is_missing_is_named(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"engine\.offload = nvme: needs g\+\+, libaio .*libaio-dev.*engine\.offload=cpu"
    ):
        nvme.prepare_nvme(cfg, Builder(compatible=False))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"needs g\+\+"):
        nvme.prepare_nvme(cfg, Builder())


def test_a_disk_that_cannot_take_the_files_is_found_at_the_start(cfg: Config, tmp_path: Path, monkeypatch) -> None:
    def full(number: int, start: int, size: int) -> None:
        assert (start, size) == (0, 12 * sum(p.size for p in parameters(cfg) if p.trained))
        raise OSError(errno.ENOSPC, "No space left on device")

    told, builder = list[float](), Builder()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        patch.setattr(dist, "all_reduce", lambda failed, op: told.append(float(failed)))
        with pytest.raises(UserError, match=r"engine\.offload_dir = .*disk: 1\.2\d\d GiB .* No space left on device"):
            nvme.prepare_nvme(cfg, builder)
    (tmp_path / "file").touch()
    wrong = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"offload_dir": str(tmp_path / "file")})})
    with pytest.raises(UserError, match=r"file: .* cannot be written: Not a directory"):
        nvme.prepare_nvme(wrong, builder)
    assert told == [1.0] and builder.loads == 0
