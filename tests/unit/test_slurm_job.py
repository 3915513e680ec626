"""The supervisor of a job and the verdict whether it comes back, without Slurm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from slurm import account, job
from slurm.job import Verdict, append, attempts, end, idle_crashes, judge, newest_step, supervise


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submitted run whose job 7 was requeued once."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(job, "was_cancelled", lambda _: False)
    (tmp_path / "slurm" / "exits").mkdir(parents=True)
    settings = ["data.loader=synthetic", "data.num_samples=64", f"run.dir={tmp_path}", "slurm.max_crashes=3"]
    (tmp_path / job.CONFIG).write_text(load_config(["cifar10/mae"], settings).to_yaml())
    return tmp_path


def begin(run: Path, step: int = 0) -> None:
    append(run, event="begin", step=step)


def exits(run: Path, *codes: int, attempt: str = "7-1") -> None:
    for rank, code in enumerate(codes):
        record = {"rank": rank, "host": "n1", "code": code, "time": 100.0 - rank}
        (run / job.EXITS / f"{attempt}-{rank}.json").write_text(json.dumps(record))


def why(run: Path, *, done: bool = False, reason: str = "stopped by SIGUSR2", age: float = 0) -> None:
    path = run / "why_stopped.json"
    path.write_text(json.dumps({"done": done, "reason": reason, "step": 5}))
    os.utime(path, (time.time() + 1 - age,) * 2)


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "complete.json").touch()


def test_a_finished_run_does_not_come_back_whatever_the_tasks_say(run: Path) -> None:
    begin(run)
    exits(run, 0, 1)
    why(run, done=True, reason="done")
    assert judge(run) == Verdict(False, "done", 0)


def test_a_run_that_was_asked_to_stop_comes_back_with_the_reason(run: Path) -> None:
    begin(run)
    exits(run, 75, 75)
    why(run)
    assert judge(run) == Verdict(True, "stopped by SIGUSR2", 75)


def test_one_that_is_cancelled_does_not(run: Path) -> None:
    begin(run)
    exits(run, 75, 75)
    why(run)
    (run / job.CANCELLED).touch()
    assert judge(run) == Verdict(False, "cancelled", 75)


def test_a_mistake_does_not_come_back(run: Path) -> None:
    begin(run)
    exits(run, 2, 2)
    verdict = judge(run)
    assert not verdict.requeue and verdict.code == 2 and "a mistake" in verdict.reason


def test_a_killed_rank_is_the_cause_of_what_others_say(run: Path) -> None:
    begin(run)
    exits(run, 1, -9, 2)  # rank 2 ended first, for it could not reach rank 1
    why(run, reason="rank 0 has lost another rank")
    assert judge(run) == Verdict(True, "rank 1 on n1 was killed by SIGKILL; rank 0 has lost another rank", 1)


def test_what_an_earlier_start_left_does_not_count(run: Path) -> None:
    why(run, done=True, age=60)
    exits(run, 0, 0, attempt="7-0")
    begin(run)
    assert judge(run) == Verdict(True, "no process left word how it ended: killed, or a full disk", 1)


def test_tasks_that_never_began_are_a_crash(run: Path) -> None:
    verdict = judge(run)
    assert verdict.requeue and verdict.code == 1 and "before training began: slurm.setup failed" in verdict.reason


@pytest.mark.parametrize(("steps", "crashes", "requeued"), [([0, 0], 2, False), ([0], 1, True), ([0, 4], 1, True)])
def test_crashes_without_progress_end_it_and_progress_forgives(run: Path, steps, crashes, requeued) -> None:
    for step in steps:
        append(run, event="end", step=step, crash=True)
    checkpoint(run, steps[-1]) if steps[-1] else None
    begin(run)
    exits(run, 1)
    assert idle_crashes(attempts(run), newest_step(run)) == crashes
    verdict = judge(run)
    assert verdict.requeue is requeued and ("slurm.max_crashes" in verdict.reason) is not requeued


def test_a_stop_between_crashes_begins_the_count_anew(run: Path) -> None:
    for crash in (True, False, True):
        append(run, event="end", step=0, crash=crash)
    assert idle_crashes(attempts(run), 0) == 1


def test_a_checkpoint_that_is_not_complete_is_no_progress(run: Path) -> None:
    checkpoint(run, 12)
    (run / "checkpoints" / "step-00000020").mkdir()
    assert newest_step(run) == 12


@pytest.mark.parametrize(
    ("answer", "code", "requeued", "reason"),
    [((0, ""), 0, True, "stopped by SIGUSR2"), ((1, "Job is pending execution for job 7"), 0, True, "requeued by Slurm"),
     ((1, "Requested operation is presently disabled"), 75, False, "presently disabled): submit the run again")],
)  # fmt: skip
def test_slurm_is_asked_and_its_answer_kept(run: Path, monkeypatch, capsys, answer, code, requeued, reason) -> None:
    asked = []

    def answered(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, answer[0], "", answer[1])

    monkeypatch.setattr(subprocess, "run", answered)
    begin(run)
    exits(run, 75)
    why(run)
    assert end(run) == code and asked == [["scontrol", "requeue", "7"]]
    last = attempts(run)[-1]
    assert last["event"] == "end" and last["requeue"] is requeued and reason in last["reason"] and not last["crash"]
    assert reason in capsys.readouterr().err


def test_a_job_that_somebody_ended_does_not_come_back(run: Path, monkeypatch) -> None:
    begin(run)
    exits(run, 75)
    why(run, reason="stopped by SIGTERM")
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(job, "was_cancelled", "7".__eq__)
    assert end(run) == 75
    last = attempts(run)[-1]
    assert (last["reason"], last["requeue"], last["crash"]) == (
        "cancelled by scancel; stopped by SIGTERM",
        False,
        False,
    )


def test_a_done_run_asks_slurm_for_nothing(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    begin(run)
    why(run, done=True)
    assert end(run) == 0


def test_a_disk_that_is_full_does_not_keep_a_job_from_coming_back(run: Path, monkeypatch, capsys) -> None:
    begin(run)
    exits(run, 75)
    why(run)
    (run / job.ATTEMPTS).rename(run / "kept")
    (run / job.ATTEMPTS).symlink_to("/dev/full")
    answered = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answered)
    kept = [json.loads(line) for line in (run / "kept").read_text().splitlines()]
    for module in (job, account):
        monkeypatch.setattr(module, "attempts", lambda run: kept)
    assert end(run) == 0 and "No space left on device" in capsys.readouterr().err


def test_what_the_run_has_cost_is_in_its_folder_after_every_end(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    for restarts in range(2):
        begin(run)
        exits(run, 75)
        why(run)
        end(run)
        told = json.loads((run / job.SUMMARY).read_text())
        assert told == {"restarts": restarts, "reasons": {"stopped by SIGUSR2": 1} if restarts else {}, "lost_steps": 0,
                        "goodput": None}  # fmt: skip


def test_a_crash_that_cannot_be_counted_does_not_come_back(run: Path, monkeypatch) -> None:
    begin(run)
    exits(run, 1)
    assert judge(run).requeue
    monkeypatch.setattr(job, "_writable", lambda _: False)
    monkeypatch.setattr(subprocess, "run", None)
    assert end(run) == 1 and "nothing can be written to" in attempts(run)[-1]["reason"]


def test_lines_that_are_none_are_left_out(run: Path) -> None:
    begin(run)
    (run / job.EXITS / "7-1-9.json").write_text('{"code": 1}')
    assert job.exits_of(run, "7-1") == []
    with (run / job.ATTEMPTS).open("a") as file:
        file.write('null\n{"x": 1}\n{"event": "en')
    assert [line["event"] for line in attempts(run)] == ["begin"]


TRAINER = """
import os, pathlib, sys, time
from pipeline.stop import StopRequest
told = pathlib.Path(sys.argv[1])
if "slow" in told.name:
    told.write_text(str(os.getpid()))
    time.sleep(1)
with StopRequest() as stop:
    told.write_text(str(os.getpid()))
    while not stop.requested: time.sleep(0.02)
told.write_text(stop.requested)
sys.exit(75)
"""
SUPERVISOR = """
import subprocess, sys, time
from slurm import job
Popen = subprocess.Popen
job.subprocess.Popen = lambda command, **more: Popen([sys.executable, "-c", sys.argv[1], sys.argv[3]], **more)
job.time.sleep = {sleep}
job.SETTLE_S = 0
job.supervise(sys.argv[2])
"""


def started(run: Path, sleep: str = "time.sleep", name: str = "told") -> tuple["subprocess.Popen[bytes]", Path]:
    told = run / name
    command = [sys.executable, "-c", SUPERVISOR.format(sleep=sleep), TRAINER, str(run), str(told)]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process, told


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_the_trainer_and_its_exit_is_kept(run: Path, number: signal.Signals) -> None:
    process, told = started(run)
    process.send_signal(number)
    assert process.wait(30) == 0 and told.read_text() == number.name
    record = json.loads((run / job.EXITS / "7-1-0.json").read_text())
    assert record["code"] == 75 and record["rank"] == 0
    assert attempts(run)[-1]["event"] == "begin"


def test_a_signal_waits_for_a_trainer_that_cannot_take_it_yet(run: Path) -> None:
    process, told = started(run, name="slow")
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0 and told.read_text() == "SIGUSR2"
    assert json.loads((run / job.EXITS / "7-1-0.json").read_text())["code"] == 75


def test_a_signal_is_not_late_when_the_main_thread_is_in_a_long_call(run: Path) -> None:
    """A handler in Python would run only after the call."""
    busy = "(lambda s: __import__('ctypes').PyDLL(None).usleep(0) or __import__('ctypes').CDLL(None).sleep(5))"
    process, told = started(run, busy)
    began = time.monotonic()
    process.send_signal(signal.SIGUSR2)
    while told.read_text() != "SIGUSR2":
        assert time.monotonic() - began < 4
        time.sleep(0.02)
    process.wait(30)


def test_the_trainer_dies_with_its_supervisor(run: Path) -> None:
    process, told = started(run)
    trainer = int(told.read_text())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{trainer}").exists() and "Z" not in Path(f"/proc/{trainer}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_trainer_that_fails_fails_the_task_without_a_traceback(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(job, "SETTLE_S", 0)
    monkeypatch.setattr(job, "overrides", lambda run: ["no.such=1"])
    handlers = {number: signal.getsignal(number) for number in job.FORWARDED}
    try:
        with pytest.raises(SystemExit) as stop:
            supervise(str(run))
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop.value.code == 1 and json.loads((run / job.EXITS / "7-1-0.json").read_text())["code"] == 2


def test_the_last_element_of_an_array_speaks_for_itself_only(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own number is that of the whole array: asked to requeue that, Slurm would bring all points back."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    asked, told = [], []
    monkeypatch.setattr(job, "was_cancelled", lambda which: bool(asked.append(which)))
    monkeypatch.setattr(
        job.subprocess, "run", lambda words, **_: told.append(words) or subprocess.CompletedProcess(words, 0, "", "")
    )
    begin(run)
    exits(run, -9, attempt="7_2-1")
    assert end(run) == 0 and asked == ["7_2"] and told == [["scontrol", "requeue", "7_2"]]
