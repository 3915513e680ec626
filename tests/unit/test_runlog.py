"""log.jsonl: whole lines or none, strict JSON, and discarding that no kill can turn into a loss or a double."""

import errno
import json
import logging
import math
import os
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import runlog
from pipeline.config import RunFailed, UserError
from pipeline.runlog import DISCARDED, LOG, RunLog, add_line, discard_after, read_log, replace_file


def write_steps(folder: Path, first: int, last: int) -> None:
    with RunLog(folder / LOG) as run_log:
        for step in range(first, last + 1):
            run_log.write("train", step=step, loss=1 / step)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_log(path)]


def test_a_line_is_strict_json_and_reads_back_equal(tmp_path: Path) -> None:
    with RunLog(tmp_path / LOG) as run_log:
        written = run_log.write(
            "train", step=3, loss=math.nan, grad_norm=torch.tensor(math.inf), low=np.float32(-math.inf), lr=0.1,
            nested={"ranges": [(1, math.inf)]}, ok=True, text="é\n",
        )  # fmt: skip
    (line,) = (tmp_path / LOG).read_text().splitlines()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (strict["loss"], strict["grad_norm"], strict["low"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_log(tmp_path / LOG)
    assert math.isnan(read.pop("loss")) and math.isnan(written.pop("loss"))
    assert read == written | {"nested": {"ranges": [[1, math.inf]]}}
    assert read["grad_norm"] == math.inf and read["ok"] is True and read["text"] == "é\n"


def test_a_line_is_in_the_file_at_once_and_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write
    monkeypatch.setattr(runlog.os, "write", lambda fd, data: (writes.append(bytes(data)), real(fd, data))[1])
    run_log = RunLog(tmp_path / LOG)
    run_log.write("start", step=0)
    assert len(writes) == 1 and writes[0].endswith(b"\n")
    assert steps_in(tmp_path / LOG) == [0]
    run_log.close()


def test_time_is_kept_when_given_and_added_when_not(tmp_path: Path) -> None:
    with RunLog(tmp_path / LOG) as run_log:
        assert run_log.write("train", step=1, time=12.5)["time"] == 12.5
        assert run_log.write("train", step=2)["time"] > 1e9


def test_no_file_is_an_empty_log(tmp_path: Path) -> None:
    assert read_log(tmp_path / LOG) == []
    assert discard_after(tmp_path, 0) == 0
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_any_cut_leaves_a_prefix_and_is_repaired(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_steps(folder, 1, 6)
    whole = (folder / LOG).read_bytes()
    records = read_log(folder / LOG)
    cut = round(share * len(whole))
    (folder / LOG).write_bytes(whole[:cut])
    complete = whole[:cut].count(b"\n")
    assert read_log(folder / LOG) == records[:complete]
    write_steps(folder, 9, 9)
    assert steps_in(folder / LOG) == [*range(1, complete + 1), 9]


def test_a_cut_line_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_steps(tmp_path, 1, 2)
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"kind": "tr')
    with caplog.at_level(logging.WARNING, "patchmill"):
        read_log(tmp_path / LOG)
    assert "cut off (12 bytes)" in caplog.text


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    lines = (tmp_path / LOG).read_text().splitlines()
    (tmp_path / LOG).write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_log(tmp_path / LOG)


def test_discarding_moves_the_lines_past_the_step(tmp_path: Path) -> None:
    with RunLog(tmp_path / LOG) as run_log:
        run_log.write("start", total_steps=9)
        for step in (1, 2, 3):
            run_log.write("train", step=step)
            run_log.write("checkpoint" if step == 2 else "eval", step=step)
    with (tmp_path / LOG).open("ab") as file:
        file.write(b'{"kind": "train", "st')
    assert discard_after(tmp_path, 2) == 2
    assert (tmp_path / LOG).read_bytes().endswith(b"\n")
    kept, moved = read_log(tmp_path / LOG), read_log(tmp_path / DISCARDED)
    assert [(r["kind"], r.get("step")) for r in kept] == [
        ("start", None), ("train", 1), ("eval", 1), ("train", 2), ("checkpoint", 2)
    ]  # fmt: skip
    assert [(r["kind"], r["step"]) for r in moved] == [("train", 3), ("eval", 3)]


def test_a_line_of_the_checkpoints_step_stays_and_discards_pile_up(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 6)
    discard_after(tmp_path, 4)
    write_steps(tmp_path, 5, 7)
    discard_after(tmp_path, 4)
    assert steps_in(tmp_path / LOG) == [1, 2, 3, 4]
    assert steps_in(tmp_path / DISCARDED) == [5, 6, 5, 6, 7]
    before = (tmp_path / LOG).stat().st_ino
    assert discard_after(tmp_path, 4) == 0
    assert (tmp_path / LOG).stat().st_ino == before


def test_a_cut_line_alone_is_removed(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 3)
    whole = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(whole + b'{"kind": "tr')
    assert discard_after(tmp_path, 3) == 0
    assert (tmp_path / LOG).read_bytes() == whole and not (tmp_path / DISCARDED).exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_stage_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, at: int, after: bool
) -> None:
    write_steps(tmp_path, 1, 8)
    real, calls = getattr(os, call), 0

    def dying(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1 and not after:
            raise Killed
        real(*args)
        if calls == at + 1:
            raise Killed

    def run(step: int) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(runlog.os, call, dying)
            try:
                discard_after(tmp_path, step)
            except Killed:
                return True
        return False

    killed = run(5)
    kept, moved = steps_in(tmp_path / LOG), steps_in(tmp_path / DISCARDED)
    assert len(kept) == len(set(kept))
    assert set(kept) | set(moved) == set(range(1, 9))
    discard_after(tmp_path, 3 if killed else 5)  # the next start may find an older checkpoint only
    end = 3 if killed else 5
    assert steps_in(tmp_path / LOG) == list(range(1, end + 1))
    assert sorted(steps_in(tmp_path / DISCARDED)) == list(range(end + 1, 9))


def test_a_full_disk_delays_lines_but_neither_loses_nor_tears_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, full = os.write, False

    def write(fd: int, data: bytes) -> int:
        if not full:
            return real(fd, data)
        if len(data) > 40:
            return real(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runlog.os, "write", write)
    with RunLog(tmp_path / LOG) as run_log:
        run_log.write("train", step=1)
        full = True
        with caplog.at_level(logging.ERROR, "patchmill"):
            run_log.write("train", step=2)
            run_log.write("train", step=3)
        full = False
        run_log.write("train", step=4)
    assert steps_in(tmp_path / LOG) == [1, 2, 3, 4]
    assert caplog.text.count("No space left") == 1


def test_another_error_of_the_disk_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_log = RunLog(tmp_path / LOG)

    def broken(fd: int, data: bytes) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(runlog.os, "write", broken)
        with pytest.raises(OSError, match="Input/output"):
            run_log.write("train", step=1)
    run_log.close()


def test_a_line_that_the_disk_has_no_room_for_is_told_whole_and_no_success(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    add_line(tmp_path / "log.jsonl", "eval", step=1, knn_model=50.0)
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match='no space left.*"knn_model": 75.0'):
        patch.setattr(os, "write", full)
        add_line(tmp_path / "log.jsonl", "eval", step=2, knn_model=75.0)
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]


def test_a_file_that_is_not_replaced_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a.json", b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
