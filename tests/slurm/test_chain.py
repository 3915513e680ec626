"""Chains on the cluster: packing, training and probes come one after another, or are cancelled with the reason."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pipeline.drawn import draw_images
from tests.image_files import put
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.test_jobs import lines, patchmill, trains

pytestmark = pytest.mark.timeout(600)


def settings(folder: Path, run: str, *more: str) -> list[str]:
    return ["cifar10/mae", f"data.train={folder}/{run}.beton", f"data.val={folder}/{run}-val.beton", f"run.dir={folder}/runs/{run}",
            f"chain.train_images={folder}/images/train", f"chain.val_images={folder}/images/test", "data.jit=off", "data.threads=1",
            "train.global_batch=16", "train.epochs=2", "slurm.cpus_per_task=1", "slurm.mem=3G", "slurm.time=60",
            *(f"chain.{stage}.{what}" for stage in ("prep", "eval") for what in ("cpus_per_task=1", "mem=3G", "time=60")),
            *more]  # fmt: skip


def ends(cluster: Cluster, run: Path) -> str:
    """What status says when no job of the chain is left."""
    jobs = set(json.loads((run / "slurm" / "chain.json").read_text()).values())
    with cluster.releasing():
        wait_for(f"the end of {run.name}", 300, lambda: not jobs & set(cluster.run("squeue", "-h", "-o", "%i").split()))
    return patchmill("status", str(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    draw_images(folder / "images", num_train=40, num_test=20, seed=0)
    put(folder / "broken" / "a" / "1.jpg", b"no image")
    return folder


@pytest.fixture(scope="module")
def finished(cluster: Cluster, folder: Path) -> Path:
    """A chain with one probe that has come to its end."""
    said = patchmill("chain", *settings(folder, "good", "chain.evals=[knn]"))
    assert "submitted: prep" in said
    assert "patchmill cancel" in patchmill("chain", *settings(folder, "good"), code=2)
    ends(cluster, folder / "runs" / "good")
    return folder / "runs" / "good"


def test_images_become_a_result(finished: Path) -> None:
    said = patchmill("status", str(finished))
    top1 = [line["knn_model"] for line in lines(finished, "eval")]
    assert len(top1) == 1 and f"done, {top1[0]:.2f} % top-1" in said, said
    assert [line.split()[3] for line in said.splitlines() if line.startswith("good:")] == ["done", "done", "done,"]
    assert len(lines(finished, "train")) == 4
    assert "everything is done" in patchmill("chain", *settings(finished.parents[1], "good", "chain.evals=[knn]"))


def test_a_prep_that_fails_cancels_the_rest_and_says_why(cluster: Cluster, folder: Path) -> None:
    patchmill("chain", *settings(folder, "bad", f"chain.train_images={folder}/broken"))
    said = ends(cluster, folder / "runs" / "bad")
    assert "failed: " in said and "none of the 1 files is a usable image" in said and "slurm/prep-" in said
    assert said.count("cancelled, as prep failed") == 3 and not (folder / "bad.beton").exists()


@pytest.mark.slow
def test_a_second_call_does_only_what_is_missing(cluster: Cluster, finished: Path) -> None:
    folder, before = finished.parents[1], json.loads((finished / "slurm" / "chain.json").read_text())
    stamp = (folder / "good.beton").stat().st_mtime_ns
    said = patchmill("chain", *settings(folder, "good"))
    assert "prep: left out" in said and "train: left out" in said and "knn: left out" in said
    said = ends(cluster, finished)
    jobs = json.loads((finished / "slurm" / "chain.json").read_text())
    assert jobs.pop("linear") and jobs == before and (folder / "good.beton").stat().st_mtime_ns == stamp
    (line,) = [line for line in lines(finished, "eval") if "linear_heads_model" in line]
    assert f"done, {line['linear_heads_model']:.2f} % top-1" in said


@pytest.mark.slow
def test_probes_wait_for_a_run_that_is_requeued_and_a_cancel_ends_all(cluster: Cluster, finished: Path) -> None:
    folder = finished.parents[1]
    data = [f"data.train={folder}/good.beton", f"data.val={folder}/good-val.beton", "train.epochs=100"]
    patchmill("chain", *settings(folder, "again", *data))
    run = folder / "runs" / "again"
    jobs = json.loads((run / "slurm" / "chain.json").read_text())
    assert list(jobs) == ["train", "knn", "linear"]
    trains(run)
    cluster.run("scontrol", "requeue", jobs["train"])
    cluster.wait_for_job(jobs["train"], "PENDING")
    assert "knn" in (said := patchmill("status", str(run))) and "waits for train" in said
    with cluster.releasing():
        wait_for("the second start", 120, lambda: len(lines(run, "resume")) > 0)
    said = patchmill("cancel", str(run))
    assert f"knn (job {jobs['knn']}) is cancelled" in said and "the newest checkpoint is of step" in said
    assert "cancelled, as train was cancelled" in ends(cluster, run)


@pytest.mark.slow
def test_a_run_is_fine_tuned_by_the_processes_of_a_job_of_its_own(cluster: Cluster, finished: Path) -> None:
    tune = ["chain.evals=[knn,finetune]", "chain.finetune.processes=2", "chain.finetune.cpus_per_task=1", "chain.finetune.mem=3G",
            "chain.finetune.time=60", "chain.finetune.settings=[engine/ddp,train.global_batch=16,train.epochs=2]"]  # fmt: skip
    said = patchmill("chain", *settings(finished.parents[1], "good", *tune))
    assert "train: left out" in said and "knn: left out" in said
    said, tuned = ends(cluster, finished), finished / "finetune"
    assert lines(tuned, "start")[0]["processes"] == 2 and len(lines(tuned, "train")) == 4
    assert f"done, {lines(tuned, 'eval')[-1]['val_top1']:.2f} % top-1" in said, said


@pytest.mark.slow
def test_probes_that_srun_starts_on_two_hosts_find_what_one_process_does(cluster: Cluster, finished: Path) -> None:
    hosts = ["srun", "-N2", "--ntasks-per-node=2", "--mem=6G", sys.executable, "-m", "pipeline", "eval"]
    for probe in (["knn", "--k", "3"], ["linear"], ["linear", "--exact"]):
        words = [*probe, str(finished), "eval.batch_size=8"]  # 40 and 20 images: something for each
        shutil.rmtree(finished / "features")
        apart = cluster.run(*hosts, *words, "engine/ddp", timeout=300)
        shutil.rmtree(finished / "features")
        assert "%" in apart and apart in patchmill("eval", *words), apart


@pytest.mark.slow
def test_signals_of_a_run_that_srun_starts_on_two_hosts_are_those_of_one_process(
    cluster: Cluster, finished: Path
) -> None:
    """Weights that stay as they were, so that only the signals could differ."""
    folder, found = finished.parents[1], []
    data = f"data.train={folder}/good.beton", f"data.val={folder}/good-val.beton", "tracking.uri=none"
    more = "eval.online_every=1", "eval.knn_k=3", "optim.base_lr=1e-30", "optim.weight_decay=0.0"
    patchmill("train", *settings(folder, "alone", *data, *more))
    hosts = ["srun", "-N2", "--ntasks-per-node=2", "--mem=6G", sys.executable, "-m", "pipeline", "train"]
    cluster.run(*hosts, *settings(folder, "apart", *data, *more), "engine/fsdp2", timeout=300)
    for run in ("alone", "apart"):
        rows = lines(folder / "runs" / run, "eval")
        found.append(
            [
                [row[key] for key in ("step", "online_knn", "effective_rank", "mean_cosine", "online_images")]
                for row in rows
            ]
        )
    assert found[0] == found[1] and [row[0] for row in found[0]] == [2, 4]
