"""How runs look in MLflow: the same tags and datasets in the first store and in every other that sync sends them to."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_stores import open_sink, the_run, train

from pipeline import mlflow_layout
from pipeline.config import Config
from pipeline.tracking import sync

VERSIONS = {"patchmill": "1.2", "torch": "2.99"}


def tags(cfg: Config, folder: Path) -> dict[str, str]:
    return mlflow_layout.tags(cfg, folder, world_size=4, device="H100", versions=VERSIONS)


def datasets(uri: str) -> dict[str, dict[str, Any]]:
    """By context; of each all that MLflow keeps, read back."""
    found = {}
    for item in the_run(uri).inputs.dataset_inputs:
        (tag,) = item.tags
        assert tag.key == "mlflow.data.context" and tag.value not in found
        found[tag.value] = dict(item.dataset) | {"profile": json.loads(item.dataset.profile)}
    return found


def test_tags(tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(mlflow_layout, "code_tags", lambda root: {})
    monkeypatch.setenv("LOGNAME", "ada")
    cfg = tiny_config("pcae", engine__name="deepspeed", engine__zero_stage=2, data__train="/data/in1k-train.beton")
    found = tags(cfg, tmp_path / "run")
    host = found.pop("host")
    assert host and found == {
        "kind": "run", "method": "pcae", "model": "vit_p", "data": "in1k-train", "engine": "zero2", "world_size": "4",
        "precision": "fp32", "device": "H100", "run_dir": str(tmp_path / "run"), "patchmill.version": "1.2",
        "torch.version": "2.99", "mlflow.source.name": "patchmill train", "mlflow.source.type": "LOCAL", "mlflow.user": "ada",
    }  # fmt: skip
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert tags(cfg, tmp_path)["mlflow.source.type"] == "JOB"


def test_the_code_that_ran(tmp_path: Path) -> None:
    assert mlflow_layout.code_tags(tmp_path) == {}
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)  # noqa: E731
    git("init")
    assert mlflow_layout.code_tags(tmp_path) == {}  # nothing is committed
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    commit = git("rev-parse", "HEAD").stdout.decode().strip()
    assert mlflow_layout.code_tags(tmp_path) == {"mlflow.source.git.commit": commit, "code.changed": "false"}
    (tmp_path / "output.txt").write_text("no code of the tree")
    assert mlflow_layout.code_tags(tmp_path)["code.changed"] == "false"
    (tmp_path / "a.py").write_text("2")
    assert mlflow_layout.code_tags(tmp_path)["code.changed"] == "true"
    copy = tmp_path / "copy"  # what a job runs
    copy.mkdir()
    (copy / "COMMIT").write_text("abc\n")
    for text, changed in (("", "false"), ("diff", "true")):
        (copy / "UNCOMMITTED.diff").write_text(text)
        assert mlflow_layout.code_tags(copy) == {"mlflow.source.git.commit": "abc", "code.changed": changed}


def test_datasets_of_betons(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_set, val_set = "a1" * 32, "b2" * 32
    facts = {"image_set": val_set, "num_samples": 5, "classes": ["x", "y"]}
    monkeypatch.setattr("data_prep.verify.load_seal", lambda path: facts if path.name == "val.beton" else {})
    cfg = tiny_config("mae", data__loader="ffcv", data__train=str(tmp_path / "train.beton"),
                      data__val=str(tmp_path / "val.beton"))  # fmt: skip
    one, other = mlflow_layout.inputs(cfg, train_set, 9, 3)
    assert (one["context"], one["name"], one["digest"]) == ("training", "train", train_set[:16])
    assert (other["context"], other["name"], other["digest"]) == ("validation", "val", val_set[:16])
    assert json.loads(one["profile"]) == {"num_rows": 9, "num_classes": 3, "image_set": train_set}
    assert json.loads(other["profile"]) == {"num_rows": 5, "num_classes": 2, "image_set": val_set}
    assert json.loads(other["source"]) == {"uri": str(tmp_path / "val.beton")}


def test_a_validation_set_that_is_not_there_is_left_out(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    for loader in ("ffcv", "folder"):
        cfg = tiny_config("mae", data__loader=loader, data__train="t", data__val=str(tmp_path / "none"))
        assert [data["context"] for data in mlflow_layout.inputs(cfg, "a" * 64, 1, 1)] == ["training"]
    (drawn,) = mlflow_layout.inputs(tiny_config("mae"), "synthetic-0-64-10", 64, 10)
    assert (drawn["name"], drawn["source"]) == ("synthetic-0-64-10", '{"uri": "synthetic"}')


def test_tags_and_datasets_arrive_once_and_sync_gives_another_store_the_same(
    run_dir: Path, uri: str, empty_store: Path, tiny_config: Callable[..., Config], write_config: Callable[..., object]
) -> None:
    write_config()
    told = [mlflow_layout._input(context, f"/data/{context}.beton", "ffcv", context * 8, 3, 2)
            for context in ("training", "validation")]  # fmt: skip
    own = tags(tiny_config("mae"), run_dir)
    for first in (1, 4):  # a run that is resumed tells it again
        sink = open_sink(run_dir, uri, tags=own, inputs=told)
        train(run_dir, sink, first, first + 2)
        sink.close("FINISHED", 60)
    other = f"sqlite:///{shutil.copy(empty_store, run_dir.parent / 'other.db')}"
    for _ in range(2):
        sync(run_dir, other)
    for store in (uri, other):
        found = datasets(store)
        assert {name: data["digest"] for name, data in found.items()} == {
            "training": "trainingtraining", "validation": "validationvalida"}  # fmt: skip
        assert found["training"]["name"] == "training" and found["training"]["source_type"] == "local"
        assert found["training"]["profile"] == {"num_rows": 3, "num_classes": 2, "image_set": "training" * 8}
        assert {key: the_run(store).data.tags.get(key) for key in own} == own
    assert datasets(uri) == datasets(other)


def test_a_run_of_before_datasets_were_kept_is_sent_all_the_same(run_dir: Path, uri: str) -> None:
    train(run_dir, open_sink(run_dir, None), 1, 2)
    state = json.loads((run_dir / "mlflow.json").read_text())
    del state["inputs"]
    (run_dir / "mlflow.json").write_text(json.dumps(state))
    sync(run_dir, uri)
    assert the_run(uri).inputs.dataset_inputs == []


def test_passwords_in_a_source_stay_out(run_dir: Path, uri: str) -> None:
    told = [mlflow_layout._input("training", None, "http://me:secret@host/x", "s", 1, 1)]
    sink = open_sink(run_dir, uri, inputs=told)
    train(run_dir, sink, 1, 1)
    sink.close("FINISHED", 60)
    assert "host/x" in datasets(uri)["training"]["source"] and "secret" not in str(datasets(uri))


def test_experiments_are_of_models_in_training(run_dir: Path, uri: str) -> None:
    train(run_dir, open_sink(run_dir, None), 1, 1)
    sync(run_dir, uri)
    experiment = MlflowClient(uri).get_experiment_by_name("test")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_replayed_run_has_its_own_time(run_dir: Path, uri: str) -> None:
    lines = [{"kind": "start", "time": 1000.5, "step": 0}, {"kind": "train", "time": 1010, "step": 1, "loss": 1},
             {"kind": "stop", "time": 1020.25, "step": 1}, {"kind": "eval", "time": 9000, "step": 1, "knn_model": 1}]  # fmt: skip
    (run_dir / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sync(run_dir, uri)
    assert (the_run(uri).info.start_time, the_run(uri).info.end_time) == (1_000_500, 1_020_250)
