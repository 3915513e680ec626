"""Checkpoints: what is written, what damage does, and what is left when a save is killed or the disk is full."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpoint import CheckpointError, choose, damage, load, read_state, retain, save
from pipeline.config import UserError
from pipeline.engine.torch import TorchEngine


def tensors(value: float) -> dict[str, Tensor]:
    """Everything in them depends on ``value``; with an empty, a 0-dim and an odd-sized one."""
    return {
        "model.weight": torch.arange(35.0).view(5, 7) + value,
        "model.scalar": torch.tensor(value),
        "ema.token": torch.full((1, 1, 3), value),
        "step.weight": torch.tensor(value),
    }


def blank() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in tensors(0).items()}


def holds(path: Path, value: float) -> bool:
    got = blank()
    load(path, got)
    return all(torch.equal(got[name], expected) for name, expected in tensors(value).items())


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are said loudly."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                lines.append(record.getMessage())

    monkeypatch.setattr(checkpoint.log, "handlers", [Handler()])
    monkeypatch.setattr(checkpoint.log, "level", logging.INFO)
    return lines


@pytest.fixture(scope="session")
def made_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save(folder, 1, tensors(1), {"note": "one"})
    save(folder, 2, tensors(2), {"note": "two"})
    return folder


@pytest.fixture
def pair(made_pair: Path, tmp_path: Path) -> Path:
    """A folder with whole checkpoints of the steps 1 and 2."""
    return Path(shutil.copytree(made_pair, tmp_path / "checkpoints"))


# What is written


def test_save_choose_load(pair: Path, warnings: list[str]) -> None:
    path = choose(pair)
    assert path == pair / "step-00000002" and holds(path, 2) and holds(pair / "step-00000001", 1)
    assert read_state(path)["note"] == "two" and read_state(path)["step"] == 2
    assert damage(path) is None and warnings == []
    assert sorted(p.name for p in pair.iterdir()) == ["step-00000001", "step-00000002"]


def test_nothing_yet_is_none(tmp_path: Path, warnings: list[str]) -> None:
    assert choose(tmp_path) is None and choose(tmp_path / "missing") is None and warnings == []


def test_newest_is_by_step_not_by_time(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, tensors(step), {}) for step in (9, 10, 100)]
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert choose(tmp_path) == tmp_path / "step-00000100"


def test_state_is_kept_as_it_was(tmp_path: Path) -> None:
    state = {"skipped_ranges": [[3, 5]], "nested": {"a": None, "b": 0.1, "c": "ü"}, "big": 2**62}
    path = save(tmp_path, 7, tensors(7), state)
    read = read_state(path)
    assert {key: read[key] for key in state} == state and read["step"] == 7


def test_all_files_may_be_read_by_whom_a_plain_file_may(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    path = save(tmp_path, 1, {"model.a": torch.ones(2)}, {})
    modes = {file.name: file.stat().st_mode for file in path.rglob("*") if file.is_file()}
    assert len(modes) > 1 and set(modes.values()) == {(tmp_path / "plain").stat().st_mode}, modes


def test_files_are_safetensors_under_plain_names_and_hold_no_pickle(tmp_path: Path, tiny_config: Any) -> None:
    engine = TorchEngine(tiny_config("pcae", data__image_size=16), torch.device("cpu"))
    path = save(tmp_path, 3, engine.state(), {})
    names = {}
    for file in path.iterdir():
        assert file.suffix in (".safetensors", ".json")
        if file.suffix == ".json":
            json.loads(file.read_text())
            continue
        with safe_open(file, "pt") as opened:
            names |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert names.keys() == engine.state().keys()
    weights = engine.full_params()
    assert all(torch.equal(names[f"model.{name}"], value) for name, value in weights.items())
    assert not any("_orig_mod" in name or "_checkpoint_wrapped" in name or "module." in name for name in names)


def test_the_seal_lists_every_file_with_size_and_hash(pair: Path) -> None:
    path = pair / "step-00000002"
    seal = json.loads((path / "complete.json").read_text())
    assert seal["step"] == 2
    assert seal["files"].keys() == {p.name for p in path.iterdir()} - {"complete.json"}
    for name, entry in seal["files"].items():
        digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout.split()[
            0
        ]
        assert entry == {"bytes": (path / name).stat().st_size, "sha256": digest}


def test_everything_is_on_disk_before_the_name_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(*args: Any, **kwargs: Any) -> None:
        events.append("renamed")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    path = save(tmp_path, 5, tensors(5), {})
    at = events.index("renamed")
    before, after = events[:at], events[at + 1 :]
    assert {p.name for p in path.iterdir()} <= set(before)
    assert before.index("state.json") < before.index("complete.json")
    assert before[-1] == ".step-00000005.partial" and after[-1] == tmp_path.name


def test_load_names_what_does_not_fit(pair: Path) -> None:
    path = pair / "step-00000002"
    with pytest.raises(CheckpointError, match="model.other"):
        load(path, {"model.other": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        load(path, {"model.weight": torch.zeros(7, 5)})
    some = {"ema.token": torch.zeros(1, 1, 3)}
    load(path, some)
    assert torch.equal(some["ema.token"], torch.full((1, 1, 3), 2.0))


# Damage

FILES = ["shard", "state.json", "complete.json"]


def victim(path: Path, name: str) -> Path:
    return next(path.glob("*.safetensors")) if name == "shard" else path / name


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_by_a_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"x")


def remove(file: Path) -> None:
    file.unlink()


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [cut, cut_by_a_byte, empty, alter, lengthen, remove, replace_by_folder])
def test_a_damaged_one_is_passed_over_loudly(
    harm: Callable[[Path], None], name: str, pair: Path, warnings: list[str]
) -> None:
    broken = victim(pair / "step-00000002", name)
    harm(broken)
    assert choose(pair) == pair / "step-00000001" and holds(pair / "step-00000001", 1)
    assert len(warnings) == 1 and "step-00000002" in warnings[0] and broken.name in warnings[0]


def test_damage_says_what_it_is(pair: Path) -> None:
    path = pair / "step-00000002"
    state = path / "state.json"
    content = state.read_bytes()
    alter(state)
    assert damage(path) == "state.json was altered"
    cut(state)
    assert damage(path) == f"state.json has {len(content) // 2} bytes instead of {len(content)}"
    remove(state)
    assert damage(path) == "state.json is missing"
    remove(path / "complete.json")
    assert str(damage(path)).startswith("its complete.json cannot be read")


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{}", '{"files": {}}', '{"format": 1}', "\x00\xff{",
                                  '{"format": 1, "files": []}', '{"format": 1, "files": {"state.json": 3}}',
                                  '{"format": 1, "files": {"state.json": {"bytes": 1}}}', "[" * 10])  # fmt: skip
def test_a_seal_of_garbage_is_passed_over(text: str, pair: Path, warnings: list[str]) -> None:
    (pair / "step-00000002" / "complete.json").write_bytes(text.encode("latin-1"))
    assert choose(pair) == pair / "step-00000001"
    assert len(warnings) == 1 and "step-00000002" in warnings[0]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_byte_of_the_seal_may_change(data: st.DataObject, made_pair: Path) -> None:
    """Either it still proves the files, or the one before is used; never an error."""
    seal = made_pair / "step-00000002" / "complete.json"
    content = seal.read_bytes()
    try:
        if data.draw(st.booleans()):
            seal.write_bytes(content[: data.draw(st.integers(0, len(content) - 3))])
            expected = {1}
        else:
            at, value = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
            seal.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            expected = {1, 2}
        assert choose(made_pair) in {made_pair / f"step-{step:08d}" for step in expected}
    finally:
        seal.write_bytes(content)


def test_a_seal_of_another_format_is_passed_over(pair: Path, warnings: list[str]) -> None:
    seal = pair / "step-00000002" / "complete.json"
    seal.write_text(json.dumps({**json.loads(seal.read_text()), "format": 2}))
    assert choose(pair) == pair / "step-00000001" and "format 2" in warnings[0]


def test_an_extra_file_does_no_harm(pair: Path, warnings: list[str]) -> None:
    (pair / "step-00000002" / "notes.txt").write_text("mine")
    (pair / "README").write_text("mine")
    assert choose(pair) == pair / "step-00000002" and holds(pair / "step-00000002", 2) and warnings == []


def test_temporary_folders_are_never_chosen(pair: Path, warnings: list[str]) -> None:
    shutil.copytree(pair / "step-00000002", pair / ".step-00000009.partial")
    assert choose(pair) == pair / "step-00000002" and warnings == []
    shutil.rmtree(pair / "step-00000002"), shutil.rmtree(pair / "step-00000001")
    assert choose(pair) is None


def test_all_broken_is_an_error_that_names_each(pair: Path, warnings: list[str]) -> None:
    for step in (1, 2):
        cut(pair / f"step-{step:08d}" / "complete.json")
    with pytest.raises(UserError) as raised:
        choose(pair)
    message = str(raised.value)
    assert "step-00000001" in message and "step-00000002" in message and str(pair) in message
    assert "\n" not in message and len(warnings) == 2


# Retain


def test_retain_keeps_the_newest_and_clears_what_was_interrupted(pair: Path) -> None:
    for step in (3, 4):
        shutil.copytree(pair / "step-00000002", pair / f"step-{step:08d}")
    (pair / ".step-00000005.partial").mkdir()
    (pair / ".step-00000005.partial" / "x").write_text("half")
    retain(pair, 2)
    assert sorted(p.name for p in pair.iterdir()) == ["step-00000003", "step-00000004"]
    retain(pair, 5)
    assert len(list(pair.iterdir())) == 2


@pytest.mark.parametrize("keep", [1, 2])
def test_broken_ones_do_not_crowd_out_what_was_saved_after_them(keep: int, pair: Path, warnings: list[str]) -> None:
    """A run that had to go back saves at steps below those of the broken ones."""
    for step in (8, 9):
        broken = Path(shutil.copytree(pair / "step-00000002", pair / f"step-{step:08d}"))
        cut(broken / "state.json")
    assert choose(pair) == pair / "step-00000002"
    save(pair, 3, tensors(3), {})
    retain(pair, keep)
    assert choose(pair) == pair / "step-00000003"
    assert len(list(pair.iterdir())) == keep


# Saves that fail


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fails_leaving_only_the_pair(pair: Path, reason: str, num_floats: int = 35, num_letters: int = 100) -> None:
    before = listing(pair)
    with pytest.raises(CheckpointError, match=reason) as raised:
        save(pair, 3, {"model.weight": torch.zeros(num_floats)}, {"text": "x" * num_letters})
    assert "step-00000003" in str(raised.value) and "\n" not in str(raised.value)
    assert listing(pair) == before and choose(pair) == pair / "step-00000002"


@pytest.mark.parametrize(("num_floats", "num_letters"), [(50_000, 0), (10, 200_000)])
def test_a_file_that_cannot_grow(num_floats: int, num_letters: int, pair: Path) -> None:
    """Whichever file hits the limit: the tensors' or the state's."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        fails_leaving_only_the_pair(pair, os.strerror(errno.EFBIG), num_floats, num_letters)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
def test_a_system_call_that_fails(name: str, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    fails_leaving_only_the_pair(pair, os.strerror(errno.EIO))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0 and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    ).returncode  # fmt: skip
    if not mounted:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_older_ones_and_nothing_else(small_disk: Path, made_pair: Path) -> None:
    pair = Path(shutil.copytree(made_pair, small_disk / "checkpoints"))
    filler = small_disk / "filler"
    # kB: for no folder, for a part of the tensors (200 kB), for all of them but not for the state (200 kB too)
    for room in (0, 8, 100, 300):
        statistics = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, statistics.f_bavail * statistics.f_bsize - room * 1024)))
        fails_leaving_only_the_pair(pair, os.strerror(errno.ENOSPC), 50_000, 200_000)
        filler.unlink()
    assert save(pair, 3, tensors(3), {}) == choose(pair)


KILLER = """
import logging, os, shutil, signal, sys
from pathlib import Path
import torch
import torch.distributed.checkpoint.hf_storage, torch.distributed.checkpoint.state_dict_saver
import torch.distributed.checkpoint.state_dict_loader
from pipeline import checkpoint

logging.getLogger("patchmill").addHandler(logging.NullHandler())
root = Path(sys.argv[1])
tensors = lambda value: {"model.weight": torch.arange(35.0) + value, "step": torch.tensor(float(value))}
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def in_child(work):
    # In a fork, so that each case costs no start of Python; the parent has no threads.
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(folder, last):
    path = checkpoint.choose(folder)
    step = checkpoint.read_state(path)["step"]
    got = {name: torch.zeros_like(value) for name, value in tensors(0).items()}
    checkpoint.load(path, got)
    assert path.name == checkpoint.name_of(step) and step in (1, 2), path
    assert all(torch.equal(got[name], value) for name, value in tensors(step).items())
    if last:
        assert step == 2


def killed_save(folder, moment):
    seen = 0

    def count(event="fsync", args=()):
        nonlocal seen
        if event in EVENTS or event == "fsync":
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(), fsync(descriptor))
    sys.addaudithook(count)
    checkpoint.save(folder, 2, tensors(2), {"big": "x" * 1000})


def prepare(folder):
    checkpoint.save(folder, 1, tensors(1), {})
    checkpoint.save(folder, 2, tensors(7), {})


def recover(folder, moment):
    # What the killed one left is not in the way of the next attempt.
    checkpoint.save(folder, 2, tensors(2), {})
    check(folder, True)
    checkpoint.retain(folder, 1)
    assert [path.name for path in folder.iterdir()] == [checkpoint.name_of(2)], moment


assert in_child(lambda: prepare(root / "whole")) == 0
damaged = root / "damaged" / checkpoint.name_of(2)
shutil.copytree(root / "whole", root / "damaged")
os.truncate(damaged / "state.json", 3)
shutil.copytree(damaged, root / "damaged" / checkpoint.name_of(3))
shutil.copytree(root / "damaged", root / "one", ignore=shutil.ignore_patterns(damaged.name, checkpoint.name_of(3)))
for start in ("one", "damaged"):
    for moment in range(1, 1000):
        folder = root / f"{start}-{moment}"
        shutil.copytree(root / start, folder)
        code = in_child(lambda: killed_save(folder, moment))
        assert code in (0, -signal.SIGKILL), code
        assert in_child(lambda: (check(folder, code == 0), recover(folder, moment))) == 0, (start, moment)
        if code == 0:
            break
    print(moment - 1)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    moments = [int(line) for line in done.stdout.split()]
    assert len(moments) == 2 and min(moments) > 10
