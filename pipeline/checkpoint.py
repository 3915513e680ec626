"""Save, seal, choose, load and retain checkpoints.

A checkpoint is a folder ``step-00000120``: tensors in DCP's sharded safetensors, everything else in ``state.json``,
and ``complete.json``, which lists every file with its size and sha256. It is written under a temporary name in the same
folder and renamed when whole, so a folder with the right name is complete unless it was damaged later; the seal is
checked before anything is read. Nothing here is a pickle.
"""

import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from torch import Tensor

from pipeline.config import UserError
from pipeline.launch import World

Value = TypeVar("Value")

SEAL: Final = "complete.json"
STATE: Final = "state.json"
FORMAT: Final = 1
ALONE: Final = World()

log = logging.getLogger("patchmill")


class CheckpointError(Exception):
    """A checkpoint could not be written, or one that was chosen cannot be read."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def name_of(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], world: World = ALONE) -> Path:
    """Write a checkpoint of ``tensors`` and the JSON ``state`` and publish it under its name; returns its path.

    All ranks call it; each writes, syncs and hashes its own file, the main one seals them. Those of later steps, which a
    run has that went back to an earlier one, are removed.
    Raises CheckpointError on all when one cannot write (a full disk, say); nothing is left behind and older ones stay.
    """
    final = folder / name_of(step)
    temporary = folder / f".{final.name}.partial"
    try:
        _on_main(world, lambda: _begin(temporary))
        files = _everywhere(world, lambda: _write_shard(temporary, tensors, world))
        _on_main(world, lambda: _publish(temporary, final, _merged(files), {"format": FORMAT, "step": step, **state}))
    except CheckpointError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final} could not be written: {error}") from error
    return final


def _merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: entry for part in parts for name, entry in part.items()}


def _everywhere(world: World, work: Callable[[], Value]) -> list[Value]:
    """``work`` on every rank: its values, by rank. Raises CheckpointError on all of them when it fails on one."""
    value, reason = None, None
    try:
        value = work()
    except _failures() as error:
        reason = _cause(error)
    outcomes = world.gather((value, reason))
    failed = [(rank, reason) for rank, (_, reason) in enumerate(outcomes) if reason is not None]
    if failed:
        rank, reason = failed[0]
        raise CheckpointError(f"rank {rank}: {reason}" if world.size > 1 else reason)
    return [cast(Value, value) for value, _ in outcomes]


def _on_main(world: World, work: Callable[[], object]) -> None:
    _everywhere(world, work if world.is_main else lambda: None)


def _begin(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _seal_of(path: Path) -> dict[str, Any]:
    _sync(path)
    return {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}}


def _write_shard(temporary: Path, tensors: dict[str, Tensor], world: World) -> dict[str, Any]:
    """This rank's file, and what the seal says of it."""
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    from pipeline.shards import ShardWriter

    dcp_save(tensors, storage_writer=ShardWriter(str(temporary)), process_group=world.control)
    own = sorted(temporary.glob(f"shard-{world.rank + 1:05d}-*"))
    return {name: entry for path in own for name, entry in _seal_of(path).items()}


def _publish(temporary: Path, final: Path, files: dict[str, Any], state: dict[str, Any]) -> None:
    _write_json(temporary / STATE, state)
    files = files | _seal_of(temporary / STATE)
    unsealed = {path.name for path in temporary.iterdir()} ^ files.keys()
    if unsealed:
        raise OSError(f"{', '.join(sorted(unsealed))}: not written by the rank that should have")
    config = hashlib.sha256(json.dumps(state.get("config"), sort_keys=True).encode()).hexdigest()
    seal = {"format": FORMAT, "step": state["step"], "config_sha256": config, "files": files}
    _write_json(temporary / SEAL, seal)
    _sync(temporary / SEAL)
    _sync(temporary)
    former = final.parent / f".{final.name}.former.partial"
    if (
        final.exists()
    ):  # damaged, or of before a roll-back: out of the way in no time, removed when the new one is there
        shutil.rmtree(former, ignore_errors=True)
        final.rename(former)
    temporary.rename(final)
    _sync(final.parent)
    shutil.rmtree(former, ignore_errors=True)
    # A later one was found broken and passed over: left there, retain would keep it in a whole one's place.
    for later in candidates(final.parent):
        if later.name > final.name:
            shutil.rmtree(later, ignore_errors=True)


def _failures() -> tuple[type[BaseException], ...]:
    """What a save or load can raise: DCP wraps an OSError in a BaseException of its own."""
    from torch.distributed.checkpoint.api import CheckpointException

    return (Exception, CheckpointException)


def _cause(error: BaseException) -> str:
    """The innermost reason in one line. Raises KeyboardInterrupt where that is it: DCP makes a failure of Ctrl-C too."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    failures = getattr(error, "failures", None)  # DCP's exception keeps each rank's failure
    inner = next(iter(failures.values()), None) if failures else None
    if isinstance(inner, tuple):
        inner = inner[0]
    deeper = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__
    return _cause(deeper) if deeper is not None else " ".join(str(error).split()) or type(error).__name__


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None: its seal, its list of files, their sizes and hashes."""
    try:
        seal = json.loads((path / SEAL).read_text())
        files = seal["files"]
        if seal["format"] != FORMAT:
            return f"it has format {seal['format']}, this version reads {FORMAT}"
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}"
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {SEAL} cannot be read ({' '.join(str(error).split())})"
    return None


def candidates(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def choose(folder: Path) -> Path | None:
    """The newest whole checkpoint; a broken one is passed over loudly. None when there are none at all.

    Raises UserError when there are some and all are broken: a run never starts from scratch in silence.
    """
    broken = []
    for path in candidates(folder):
        reason = damage(path)
        if reason is None:
            return path
        broken.append(f"{path.name}: {reason}")
        log.warning("checkpoint %s is broken (%s); trying the one before", path, reason)
    if broken:
        raise UserError(f"every checkpoint in {folder} is broken ({'; '.join(broken)}); start over in another run.dir")
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint whose seal was checked (``choose``), whatever wrote it.

    Raises CheckpointError when names or shapes do not match.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is", UserWarning
            )  # probes load without a process group
            dcp_load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    except _failures() as error:
        raise CheckpointError(f"{path} does not fit this model: {_cause(error)}") from error


def retain(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints and what interrupted saves left."""
    for path in _removable(folder, keep):
        shutil.rmtree(path, ignore_errors=True)


def _removable(folder: Path, keep: int) -> Iterator[Path]:
    yield from candidates(folder)[keep:]
    yield from folder.glob(".step-*.partial")
