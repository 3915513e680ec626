"""The points of a sweep, what is checked before they are queued, and which of them a call queues; without Slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import ConfigError, RunFailed, UserError
from slurm import chain, job, queue, status, submit
from slurm import sweep as sweeps
from slurm.cli import logs
from slurm.space import name_of, read_space, settings_of, shown
from slurm.sweep import sweep

FILES = ["cifar10/mae", "engine/ddp"]
GRID = "grid: {optim.base_lr: [1e-3, 2.0e-3, 0.004]}\nparallel: 2\n"


@pytest.fixture
def space(tmp_path: Path) -> Any:
    """Writes a space; its file's name."""

    def make(text: str) -> str:
        (tmp_path / "space.yaml").write_text(text)
        return str(tmp_path / "space.yaml")

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "lr"


@pytest.fixture
def call(folder: Path, space: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sweeps as on a host with Slurm, whose arrays only get a number; ``call.live`` is what squeue knows."""
    monkeypatch.setattr(submit.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made: list[list[str]] = []

    def ask(*command: str) -> tuple[int, str]:
        return (0, "") if command[0] == "sbatch" else (0, "".join(f"{line}\n" for line in make.live))

    def map_array(function: Any, runs: list[str]) -> list[Any]:
        assert function is job.supervise and all((Path(run) / "mlflow.json").exists() for run in runs)
        made.append([Path(run).name for run in runs])
        number = 100 + len(made)
        return [SimpleNamespace(job_id=f"{number}_{n}" if len(runs) > 1 else str(number)) for n in range(len(runs))]

    def make(
        *words: str, text: str = GRID, queued: bool = True, parallel: int | None = None, files: Any = FILES
    ) -> str:
        common = ["data.loader=synthetic", "data.num_samples=320", f"run.dir={folder}"]
        return sweep(space(text), files, [*common, *words], parallel=parallel, queue=queued)

    monkeypatch.setattr(submit, "ask", ask)
    monkeypatch.setattr(sweeps, "executor", lambda ready: SimpleNamespace(map_array=map_array))
    make.live, make.made = list[str](), made
    return make


def end(run: Path, *, done: bool) -> None:
    (run / "why_stopped.json").write_text(json.dumps({"done": done, "reason": "r"}))


# ---- spaces ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_all_pairs_and_a_list_itself(space: Any) -> None:
    grid = read_space(space("grid: {a.b: [1, 2], c.d: [x, null]}")).points()
    assert grid == [{"a.b": 1, "c.d": "x"}, {"a.b": 1, "c.d": None}, {"a.b": 2, "c.d": "x"}, {"a.b": 2, "c.d": None}]
    assert read_space(space("list: [{a.b: 1}, {c.d: [1, 2]}]")).points() == [{"a.b": 1}, {"c.d": [1, 2]}]


def test_draws_are_the_same_each_time_and_in_their_range(space: Any) -> None:
    text = """random: {{draws: {}, seed: {}, keys: {{a.lr: {{low: 1.0e-5, high: 1.0e-1, log: true}}, a.n: {{low: 2, high: 4}},
              a.x: {{low: 0, high: 1.5}}, a.c: [p, q]}}}}"""
    found = read_space(space(text.format(400, 3))).points()
    assert found == read_space(space(text.format(400, 3))).points() != read_space(space(text.format(400, 4))).points()
    assert found[:5] == read_space(space(text.format(5, 3))).points(), "more draws change none"
    rates, numbers, shares, choices = (
        list(column) for column in zip(*(point.values() for point in found), strict=True)
    )
    assert all(1e-5 <= rate <= 1e-1 and float(f"{rate:.4g}") == rate for rate in rates)
    assert 150 < sum(rate < 1e-3 for rate in rates) < 250, "even in the logarithm"
    assert set(numbers) == {2, 3, 4} and {type(number) for number in numbers} == {int}
    assert 0 <= min(shares) < 0.1 and 1.4 < max(shares) <= 1.5 and 150 < sum(share < 0.75 for share in shares) < 250
    assert set(choices) == {"p", "q"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("grid: {a.b: [1]}\nlist: [{a.b: 2}]", "exactly one of grid, list and random"), ("parallel: 2", "exactly one of"),
     ("grd: {a.b: [1]}", "grd: there is no such setting; known here: grid, list, random, parallel"),
     ("random: {draw: 3}", "random.draw: there is no such setting; known here: draws, seed, keys"),
     ("random: {draws: 1, keys: {a.b: {low: 1, hi: 2}}}", "random.keys.a.b.hi: there is no such setting; known here: low, high"),
     ("grid: {a.b: []}", "grid.a.b: List should have at least 1"), ("grid: {a.b: 1}", "grid.a.b: Input should be a valid list"),
     ("list: [{}]", "list.0: Dictionary should have at least 1"), ("grid: {a.b: [1]}\nparallel: 0", "parallel: Input should be"),
     ("random: {draws: 1, keys: {a.b: {low: 2, high: 2}}}", "random.keys.a.b: low = 2 should be below high = 2"),
     ("random: {draws: 1, keys: {a.b: {low: 0, high: 2, log: true}}}", "low = 0 should be above 0 with log: true"),
     ("random: {draws: 3, keys: {a.b: [1, 2]}}", "leave it out, or draw fewer, or from more"),
     ("list: [{a.b: 1, c.d: 2}, {c.d: 2, a.b: 1}]", "point 001 is the same as 000: d=2 b=1; leave it out"),
     ("grid: {slurm.nodes: [1, 2]}", "slurm.nodes: is the same for all points; set it on the command line"),
     ("grid: {run.dir: [a]}", "run.dir: is the same"), ("list: [{tracking: {uri: none}}]", "tracking: is the same"),
     ("random: {draws: 1001, keys: {a.b: {low: 0.0, high: 1.0}}}", "has 1001 points; 1000 at most")],
)  # fmt: skip
def test_a_space_that_is_none_is_told_with_its_file_and_key(text: str, said: str, space: Any) -> None:
    with pytest.raises(ConfigError) as error:
        read_space(space(text))
    assert any(said in line and line.startswith(space(text)) for line in error.value.problems), error.value.problems


def test_settings_are_shown_by_the_last_part_of_their_names_where_that_is_enough() -> None:
    assert shown({"optim.base_lr": 1e-5, "method.order": "random"}) == "base_lr=1e-05 order=random"
    assert shown({"a.x": 1, "b.x": None, "b.y": [1]}) == "a.x=1 b.x=null y=[1]"


# ---- what is checked ---------------------------------------------------------------------------------------------------


def test_a_dry_run_is_the_script_the_points_and_the_plan(call: Any, folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(submit.shutil, "which", lambda name: None if name == "sbatch" else f"/usr/bin/{name}")
    said = call(queued=False)
    for line in ("#SBATCH --array=0-2%2", "#SBATCH --job-name=lr", f"#SBATCH --output={folder}/slurm/%A_%a_0_log.out",
                 "001  base_lr=0.002  to be queued", "000: optim: lr 0.00025 = base_lr 0.001 x 64 / 256",
                 f"run: {folder}, ", "sweep: 3 of 3 points, 2 at a time"):  # fmt: skip
        assert line in said
    assert said.count("train: 50 steps of 64 images") == 1, "what all points say is said once"
    assert f" -m slurm.job {folder} 000 001 002; exit $?' EXIT" in said and not folder.parent.exists()
    assert "--array=0-2%1" in call(queued=False, parallel=1)
    assert "#SBATCH --array" not in call(queued=False, text="list: [{optim.base_lr: 1}]"), "as submitit has it"


def test_values_become_what_their_keys_take(call: Any, folder: Path) -> None:
    call(text="list: [{optim.clip: null, data.flip: false, model.name: vit_t, optim.betas: [0.8, 0.9]}]")
    cfg = job.load_config([folder / "000" / job.CONFIG])
    assert (cfg.optim.clip, cfg.data.flip, cfg.model.name, cfg.optim.betas) == (None, False, "vit_t", (0.8, 0.9))
    assert cfg.run.dir == str(folder / "000")


def test_every_problem_comes_at_once_with_its_points(call: Any, folder: Path) -> None:
    text = "list: [{train.steps: 0}, {optim.bas_lr: 1}, {optim.base_lr: x}, {optim.bas_lr: 2}]"
    with pytest.raises(ConfigError) as error:
        call("model.name=vit", text=text)
    assert error.value.problems[0].startswith("model.name = 'vit': should be")
    assert error.value.problems[1].startswith("000: train.steps = 0: should be greater than 0")
    assert error.value.problems[2:] == ["001, 003: optim.bas_lr: there is no such setting; did you mean optim.base_lr?",
                                        "002: optim.base_lr = 'x': should be a valid number"]  # fmt: skip
    with pytest.raises(ConfigError) as error:
        call("slurm.tasks_per_node=5", "slurm.nodes=2", "tracking.uri=sqlite:///m.db",
             text="list: [{train.global_batch: 64}, {train.global_batch: 50}]")  # fmt: skip
    first, second = error.value.problems
    assert "a file is not for several hosts" in first and not first.startswith("0")
    assert second.startswith("000: train.global_batch = 64: should be a multiple of the job's 10 processes")
    assert not folder.exists() and call.made == []


def test_the_disk_is_asked_for_all_points_together(call: Any, monkeypatch: Any) -> None:
    needed = sweeps.checkpoint_bytes(job.load_config(FILES, ["data.loader=synthetic", "run.dir=x"]))
    monkeypatch.setattr(submit.shutil, "disk_usage", lambda _: submit.shutil._ntuple_diskusage(9, 9, int(2.5 * needed)))
    with pytest.raises(ConfigError, match="the checkpoints of 3 points take 0.0. GiB, 0.0. GiB are free; make room"):
        call()
    call(text="grid: {optim.base_lr: [1.0, 2.0]}")


# ---- what is queued ----------------------------------------------------------------------------------------------------


def test_points_are_runs_as_submit_leaves_them(call: Any, folder: Path) -> None:
    assert f"submitted: job 101; patchmill status {folder}" in call()
    assert call.made == [["000", "001", "002"]] and oct((folder / "001" / "slurm").stat().st_mode)[-3:] == "700"
    record = json.loads((folder / "001" / "slurm" / "job.json").read_text())
    assert (
        record["job"] == "101_1" and record["tracking"] == f"sqlite:///{folder}/mlflow.db" and record["tracking_waits"]
    )
    assert settings_of(folder / "001") == {"optim.base_lr": 0.002} and name_of(folder / "001") == "lr/001"
    assert settings_of(folder) == {} and name_of(folder) == "lr"
    assert (
        status.find_runs([folder])
        == [folder / name for name in ("000", "001", "002")]
        == status.find_runs([folder.parent])
    )


def test_a_second_call_queues_what_failed_and_nothing_else(call: Any, folder: Path) -> None:
    call()
    end(folder / "000", done=True)
    end(folder / "001", done=False)
    (folder / "001" / job.CANCELLED).touch()
    call.live = [f"101_2|RUNNING|{folder}/slurm/.submission_file_1.sh"]
    said = call()
    assert call.made[1:] == [["001"]] and not (folder / "001" / job.CANCELLED).exists()
    assert [line for line in said.splitlines() if "base_lr=0.00" in line and not line.startswith("optim")] == [
        "000  base_lr=0.001  done", "001  base_lr=0.002  queued", "002  base_lr=0.004  job 101_2 is running"]  # fmt: skip
    assert json.loads((folder / "001" / "slurm" / "job.json").read_text())["job"] == "102"
    call.live.append(f"102|PENDING|{folder}/slurm/.submission_file_2.sh")
    assert "nothing to queue" in call() and len(call.made) == 2
    call.live = [f"7|RUNNING|{folder}/002/slurm/.submission_file_3.sh"]  # by `submit`
    call()
    assert call.made[2:] == [["001"]]


def test_the_lead_is_that_of_the_point_that_saves_longest(call: Any, folder: Path) -> None:
    call()
    (folder / "002" / "log.jsonl").write_text('{"kind": "checkpoint", "seconds": 60}\n')
    assert "asked to save 300 s before" in call()


def test_jobs_of_a_call_that_was_cut_off_are_not_doubled(call: Any, folder: Path) -> None:
    call()
    for run in folder.glob("00?"):
        (run / "slurm" / "job.json").write_text("{}")
    call.live = [f"101_2|PENDING|{folder}/slurm/.submission_file_1.sh"]
    with pytest.raises(UserError, match="job 101_2 is pending and no point knows it.*; scancel 101 ends it"):
        call()
    with pytest.raises(UserError, match="its job 101_2 is pending"):
        submit.require_no_job(folder / "001")


def test_a_point_with_a_live_element_has_a_job_and_others_have_none(call: Any, folder: Path) -> None:
    call()
    call.live = [f"101_1|RUNNING|{folder}/slurm/.submission_file_1.sh"]
    submit.require_no_job(folder / "000")
    with pytest.raises(UserError, match="its job 101_1 is running"):
        submit.require_no_job(folder / "001")


def test_of_two_calls_at_once_one_queues(call: Any, folder: Path, monkeypatch: Any) -> None:
    assemble = sweeps.assemble

    def meanwhile(*words: Any, **more: Any) -> Any:  # another call, after this one has looked
        ready = assemble(*words, **more)
        monkeypatch.setattr(sweeps, "assemble", assemble)
        call()
        call.live = [f"101_{n}|RUNNING|{folder}/slurm/a.sh" for n in range(3)]
        return ready

    monkeypatch.setattr(sweeps, "assemble", meanwhile)
    with pytest.raises(UserError, match="another call has queued points of this sweep"):
        call()
    assert len(call.made) == 1
    with sweeps.reserved(folder), pytest.raises(UserError, match="is being submitted"):
        call.live = []
        call()


def test_another_sweep_in_the_folder_is_refused(call: Any, folder: Path) -> None:
    call()
    with pytest.raises(
        UserError, match="of other points .002 there base_lr=0.004, here base_lr=0.008.; choose another folder"
    ):
        call(text=GRID.replace("0.004", "0.008"))
    with pytest.raises(UserError, match="003 there is none, here base_lr=0.008"):
        call(text=GRID.replace("0.004", "0.004, 0.008"))
    with pytest.raises(UserError, match="put back optim.weight_decay = 0.05 .not 0.1.; train.seed = 0 .not 3.$"):
        call("optim.weight_decay=0.1", "train.seed=3")
    call("checkpoint.keep=3")
    with pytest.raises(UserError, match="holds a sweep; choose another folder"):
        submit.submit(job.load_config(FILES, ["data.loader=synthetic", f"run.dir={folder}"]))
    (folder.parent / "one" / "slurm").mkdir(parents=True)
    (folder.parent / "one" / "slurm" / "job.json").touch()
    with pytest.raises(UserError, match="holds a run; a sweep needs a folder of its own"):
        call(f"run.dir={folder.parent / 'one'}")


def test_points_are_nested_in_one_run_of_mlflow(call: Any, folder: Path) -> None:
    from mlflow import MlflowClient

    call()
    parent = json.loads((folder / "mlflow.json").read_text())["run_id"]
    for name in ("000", "002"):
        state = json.loads((folder / name / "mlflow.json").read_text())
        assert state["tags"] == {"mlflow.parentRunId": parent} and state["run_name"] == f"lr/{name}"
    run = MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(parent)
    assert run.info.run_name == "lr" and run.data.tags["patchmill.points"] == "3" and run.info.status == "FINISHED"
    assert run.data.params == {"grid.optim.base_lr": "[0.001, 0.002, 0.004]", "parallel": "2"}


# ---- in the job, and after it ------------------------------------------------------------------------------------------


def test_an_element_s_verdict_is_on_its_point(call: Any, folder: Path) -> None:
    """By the script's own trap, whose exit code counts."""
    call("slurm.max_crashes=1")
    script = call("slurm.max_crashes=1", queued=False)
    lines = [line for line in script.splitlines() if line.startswith(("trap ", "rm "))]
    left = [folder / "slurm" / name for name in ("101_1_0_result.pkl.save_tmp", "101_10_0_result.pkl.save_tmp")]
    left[0].parent.mkdir(exist_ok=True)
    for path in left:
        path.touch()
    environment = os.environ | {"SLURM_JOB_ID": "55", "SLURM_ARRAY_JOB_ID": "101", "SLURM_ARRAY_TASK_ID": "1"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "before training began" in done.stderr, done.stderr
    (line,) = job.attempts(folder / "001")
    assert line["attempt"] == "101_1-0" and not job.attempts(folder / "000")
    assert [path.exists() for path in left] == [False, True], "another element's may be in the making"


def test_an_array_of_one_is_its_point_whatever_job_it_is_submitted_from(monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job.element(Path("s"), ["004"]) == Path("s/004") and job.element(Path("s"), []) == Path("s")
    assert job.element(Path("s"), ["000", "002", "003", "009"]) == Path("s/009")


def test_status_and_logs_know_a_point(call: Any, folder: Path, monkeypatch: Any) -> None:
    call()
    point = folder / "001"
    (point / "slurm" / "exits").mkdir()
    (point / "slurm" / "exits" / "101_1-0-0.json").write_text(
        json.dumps({"rank": 0, "host": "n", "code": 1, "time": 1})
    )
    begun = {"time": 1, "attempt": "101_1-0", "event": "begin", "step": 0}
    (point / "slurm" / "attempts.jsonl").write_text(json.dumps(begun) + "\n")
    (folder / "slurm").mkdir(exist_ok=True)
    (folder / "slurm" / "101_1_0_log.out").write_text("what went wrong\n")
    last = {"kind": "train", "time": 1, "step": 1, "loss": "NaN", "images_per_s": 1.0}
    (point / "log.jsonl").write_text(json.dumps(last) + "\n")
    monkeypatch.setattr(status, "slurm_state", lambda job: ("FAILED", ""))
    assert status.look(point).tail == ["rank 0: what went wrong"]
    assert list(status.follow(point, 0, forever=False)) == ["what went wrong"]
    table = status.table([status.look(run) for run in status.find_runs([folder])])
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["run"] == ["lr/000", "lr/001", "lr/002"] and columns["settings"][1] == "base_lr=0.002"
    assert columns["loss"][1] == "nan"
    with pytest.raises(UserError, match="holds 3 runs; name one, such as .*000"):
        logs(folder)


def test_what_waits_is_cancelled_before_what_runs(call: Any, folder: Path, monkeypatch: Any) -> None:
    call()
    states = {"101_0": "RUNNING", "101_1": "COMPLETED", "101_2": "PENDING"}
    asked = []

    def ask(*command: str) -> tuple[int, str]:
        asked.append(command[1:])
        states["101_0"] = "COMPLETED" if len(asked) > 1 else states["101_0"]
        return 0, ""

    for module in (status, chain):
        monkeypatch.setattr(module, "slurm_state", lambda job: (states[job], ""))
    monkeypatch.setattr(queue, "ask", ask)
    said = list(chain.cancel_all(status.find_runs([folder]), 20))
    assert asked == [("101_2",), ("--signal=USR2", "101_0.0")] and len(said) == 2
    states = dict.fromkeys(states, "COMPLETED")
    with pytest.raises(UserError, match="has no job that could be cancelled"):
        list(chain.cancel_all(status.find_runs([folder]), 20))


def test_one_that_slurm_does_not_cancel_does_not_keep_others(call: Any, folder: Path, monkeypatch: Any) -> None:
    call()
    for module in (status, chain):
        monkeypatch.setattr(module, "slurm_state", lambda job: ("SUSPENDED", ""))
    monkeypatch.setattr(queue, "ask", lambda *words: (int(words[1] == "101_0"), "no"))
    with pytest.raises(RunFailed, match="000: job 101_0 could not be told"):
        list(chain.cancel_all(status.find_runs([folder]), 1))
    assert [(run / job.CANCELLED).exists() for run in status.find_runs([folder])] == [False, True, True]


def test_the_state_of_an_element_that_never_began_is_its_array_s(monkeypatch: Any) -> None:
    def ask(*command: str) -> tuple[int, str]:
        if command[0] == "squeue":
            return 1, "Invalid job id"
        if command[5] == "7":
            return 0, "FAILED|7_0\nCANCELLED by 0|7_[1-3%2]\n"
        return 0, "COMPLETED\n" if command[5] == "7_0" else "no answer to sacct in a minute"

    monkeypatch.setattr(queue, "ask", ask)
    assert [queue.slurm_state(job)[0] for job in ("7_0", "7_2", "8")] == ["COMPLETED", "CANCELLED", "UNKNOWN"]


def test_a_dry_run_needs_neither_torch_nor_slurm(tmp_path: Path) -> None:
    code = ("import sys\nfrom pipeline.cli import main\n"
            f"sys.argv = ['patchmill', 'sweep', 'sweep/mask', '--dry-run', 'cifar10/mae', 'data.loader=synthetic', "
            f"'run.dir={tmp_path}/r']\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
            "assert not {'torch', 'mlflow', 'ffcv', 'matplotlib'} & sys.modules.keys()\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                          env=os.environ | {"PATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --array=0-5%4" in done.stdout and "005  mask_ratio=0.9   to be queued" in done.stdout
