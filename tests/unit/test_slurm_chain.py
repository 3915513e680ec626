"""The stages of a chain: what is still to be done, what waits for what, and what is said of each; without Slurm."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.beton import CRC, SEAL, beside
from data_prep.scan import scan
from data_prep.write import write
from pipeline.config import Config, ConfigError, RunFailed, UserError, load_config
from slurm import chain, status, submit
from slurm.account import Account
from tests.image_files import encoded, pixels, put

TUNE = ["chain.evals=[finetune]"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, with the beton and the manifest that `prep` makes of them."""
    folder = tmp_path_factory.mktemp("packed")
    for number in range(8):
        put(folder / "images" / f"class{number % 2}" / f"{number}.jpg", encoded(pixels(number), "JPEG", quality=90))
    scan(folder / "images", folder / "good.jsonl", workers=0)
    write(folder / "good.jsonl", folder / "good.beton", workers=0)
    return folder


@pytest.fixture
def cfg(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the configuration of a chain whose betons are not there; Slurm is not on this host."""
    monkeypatch.setattr(chain.shutil, "which", lambda name: None if name == "sbatch" else f"/usr/bin/{name}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(*settings: str) -> Config:
        common = [f"run.dir={tmp_path / 'a run'}", f"data.train={tmp_path / 'train.beton'}", f"data.val={tmp_path / 'val.beton'}",
                  f"chain.train_images={packed / 'images'}", f"chain.val_images={packed / 'images'}", "train.global_batch=4",
                  "chain.prep.cpus_per_task=3"]  # fmt: skip
        return load_config(["cifar10/mae"], [*common, *settings])

    return make


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What Slurm is told; it takes everything, with the numbers 1, 2, ..."""
    told: list[tuple[str, ...]] = []

    def ask(*words: str) -> tuple[int, str]:
        told.append(words)
        number = len([words for words in told if words[0] == "sbatch"])
        return 0, f"sbatch: warning: 9\n{number};patchmill\n" if words[0] == "sbatch" else ""

    def enqueue(cfg: Config, ready: submit.Plan, **more: str) -> str:
        return ask("sbatch", "train", *(f"--{key}={value}" for key, value in more.items()))[1].split("\n")[1][:1]

    monkeypatch.setattr(chain, "ask", ask)
    monkeypatch.setattr(submit, "ask", ask)
    monkeypatch.setattr(chain, "enqueue", enqueue)
    monkeypatch.setattr(chain, "plan", lambda cfg, *, queue, coming: submit.plan(cfg, queue=False, coming=coming))
    return told


def link(packed: Path, beton: Path) -> None:
    for suffix in ("", SEAL, CRC):
        beside(beton, suffix).write_bytes(beside(packed / "good.beton", suffix).read_bytes())


def finish(run: Path, step: int = 7, **results: float) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "why_stopped.json").write_text(json.dumps({"done": True, "step": step, "reason": "done"}))
    (run / "log.jsonl").write_text(json.dumps({"kind": "eval", "step": 7, "time": 0, **results}) + "\n")


def problems(cfg: Config) -> list[str]:
    with pytest.raises(ConfigError) as found:
        chain.draft(cfg, queue=False)
    return found.value.problems


def test_a_dry_run_shows_every_script_and_leaves_nothing(cfg, tmp_path: Path) -> None:
    said = chain.chain(cfg("slurm.partition=gpu", "slurm.account=lab", "slurm.setup=[module load x]", "chain.prep.partition=cpu",
                           "chain.prep.mem=9G", "chain.eval.directives={gpus-per-node: 1}"), dry_run=True)  # fmt: skip
    names = [line for line in said.splitlines() if line.startswith("# ----")]
    assert names == ["# ---- prep", "# ---- train", "# ---- knn", "# ---- linear"]
    prep, train, knn, _ = (part.split("\n\noptim:")[0] for part in said.split("# ---- ")[1:])
    for option in ("partition=cpu", "account=lab", "mem=9G", "cpus-per-task=3", "requeue", "time=1-00:00:00", "nodes=1",
                   "job-name='a run-prep'", f"output='{tmp_path}/a run/slurm/prep-%j.out'"):  # fmt: skip
        assert f"#SBATCH --{option}" in prep.splitlines()
    assert "module load x" in prep and "export PYTHONSAFEPATH=1 PYTHONPATH=" in prep and "srun" not in prep
    assert "srun " in train and "trap " in train and "partition=gpu" in train
    assert "partition=gpu" in knn and "gpus-per-node=1" in knn and "srun" not in knn and "trap " not in knn
    assert "jobs: prep, then train, then knn, then linear" in said
    for part in (prep, train, knn):
        subprocess.run(["bash", "-n"], input=part.partition("\n")[2].encode(), check=True)
    assert not (tmp_path / "a run").exists()


def test_what_prep_makes_is_not_asked_for_and_all_else_is(cfg, tmp_path: Path) -> None:
    lines = chain.draft(cfg("train.global_batch=4096"), queue=False).ready.lines
    assert not any("steps of" in line for line in lines), "how many images there will be is not known"
    assert any(
        "train.beton: there is no such file" in line
        for line in problems(cfg("chain.train_images=null", "chain.val_images=null"))
    )
    found = problems(cfg("engine.name=single", "slurm.tasks_per_node=2", "slurm.time=never", "chain.eval.time=never",
                         f"chain.train_images={tmp_path}/no"))  # fmt: skip
    assert len(found) == 4, found


@pytest.mark.parametrize(
    ("settings", "said"),
    [(["data.loader=synthetic"], "chain.train_images = {p}/images: is packed into a beton; set data.loader=ffcv (not synthetic)"),
     (["data.val=null"], "chain.val_images = {p}/images: data.val is not set"),
     (["data.val=null", "chain.val_images=null"], "data.val: is required and not set: chain.evals tests on its images"),
     (["chain.val_images=/no/images"], "chain.val_images = /no/images: /no/images: there is no such folder"),
     (["data.train=/no/train.beton"], "/no cannot be written; make it, or choose another data.train"),
     (["data.train={p}/good.beton", "data.val={p}/bad.beton"], "chain.val_images = {p}/images: {p}/bad.beton: has no seal"),
     (["data.train={t}/other.beton"], "{t}/other.jsonl is the manifest of {p}/images; delete it"),
     (["data.train={t}/lone.beton"], "chain.val_images = {p}/images: needs {t}/lone.jsonl for the class index"),
     (["slurm.directives={dependency: 'afterok:1'}"], "slurm.directives.dependency: is the chain's own"),
     (["chain.prep.time=soon"], "chain.prep.time = soon: should be as sbatch has it"),
     (["chain.eval.directives={output: x}"], "chain.eval.directives.output: is the job's own"),
     (["chain.evals=[pixels]"], "chain.evals.0 = 'pixels': should be 'knn', 'linear' or 'finetune'"),
     ([*TUNE, "chain.finetune.settings=[optim.clp=1]"], "chain.finetune.settings: optim.clp: there is no such setting"),
     ([*TUNE, "chain.finetune.settings=[run.dir=/else]"], "chain.finetune.settings: run.dir = /else is the chain's own"),
     ([*TUNE, "chain.finetune.processes=2"], "chain.finetune.processes = 2: set engine.name=ddp"),
     ([*TUNE, "chain.finetune.processes=3", "chain.finetune.settings=[engine.name=ddp]"],
      "chain.finetune.processes = 3: should divide train.global_batch = 128"),
     ([*TUNE, "chain.finetune.time=soon"], "chain.finetune.time = soon: should be as sbatch has it")],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_queued(
    settings, said, cfg, packed: Path, tmp_path: Path
) -> None:
    (packed / "bad.beton").touch()
    put(tmp_path / "elsewhere" / "a" / "1.jpg", encoded(pixels(1), "JPEG"))
    (tmp_path / "other.jsonl").write_bytes((packed / "good.jsonl").read_bytes())
    link(packed, tmp_path / "lone.beton")
    settings = [setting.replace("{p}", str(packed)).replace("{t}", str(tmp_path)) for setting in settings]
    if "other.beton" in settings[0]:
        settings.append(f"chain.train_images={tmp_path / 'elsewhere'}")
    with pytest.raises(ConfigError) as found:
        chain.draft(cfg(*settings), queue=False)
    assert any(said.format(p=packed, t=tmp_path) in line for line in found.value.problems), found.value.problems


def test_a_good_beton_is_left_alone_and_a_damaged_one_made_again(cfg, packed: Path, tmp_path: Path) -> None:
    link(packed, tmp_path / "train.beton")
    (tmp_path / "train.jsonl").write_bytes((packed / "good.jsonl").read_bytes())
    todo = chain.draft(cfg(), queue=False)
    assert "val.beton" in todo.scripts["prep"] and "prep write" in todo.scripts["prep"]
    assert f"write {tmp_path}/train.jsonl" not in todo.scripts["prep"]
    link(packed, tmp_path / "val.beton")
    todo = chain.draft(cfg(), queue=False)
    assert list(todo.scripts) == ["train", "knn", "linear"] and "prep: left out, the betons are there" in todo.lines
    with (tmp_path / "val.beton").open("r+b") as file:
        file.write(b"damage")
    assert "val.beton" in chain.draft(cfg(), queue=False).scripts["prep"]


def test_prep_goes_on_behind_a_scan_that_is_whole(cfg, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chain.sys, "executable", "echo")
    packs = chain.packs_of(cfg())[0]
    command = lambda: subprocess.run(["bash", "-c", chain._prep(cfg(), packs)], capture_output=True, text=True).stdout  # noqa: E731
    verbs = [line.split()[3] for line in command().splitlines()]
    assert verbs == ["scan", "write", "verify"] * 2
    assert f"--against {tmp_path}/train.jsonl" in command().splitlines()[3]
    (tmp_path / "train.jsonl").touch()
    assert [line.split()[3] for line in command().splitlines()] == ["write", "verify", "scan", "write", "verify"]
    failing = put(tmp_path / "failing", b"#!/bin/sh\necho $4\nexit 2\n")
    failing.chmod(0o700)
    monkeypatch.setattr(chain.sys, "executable", str(failing))
    done = subprocess.run(["bash", "-c", chain._prep(cfg(), packs)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "write\n"), "nothing comes after what failed"


def test_a_probe_wants_a_training_that_is_done(cfg, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(chain.sys, "executable", "echo")
    run = tmp_path / "a run"
    run.mkdir()

    def outcome(*settings: str) -> tuple[int, str]:
        done = subprocess.run(["bash", "-c", chain._eval(cfg(*settings), run, "knn")], capture_output=True, text=True)
        return done.returncode, done.stdout

    (run / "why_stopped.json").write_text('{"done": false}')
    assert outcome() == (1, "patchmill: the training is not done\n")
    (run / "why_stopped.json").write_text('{"done": true}')
    assert outcome() == (0, f"-m pipeline eval knn {run}\n")
    assert outcome("tracking.uri=http://host:5000")[1].splitlines()[1] == f"-m pipeline sync {run}"
    assert len(outcome("tracking.uri=auto")[1].splitlines()) == 1, "`status` does it"
    here = [line.split() for line in outcome("tracking.uri=auto", "slurm.executor=local")[1].splitlines()]
    assert [line[:3] for line in here] == [["-m", "slurm.local", "bound"]] * 2
    assert [" ".join(line[4:]) for line in here] == [f"eval knn {run}", f"sync {run}"]
    tuned = cfg("tracking.uri=http://host:5000", *TUNE, "chain.finetune.settings=[train.epochs=2, engine.name=ddp]",
                "chain.finetune.processes=2")  # fmt: skip
    done = subprocess.run(["bash", "-c", chain._eval(tuned, run, "finetune")], capture_output=True, text=True)
    assert done.stdout == (f"-m pipeline eval finetune {run} train.epochs=2 engine.name=ddp --nproc 2\n"
                           f"-m pipeline sync {run}/finetune\n")  # fmt: skip


def test_fine_tuning_has_a_job_and_a_result_of_its_own(cfg, slurm, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    settings = cfg(
        "chain.evals=[knn, finetune]", "chain.finetune.directives={gpus-per-node: 4}", "chain.finetune.mem=64G"
    )
    said = chain.chain(settings, dry_run=False)
    assert "submitted: prep 1, train 2, knn 3, finetune 4" in said
    script = (run / "slurm" / "finetune.sh").read_text()
    assert (
        "gpus-per-node=4" in script
        and "mem=64G" in script
        and "gpus-per-node" not in (run / "slurm" / "knn.sh").read_text()
    )
    finish(run, knn_model=12.5)
    finish(run / "finetune", step=7, val_top1=61.5)
    assert chain.results(run) == {"knn": 12.5, "finetune": 61.5}
    (run / "finetune" / "why_stopped.json").write_text('{"done": false, "step": 7}')
    assert chain.results(run) == {"knn": 12.5}


def test_each_stage_waits_for_the_one_that_it_needs(cfg, slurm, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    said = chain.chain(cfg(), dry_run=False)
    assert "submitted: prep 1, train 2, knn 3, linear 4; patchmill status" in said
    queued = [words for words in slurm if words[0] == "sbatch"]
    kill = "--kill-on-invalid-dep=yes"
    assert queued == [
        ("sbatch", "--parsable", f"{run}/slurm/prep.sh"),
        ("sbatch", "train", "--dependency=afterok:1", kill),
        ("sbatch", "--parsable", "--dependency=afterok:2", kill, f"{run}/slurm/knn.sh"),
        ("sbatch", "--parsable", "--dependency=afterok:2,afterany:3", kill, f"{run}/slurm/linear.sh"),
    ]
    assert json.loads((run / "slurm" / "chain.json").read_text()) == {
        "prep": "1",
        "train": "2",
        "knn": "3",
        "linear": "4",
    }
    assert (run / "slurm" / "config.yaml").exists() and status.find_runs([run]) == [run]


def test_a_second_call_does_what_is_not_done(cfg, slurm, packed: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    chain.chain(cfg(), dry_run=False)
    for name in ("train", "val"):
        link(packed, tmp_path / f"{name}.beton")
    finish(run, knn_model=12.5, linear_model=1.0)
    slurm.clear()
    said = chain.chain(cfg("chain.evals=[knn, linear]"), dry_run=False)
    assert "train: left out, the run is done" in said and "knn: left out, 12.50 % top-1" in said
    assert [words for words in slurm if words[0] == "sbatch"] == [("sbatch", "--parsable", f"{run}/slurm/linear.sh")]
    assert json.loads((run / "slurm" / "chain.json").read_text()) == {
        "prep": "1",
        "train": "2",
        "knn": "3",
        "linear": "1",
    }
    slurm.clear()
    assert "everything is done" in chain.chain(cfg("chain.evals=[knn]"), dry_run=False)
    finish(run, knn_model=12.5, linear_heads_model=20.0)
    assert "everything is done" in chain.chain(cfg(), dry_run=False) and not slurm
    finish(run, step=9, knn_model=12.5, linear_heads_model=20.0)
    assert chain.results(run) == {}, "a result of an earlier step is none"


def test_a_chain_with_a_job_is_not_queued_again(cfg, slurm, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(submit, "ask", lambda *_: (0, f"8|RUNNING|{tmp_path}/a run/slurm/knn.sh\n"))
    with pytest.raises(UserError, match="its job 8 is running; scancel 8 ends it"):
        chain.chain(cfg(), dry_run=False)
    assert not [words for words in slurm if words[0] == "sbatch"]


def test_of_a_chain_that_slurm_takes_in_part_nothing_is_left(cfg, slurm, monkeypatch, tmp_path: Path) -> None:
    ask = chain.ask
    monkeypatch.setattr(
        chain, "ask", lambda *words: (1, "over the limit\n") if words[-1].endswith("knn.sh") else ask(*words)
    )
    with pytest.raises(RunFailed, match="the chain is not queued: knn: over the limit"):
        chain.chain(cfg(), dry_run=False)
    assert slurm[-1] == ("scancel", "1", "2")


def look(run: Path, state: str, reason: str = "", why: str = "") -> status.Status:
    return status.Status(run, "2", state, reason, 0, None, None, None, None, Account(0, {}, 0, None), why, [])


@pytest.mark.parametrize(
    ("states", "said"),
    [({"1": ("RUNNING", ""), "2": ("PENDING", "Dependency"), "3": ("PENDING", "Dependency"), "4": ("PENDING", "Dependency")},
      ["running", "waits for prep", "waits for train", "waits for knn"]),
     ({"1": ("COMPLETED", ""), "2": ("PENDING", "BeginTime"), "3": ("PENDING", "Dependency"), "4": ("PENDING", "Dependency")},
      ["done", "pending (BeginTime)", "waits for train", "waits for knn"]),
     ({"1": ("FAILED", ""), "2": ("CANCELLED", ""), "3": ("PENDING", "DependencyNeverSatisfied"), "4": ("CANCELLED", "")},
      ["failed: no usable image ({run}/slurm/prep-1.out)", *["cancelled, as prep failed"] * 3]),
     ({"1": ("COMPLETED", ""), "2": ("FAILED", ""), "3": ("CANCELLED", ""), "4": ("CANCELLED", "")},
      ["done", "failed: 3 crashes", *["cancelled, as train failed"] * 2]),
     ({"1": ("COMPLETED", ""), "2": ("CANCELLED", "75"), "3": ("CANCELLED", ""), "4": ("CANCELLED", "")},
      ["done", "was cancelled", *["cancelled, as train was cancelled"] * 2]),
     ({"1": ("CANCELLED", ""), "2": ("CANCELLED", ""), "3": ("CANCELLED", ""), "4": ("CANCELLED", "")},
      ["was cancelled: no usable image ({run}/slurm/prep-1.out)", *["cancelled, as prep was cancelled"] * 3]),
     ({"1": ("COMPLETED", ""), "2": ("COMPLETED", ""), "3": ("TIMEOUT", ""), "4": ("RUNNING", "")},
      ["done", "done", "timeout: DUE TO TIME LIMIT ({run}/slurm/knn-3.out)", "running"]),
     ({"1": ("COMPLETED", ""), "2": ("RUNNING", ""), "3": ("PENDING", "Dependency"), "4": ("PENDING", "Dependency")},
      ["done", "done", "waits for train", "waits for knn"]),
     ({"1": ("UNKNOWN", ""), "2": ("UNKNOWN", ""), "3": ("UNKNOWN", ""), "4": ("UNKNOWN", "")},
      ["done", "done", "is not known: Slurm does not say: DUE TO TIME LIMIT ({run}/slurm/knn-3.out)", "done, 20.00 % top-1"])],
)  # fmt: skip
def test_status_says_of_each_stage_how_far_it_is_or_why_not(
    states, said, cfg, packed: Path, tmp_path: Path, monkeypatch
) -> None:
    run = tmp_path / "a run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "chain.json").write_text('{"linear": "4", "train": "2", "prep": "1", "knn": "3"}')
    (run / "slurm" / "prep-1.out").write_text(
        "scan 1/8\npatchmill: an earlier attempt\npatchmill: no usable image\n\nslurmstepd: x\n"
    )
    (run / "slurm" / "knn-3.out").write_text("features\nDUE TO TIME LIMIT\n")
    monkeypatch.setattr(chain, "slurm_state", states.__getitem__)
    if said[1] == "done":
        finish(run, **({"linear_heads_model": 20.0} if "top-1" in said[3] else {}))
        for name in ("train", "val"):
            link(packed, tmp_path / f"{name}.beton")
        (run / "slurm" / "config.yaml").write_text(cfg().to_yaml())
    if states["2"] == ("CANCELLED", "75"):
        (run / "slurm" / "cancelled").touch()
    why = {("FAILED", ""): "3 crashes", ("CANCELLED", "75"): "cancelled"}.get(states["2"], "")
    lines = chain.stages(look(run, *states["2"], why=why))
    assert lines == [f"{name:7} {job:>9}  {word.format(run=run)}"
                     for name, job, word in zip(("prep", "train", "knn", "linear"), "1234", said, strict=True)]  # fmt: skip


def test_a_run_without_a_chain_has_no_stages(tmp_path: Path) -> None:
    assert chain.stages(look(tmp_path, "RUNNING")) == []


@pytest.mark.parametrize(
    ("live", "ended"),
    [("1234", ["4", "3", "train", "1"]), ("34", ["4", "3"]), ("2", ["train"]), ("", ["train"])],
)  # fmt: skip
def test_cancel_ends_what_waits_before_what_it_waits_for(live, ended, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "chain.json").write_text('{"prep": "1", "train": "2", "knn": "3", "linear": "4"}')
    (tmp_path / "slurm" / "job.json").write_text('{"job": "2"}')
    calls: list[str] = []
    monkeypatch.setattr(chain, "slurm_state", lambda job: ("RUNNING" if job in live else "COMPLETED", ""))
    monkeypatch.setattr(chain, "ask", lambda *words: (calls.append(words[1]) or 0, ""))
    monkeypatch.setattr(status, "cancel", lambda run, patience: calls.append("train") or "saved")
    said = chain.cancel(tmp_path, 1).splitlines()
    assert calls == ended and len(said) == len(ended)
    monkeypatch.setattr(chain, "ask", lambda *words: (1, "no controller"))
    if "4" in live:
        with pytest.raises(RunFailed, match="no controller.; linear .job 4. goes on"):
            chain.cancel(tmp_path, 1)


def test_dry_run_needs_neither_torch_nor_slurm(packed: Path, tmp_path: Path) -> None:
    words = ["patchmill", "chain", "--dry-run", "cifar10/mae", f"data.train={tmp_path}/t.beton", "chain.evals=[]",
             f"chain.train_images={packed / 'images'}", f"run.dir={tmp_path}/r"]  # fmt: skip
    code = (f"import sys\nfrom pipeline.cli import main\nsys.argv = {words!r}\n"
            "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
            "assert not {'torch', 'mlflow', 'ffcv', 'matplotlib'} & sys.modules.keys()\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "jobs: prep, then train" in done.stdout


def test_the_training_takes_the_chain_s_options_besides_its_own(cfg, tmp_path: Path, monkeypatch) -> None:
    told: dict[str, Any] = {}

    class Executor:
        def __init__(self, folder: Path, python: str) -> None: ...

        def update_parameters(self, **parameters: Any) -> None:
            told.update(parameters)

        def submit(self, function: Any, run: str) -> Any:
            told["run"] = run
            return SimpleNamespace(job_id="7")

    monkeypatch.setattr("submitit.SlurmExecutor", Executor)
    made = cfg("slurm.directives={reservation: lab}", "chain.evals=[]")
    ready = chain.draft(made, queue=False).ready
    submit.write_run(made, ready.run)
    assert submit.enqueue(made, ready, dependency="afterok:1") == "7"
    more = told["additional_parameters"]
    assert (more["dependency"], more["reservation"], more["requeue"]) == ("afterok:1", "lab", True)
    run = tmp_path / "a run"
    assert told["run"] == str(run) and json.loads((run / "slurm" / "job.json").read_text())["job"] == "7"


def test_a_chain_takes_no_folder_of_a_sweep(cfg, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "sweep.json").write_text("{}")
    for name in ("train", "val"):
        link(packed, tmp_path / f"{name}.beton")
    with pytest.raises(UserError, match="holds a sweep; choose another folder"):
        chain.chain(cfg("slurm.executor=local"), dry_run=False)
