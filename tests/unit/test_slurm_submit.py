"""What is known before a run is queued, its batch script, and what status reads; without Slurm."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import CONFIG_DIR, Config, ConfigError, RunFailed, UserError, load_config
from slurm import checks, queue, status, submit
from slurm.queue import slurm_state
from slurm.submit import plan, signal_lead, snapshot, snapshot_name


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a job's configuration; Slurm is not on this host."""
    monkeypatch.setattr(submit.shutil, "which", lambda name: None if name == "sbatch" else f"/usr/bin/{name}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def make(*settings: str, files: tuple[str, ...] = ("cifar10/mae", "engine/ddp")) -> Config:
        common = ["data.loader=synthetic", "data.num_samples=320", f"run.dir={tmp_path / 'a run'}", "slurm.nodes=2",
                  "slurm.tasks_per_node=2"]  # fmt: skip
        return load_config(list(files), [*common, *settings])

    return make


def problems(cfg: Config, *, queue: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as found:
        plan(cfg, queue=queue)
    return found.value.problems


def test_a_script_says_what_was_asked(cfg, tmp_path: Path) -> None:
    ready = plan(cfg("slurm.partition=gpu", "slurm.account=lab", "slurm.qos=high", "slurm.constraint=a100", "slurm.gpus_per_node=4",
                     "slurm.tasks_per_node=1", "slurm.cpus_per_task=8", "slurm.mem=120G", "slurm.time=2:30:00",
                     "slurm.directives={exclude: 'n[7-9]', exclusive: true}", "slurm.setup=[module load cuda]",
                     "slurm.environment={NCCL_DEBUG: 'a b'}"), queue=False)  # fmt: skip
    lines = ready.script.splitlines()
    for option in ("partition=gpu", "account=lab", "qos=high", "constraint=a100", "gpus-per-node=4", "ntasks-per-node=4", "nodes=2",
                   "cpus-per-task=8", "mem=120G", "time=2:30:00", "exclude='n[7-9]'", "exclusive", "requeue", "signal=USR2@120",
                   "open-mode=append"):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert "module load cuda" in lines and "export NCCL_DEBUG='a b'" in lines
    run = next(line for line in lines if line.startswith("srun "))
    assert "--kill-on-bad-exit=1" in run and "--cpus-per-task=8" in run
    trap = next(line for line in lines if line.startswith("trap "))
    assert lines.index(trap) < lines.index(run)
    ended = subprocess.run(
        ["bash", "-c", f"{trap.replace(sys.executable, 'echo')}\nexit 3"], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (0, f"-m slurm.job {tmp_path}/a run\n"), "the verdict's exit code counts"
    signals = "sh -c 'for s in INT TERM USR2; do kill -$s $PPID $$; done; echo told'"
    script = trap.replace(f"{sys.executable} -m", shlex.quote(f"{signals} -m")[1:-1])
    ended = subprocess.run(["bash", "-c", f"{script}\nexit 3"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "told\n"), "what ends the job does not end the verdict"
    subprocess.run(["bash", "-n"], input=ready.script.encode(), check=True)
    assert not (tmp_path / "a run").exists(), "a plan leaves nothing"
    assert "slurm: not asked, sbatch is not on this host" in ready.lines


def _environment(script: str, **given: str) -> dict[str, str]:
    """What the tasks of a script find set."""
    lines = script.splitlines()
    setup = [line for line in lines[: lines.index("# command")] if not line.startswith(("trap ", "rm "))]
    found = subprocess.run(["bash", "-c", "\n".join([*setup, "env -0"])], env={"PATH": "/usr/bin:/bin"} | given,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    return dict(line.split("=", 1) for line in found.split("\0") if line)


def test_the_environment_is_ours_unless_it_is_the_users(cfg) -> None:
    job = ("slurm.cpus_per_task=4", "slurm.gpus_per_node=2", "slurm.tasks_per_node=1")
    script = plan(cfg(*job), queue=False).script
    cache = f"/local/patchmill-{os.getuid()}"
    ours = {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "4", "SLURM_CPU_BIND": "cores", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton"}  # fmt: skip
    # An interactive job's binding comes along with what is submitted from it, and is for CPUs of another job.
    assert ours.items() <= _environment(script, TMPDIR="/local", SLURM_CPU_BIND="quiet,mask_cpu:0x1").items()
    assert _environment(script, TMPDIR="/t", SLURM_TMPDIR="/job")["TRITON_CACHE_DIR"].startswith("/job/patchmill-")
    assert _environment(script)["TRITON_CACHE_DIR"].startswith("/tmp/patchmill-")
    his = {name: "his own" for name in ours}
    assert (his | {"SLURM_CPU_BIND": "cores"}).items() <= _environment(script, **his).items()
    script = plan(cfg(*job, f"slurm.environment={json.dumps(his)}"), queue=False).script
    assert his.items() <= _environment(script, **dict.fromkeys(ours, "another's")).items()
    # One CPU a task is Slurm's default and no wish: on nodes of its own a job's processes have all CPUs.
    assert not {"OMP_NUM_THREADS", "SLURM_CPU_BIND"} & _environment(plan(cfg(), queue=False).script).keys()


def test_a_signal_before_python_runs_ends_no_task(cfg) -> None:
    run = next(line for line in plan(cfg(), queue=False).script.splitlines() if line.startswith("srun "))
    start = run[run.index("sh -c ") : run.index(" -u -m ")]
    code = "import os, signal, sys; os.kill(os.getpid(), signal.SIGUSR2); print(sys.argv[1:])"
    said = subprocess.run(["bash", "-c", f"{start} -c '{code}' 'a b' c"], capture_output=True, text=True, check=True)
    assert said.stdout == "['a b', 'c']\n"


@pytest.mark.parametrize("name", [path.stem for path in (CONFIG_DIR / "slurm").glob("*.yaml")])
def test_every_shipped_job_makes_a_script(name: str, cfg, tmp_path: Path) -> None:
    common = ["data.loader=synthetic", "data.num_samples=1000000", f"run.dir={tmp_path / 'r'}"]
    ready = plan(load_config(["imagenet/mae_vit_l", "engine/ddp", f"slurm/{name}"], common), queue=False)
    assert "#SBATCH --gpus-per-node=8" in ready.script.splitlines()


def test_a_time_is_no_number_in_base_60(cfg) -> None:
    assert cfg("slurm.time=1:30:00").slurm.time == "1:30:00" and cfg("slurm.time=90").slurm.time == 90
    assert cfg("slurm.time=12:30").slurm.time == "12:30"


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["engine.name=single"], "engine.name = single: the job has 4 processes"),
     (["train.global_batch=30"], "train.global_batch = 30: should be a multiple of the job's 4 processes"),
     (["train.micro_batch=32"], "train.micro_batch = 32: should divide 16"),
     (["engine.name=hsdp", "engine.shard_size=3"], "engine.shard_size = 3: should divide the 4 processes"),
     (["engine.precision=fp16"], "engine.precision = fp16: needs GPUs"),
     (["slurm.gpus_per_node=2"], "slurm.tasks_per_node = 2: is for jobs without GPUs"),
     (["tracking.uri=sqlite:///m.db"], "a file is not for several hosts"),
     (["slurm.gpu=T9"], "T9: is in no table"),
     (["slurm.time=90x"], "slurm.time = 90x: should be as sbatch has it"),
     (["slurm.time=3"], "slurm.time = 3: should be twice slurm.signal_lead_s (120 s) at least"),
     (["slurm.directives={nodes: 1}"], "slurm.directives.nodes: set slurm.nodes"),
     (["slurm.directives={cpus-per-task: 1}"], "slurm.directives.cpus-per-task: set slurm.cpus_per_task"),
     (["slurm.directives={array: 0-3}"], "slurm.directives.array: is the job's own"),
     (["slurm.environment={B C: x}"], "slurm.environment.B C: is no name of a variable"),
     (["run.dir=/tmp/50%j"], "run.dir = /tmp/50%j: has a %"),
     (["slurm.setup=[echo it's]"], "slurm.setup: is not what bash understands")],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_slurm_is_asked(cfg, settings, said) -> None:
    assert any(said in problem for problem in problems(cfg(*settings))), problems(cfg(*settings))


def test_all_problems_come_at_once_and_queueing_needs_slurm(cfg, tmp_path) -> None:
    (tmp_path / "no").touch()
    found = problems(cfg("engine.name=single", "tracking.uri=sqlite:///m.db", "slurm.gpu=T9"), queue=True)
    assert len(found) == 4 and found[-1].startswith("sbatch is not on this host")


def test_a_missing_beton_is_named(cfg, tmp_path) -> None:
    assert any(
        "no.beton" in problem for problem in problems(cfg("data.loader=ffcv", f"data.train={tmp_path}/no.beton"))
    )


def test_memory_is_predicted_for_the_gpu(cfg) -> None:
    files = ("imagenet/mae_vit_h", "engine/ddp")
    common = [
        "slurm.gpu=V100",
        "slurm.gpus_per_node=4",
        "slurm.tasks_per_node=1",
        "train.micro_batch=auto",
        "engine.precision=bf16",
    ]
    assert any(
        "are predicted to fit a V100" in line for line in problems(cfg(*common, "train.global_batch=4096", files=files))
    )
    ready = plan(cfg(*common, "train.global_batch=8", "engine.checkpoint_layers=full", files=files), queue=False)
    assert any(line.startswith("memory: micro-batches of 1 images") for line in ready.lines)


def test_a_full_disk_is_seen(cfg, monkeypatch) -> None:
    monkeypatch.setattr(submit.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert any("0.00 GiB are free; make room" in problem for problem in problems(cfg()))


def test_the_lead_follows_the_longest_save(cfg, tmp_path: Path) -> None:
    assert signal_lead(cfg()) == 120 and signal_lead(cfg("slurm.signal_lead_s=30")) == 30
    (tmp_path / "a run").mkdir()
    lines = [{"kind": "checkpoint", "seconds": s, "saved": True} for s in (20.0, 50.5, 1.0)] + [
        {"kind": "checkpoint", "saved": False}
    ]
    (tmp_path / "a run" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "che')
    assert signal_lead(cfg()) == 120 + 151


def test_a_snapshot_is_the_tree_with_what_is_not_committed(tmp_path: Path) -> None:
    tree, target = tmp_path / "tree", tmp_path / "copy"
    (tree / "sub").mkdir(parents=True)

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    (tree / "sub" / "kept.py").write_text("1")
    (tree / ".gitignore").write_text("ignored\n")
    git("add", "-A")
    git("commit", "-qm", "one")
    name = snapshot_name(tree)[0]
    (tree / "ignored").write_text("secret")
    assert snapshot_name(tree)[0] == name
    (tree / "sub" / "kept.py").write_text("2")
    (tree / "new.py").write_text("3")
    other, files = snapshot_name(tree)
    assert other != name
    snapshot(tree, target, files)
    assert (
        (target / "sub" / "kept.py").read_text() == "2"
        and (target / "new.py").exists()
        and not (target / "ignored").exists()
    )
    assert len((target / "COMMIT").read_text().strip()) == 40 and "+2" in (target / "UNCOMMITTED.diff").read_text()
    for made in (
        "out/a/slurm/job.json",
        "out/a/code/x.py",
        "out/b/log.jsonl",
        "out/lr/sweep.json",
        "out/lr/000/y.py",
        "out/mlflow.db",
    ):
        (tree / "out" / made).parent.mkdir(parents=True, exist_ok=True)
        (tree / "out" / made).touch()
    assert snapshot_name(tree)[0] == other  # runs are no code
    snapshot(tree, target, ["gone"])  # it is there: nothing is done
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_job_runs_the_copy_and_not_the_tree_it_is_submitted_from(cfg) -> None:
    ready = plan(cfg(), queue=False)
    assert ready.code is not None
    (ready.code / "pipeline").mkdir(parents=True)
    (ready.code / "pipeline" / "__main__.py").write_text("print('the copy')")
    (ready.code / "pipeline" / "__init__.py").touch()
    exports = "\n".join(line for line in ready.script.splitlines() if line.startswith("export "))
    script = f"{exports}\n{sys.executable} -m pipeline"
    found = subprocess.run(["bash", "-c", script], cwd=CONFIG_DIR.parent, capture_output=True, text=True, check=True)
    assert found.stdout == "the copy\n"


@pytest.mark.parametrize(
    ("executor", "said"),
    [("slurm", ("#SBATCH --job-name=r", "job: 1 processes on 1 nodes")),
     ("local", ("-m slurm.local start ", "job: 1 processes on this host"))],
)  # fmt: skip
def test_dry_run_needs_neither_torch_nor_slurm(executor: str, said: tuple[str, str], tmp_path: Path) -> None:
    code = ("import sys\nfrom pipeline.cli import main\n"
            f"sys.argv = ['patchmill', 'submit', '--dry-run', 'cifar10/mae', 'data.loader=synthetic', 'data.num_samples=64', "
            f"'run.dir={tmp_path}/r', 'slurm.executor={executor}']\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
            "assert not {'torch', 'mlflow', 'ffcv', 'matplotlib'} & sys.modules.keys()\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env={"PATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in said)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(90, 5400), ("90", 5400), ("12:30", 750), ("1:00:00", 3600), ("2-0", 172_800), ("1-12:30", 131_400), ("1-00:00:05", 86_405),
     ("soon", None), ("1:2:3:4", None), ("", None)],
)  # fmt: skip
def test_a_time_limit_is_read_as_sbatch_reads_it(limit, expected) -> None:
    assert checks.seconds(limit) == expected


def test_a_second_job_is_refused_by_what_slurm_knows(tmp_path: Path, monkeypatch) -> None:
    """Whatever the run folder says: its file may be cut off, or a submit killed."""
    answer = (0, f"7|RUNNING|{tmp_path}/other/slurm/a.sh\n8|PENDING|{tmp_path}/run/slurm/submission_file_1.sh\n")
    monkeypatch.setattr(submit, "ask", lambda *_: answer)
    with pytest.raises(UserError, match="its job 8 is pending; scancel 8 ends it"):
        submit.require_no_job(tmp_path / "run")
    (tmp_path / "run" / "slurm").mkdir(parents=True)
    (tmp_path / "run" / submit.JOB).write_text('{"job": "8"}')
    with pytest.raises(UserError, match="its job 8 is pending; patchmill cancel"):
        submit.require_no_job(tmp_path / "run")
    submit.require_no_job(tmp_path / "ru")
    answer = (1, "Unable to contact slurm controller")
    with pytest.raises(UserError, match="squeue does not say"):
        submit.require_no_job(tmp_path / "run")


@pytest.mark.parametrize("fails", ["--signal=USR2", "7"])
def test_a_cancel_that_slurm_does_not_take_is_no_cancel(fails, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text('{"job": "7"}')
    answers = {"scancel": 1, "squeue": 0}
    monkeypatch.setattr(status, "slurm_state", lambda job: ("RUNNING", ""))
    monkeypatch.setattr(queue, "ask", lambda *words: (answers["scancel"] if words[1] == fails else 0, "no controller"))
    with pytest.raises(RunFailed, match="job 7 could not be told .no controller. and goes on"):
        status.cancel(tmp_path, 0.1)
    assert not (tmp_path / "slurm" / "cancelled").exists(), "it comes back as before"


def test_a_silent_slurm_is_not_taken_for_the_end(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text('{"job": "7"}')
    states = iter([("RUNNING", ""), ("UNKNOWN", ""), ("COMPLETED", "")])
    monkeypatch.setattr(status, "slurm_state", lambda job: next(states))
    monkeypatch.setattr(queue, "ask", lambda *words: (0, ""))
    assert status.cancel(tmp_path, 30) == "job 7 has ended; the newest checkpoint is of step 0"
    assert next(states, None) is None


def test_slurms_word_is_squeues_and_then_sacct_s(monkeypatch) -> None:
    answers = {"squeue": (0, "PENDING|BeginTime\n"), "sacct": (0, "CANCELLED by 0\n")}
    monkeypatch.setattr(queue, "ask", lambda name, *_: answers[name])
    assert slurm_state("7") == ("PENDING", "BeginTime")
    answers["squeue"] = (1, "slurm_load_jobs error: Invalid job id specified\n")
    assert slurm_state("7") == ("CANCELLED", "")
    for nothing in ((0, ""), (1, "Slurm accounting storage is disabled"), (124, "no answer to sacct in a minute")):
        answers["sacct"] = nothing
        assert slurm_state("7") == ("UNKNOWN", "")


def test_a_followed_log_ends_with_the_job_and_not_with_slurms_silence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.json").write_text('{"job": "7"}')
    log = tmp_path / "slurm" / "7_0_log.out"
    log.write_text("one\n")

    def states() -> Iterator[tuple[str, str]]:
        yield from [("RUNNING", ""), ("UNKNOWN", ""), ("UNKNOWN", ""), ("RUNNING", ""), ("UNKNOWN", "")]
        with log.open("a") as file:
            file.write("two\n")
        yield last

    monkeypatch.setattr(status.time, "sleep", lambda seconds: None)
    silence = "patchmill: Slurm does not say how job 7 is; waiting for what it writes (Ctrl-C ends that)"
    done, unknown = ("COMPLETED", ""), ("UNKNOWN", "")
    for last, attempt, requeue in ((done, "8-0", False), (done, "7-0", True), (unknown, "7-1", False)):
        asked = states()
        log.write_text("one\n")
        monkeypatch.setattr(status, "slurm_state", lambda job, asked=asked: next(asked))
        line = {"time": 1, "attempt": attempt, "event": "end", "requeue": requeue}
        (tmp_path / "slurm" / "attempts.jsonl").write_text(json.dumps(line))
        if last[0] == "UNKNOWN":  # no accounting, and squeue has forgotten it
            asked = iter([("UNKNOWN", "")])
            assert list(status.follow(tmp_path, 0, forever=True)) == ["one", silence]
        else:
            assert list(status.follow(tmp_path, 0, forever=True)) == ["one", silence, silence, "two"]
            assert next(asked, None) is None


@pytest.mark.parametrize(
    ("squeue", "sacct", "cancelled"),
    [(["RUNNING"], [], False), (["COMPLETING"], ["CANCELLED by 0"], True), (["COMPLETING"], ["TIMEOUT"], False),
     (["COMPLETING"], ["REQUEUED"], False), (["COMPLETING"] * 3, ["RUNNING", "", "CANCELLED by 0"], False),
     (["COMPLETING"] * 3, ["RUNNING", "PENDING", "CANCELLED by 1000"], True), (["COMPLETING", "RUNNING"], ["PENDING"], False),
     (["COMPLETING"] * 10, ["RUNNING"] * 10, False)],
)  # fmt: skip
def test_somebody_has_ended_a_job_when_the_accounting_says_so(squeue, sacct, cancelled, monkeypatch) -> None:
    answers = {"squeue": iter(squeue), "sacct": iter(sacct)}
    monkeypatch.setattr(queue, "ask", lambda name, *_: (0, next(answers[name]) + "\n"))
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: None)
    assert queue.was_cancelled("7") is cancelled


def test_status_is_what_the_log_and_slurm_say(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "runs" / "one"
    (run / "slurm" / "exits").mkdir(parents=True)
    now = time.time()
    (run / "slurm" / "job.json").write_text(json.dumps({"job": "7", "world": 2}))
    log = [{"kind": "start", "time": now - 100, "total_steps": 100}]
    log += [
        {"kind": "train", "time": now - 90 + 2 * k, "step": k + 1, "loss": 1.0 / (k + 1), "images_per_s": 8.0}
        for k in range(40)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log) + '{"kind": "tr')
    (run / "log.discarded.jsonl").write_text(json.dumps({"kind": "train", "step": 9}) + "\n")
    events = [("begin", 0), ("end", 1), ("begin", 1)]
    lines = [
        {"time": now - 100, "attempt": f"7-{n}", "event": event, "step": 0, "reason": "rank 1 was killed"}
        for event, n in events
    ]
    (run / "slurm" / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for rank, code in ((0, 1), (1, -9)):
        (run / "slurm" / "exits" / f"7-1-{rank}.json").write_text(
            json.dumps({"rank": rank, "host": "n1", "code": code, "time": rank})
        )
    (run / "slurm" / "7_1_log.out").write_text("one\ntwo\nsubmitit ERROR\nsrun: error: x\n")
    monkeypatch.setattr(status, "slurm_state", lambda job: ("RUNNING", ""))
    assert status.find_runs([tmp_path / "runs"]) == [run] == status.find_runs([run])
    found = status.look(run)
    assert (found.step, found.total, found.cost.restarts, found.cost.lost_steps, found.images_per_s) == (
        40,
        100,
        1,
        1,
        8.0,
    )
    assert found.eta_s == pytest.approx(120, rel=0.01) and found.cost.goodput == pytest.approx(80 / 88, rel=0.02)
    assert found.why == "rank 1 was killed" and found.tail == ["rank 1: one", "rank 1: two"]
    monkeypatch.setattr(status, "slurm_state", lambda job: ("FAILED", ""))
    found = status.look(run)
    assert found.eta_s is None and "ended from outside (failed) and does not come back; submit" in found.why
    for event, requeue, outside in (("end", True, True), ("end", False, False), (None, None, True)):
        line = {"time": now, "attempt": "7-2", "event": event, "requeue": requeue, "reason": "told", "step": 0}
        (run / "slurm" / "attempts.jsonl").write_text(json.dumps(line) + "\n" if event else "")
        assert ("ended from outside" in status.look(run).why) is outside
    with (run / "log.jsonl").open("a") as file:
        file.write('\n5\n{"kind": "train"}\n')
    assert status.look(run).step == 40
    with pytest.raises(UserError, match="nowhere: is not there"):
        status.find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds no run"):
        status.find_runs([run / "slurm"])
    with pytest.raises(UserError, match="has no job that could be cancelled"):
        status.cancel(run, 1)


@pytest.mark.parametrize(
    ("inside", "said"), [("photo.jpg", "holds files, but no run"), ("sweep.json", "holds a sweep")]
)
def test_a_folder_of_something_else_is_no_run(inside: str, said: str, tmp_path: Path) -> None:
    submit.require_own(tmp_path / "new")
    submit.require_own(tmp_path)
    (tmp_path / inside).touch()
    with pytest.raises(UserError, match=said):
        submit.require_own(tmp_path)
    (tmp_path / "log.jsonl").touch()
    if inside == "photo.jpg":
        submit.require_own(tmp_path)


def test_a_file_is_no_run_s_folder(cfg: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file; choose another folder"):
        plan(cfg(f"run.dir={tmp_path}/file/run"), queue=False)


def test_slurms_refusal_names_the_setting(monkeypatch: Any) -> None:
    said = "sbatch: error: Requested time limit is invalid (missing or exceeds some limit)\nallocation failure: Invalid"
    monkeypatch.setattr(submit, "ask", lambda *_: (1, said))
    assert list(submit.refusal("", "chain.prep")) == [
        "slurm: Requested time limit is invalid (missing or exceeds some limit) Invalid (chain.prep.time)"
    ]


def test_nothing_of_a_job_around_the_submitting_shell_reaches_a_new_one(tmp_path: Path, monkeypatch: Any) -> None:
    theirs = {
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_MEM_PER_CPU": "1",
        "RANK": "3",
        "MASTER_ADDR": "x",
    }
    for name, value in (theirs | {"SLURM_CONF": "here"}).items():
        monkeypatch.setenv(name, value)
    with submit.taken(tmp_path):
        assert os.environ["SLURM_CONF"] == "here" and not theirs.keys() & os.environ.keys()
    assert theirs.items() <= os.environ.items()
    assert queue.ask("env")[1].count("SLURM_") == 1


def test_a_job_whose_number_cannot_be_written_is_cancelled(tmp_path: Path, monkeypatch: Any) -> None:
    told = []
    monkeypatch.setattr(submit, "ask", lambda *words: told.append(words) or (0, ""))
    with pytest.raises(RunFailed, match="No space left on device.; job 7 is cancelled"), submit.noted(tmp_path, "7"):
        raise OSError(28, "No space left on device")
    assert told == [("scancel", "7")]


@pytest.mark.parametrize(
    ("state", "cancelled", "begun", "shown", "why"),
    [("FAILED", True, True, "CANCELLED", "cancelled"), ("CANCELLED", True, False, "CANCELLED", "cancelled"),
     ("CANCELLED", False, False, "CANCELLED", "its job never began (cancelled)"),
     ("FAILED", False, True, "FAILED", "the job was ended from outside (failed) and does not come back; submit the run again")],
)  # fmt: skip
def test_what_was_cancelled_is_not_told_as_a_failure(
    state, cancelled, begun, shown, why, tmp_path, monkeypatch
) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / submit.JOB).write_text('{"job": "7"}')
    if cancelled:
        (tmp_path / "slurm" / "cancelled").touch()
    if begun:
        begin = {"time": 1.0, "attempt": "7-0", "event": "begin", "step": 0}
        (tmp_path / "slurm" / "attempts.jsonl").write_text(json.dumps(begin) + "\n")
    monkeypatch.setattr(status, "slurm_state", lambda job: (state, ""))
    found = status.look(tmp_path)
    assert (found.state, found.why) == (shown, why)


def test_logs_says_what_it_waits_for(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / submit.JOB).write_text('{"job": "7"}')
    monkeypatch.setattr(status, "slurm_state", lambda job: ("PENDING", "Priority"))
    assert "job 7 has not begun" in next(status.follow(tmp_path, 0, forever=True))
