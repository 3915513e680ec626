"""From a pretrained run to a tested classifier: on one process and several, killed and started again, and what is refused."""

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranks import ranks_of, wait_for_step

from pipeline.augment import build_policy
from pipeline.config import UserError, load_config
from pipeline.engine.torch import TorchEngine
from pipeline.eval_settings import FinetuneConfig
from pipeline.evaluate.accuracy import Accuracy, count
from pipeline.evaluate.compression import compression, draw
from pipeline.evaluate.finetune import choose_source, start_from
from pipeline.evaluate.recipe import finetune_config
from pipeline.launch import World
from pipeline.methods import build_method
from pipeline.order import Plan
from pipeline.runlog import read_log
from pipeline.runs import read_config, restore

pytestmark = pytest.mark.timeout(900)

PRETRAIN = ["cifar10/pcae", "data.loader=synthetic", "data.num_samples=70", "train.global_batch=10", "train.epochs=1",
            "optim.warmup_epochs=null", "tracking.uri=none", "checkpoint.every_steps=3"]  # fmt: skip
TUNE = ["train.global_batch=20", "train.epochs=3", "method.mixup=0.8", "method.cutmix=1.0", "method.erase=0.25",
        "method.rand_augment=rand-m9-mstd0.5-inc1", "method.drop_ratio=0.2", "model.drop_path=0.1", "optim.ema=0.9",
        "log.every_steps=1", "checkpoint.every_steps=2", "eval.batch_size=16", "optim.base_lr=2e-2"]  # fmt: skip


def patchmill(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "pipeline", *words], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def done(*words: str) -> str:
    process = patchmill(*words)
    said, problems = process.communicate()
    assert process.returncode == 0, problems
    return said


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("pretrained") / "run"
    done("train", *PRETRAIN, f"run.dir={run}")
    return run


@pytest.fixture(scope="module")
def tuned(pretrained) -> Path:
    done("eval", "finetune", str(pretrained), *TUNE)
    return pretrained / "finetune"


def lines(run: Path, kind: str) -> list[dict]:
    return [line for line in read_log(run / "log.jsonl") if line["kind"] == kind]


def curve(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(run, "train")]


def test_it_learns_and_is_tested_once_an_epoch_and_at_the_end(tuned):
    tests = lines(tuned, "eval")
    assert [line["step"] for line in tests] == [3, 6, 9] and {line["val_images"] for line in tests} == {70}
    assert tests[-1]["val_loss"] < tests[0]["val_loss"]
    assert {"val_top1", "val_top5", "val_top1_ema", "val_loss_ema"} <= tests[-1].keys()
    start = lines(tuned, "start")[0]
    assert start["init_step"] == 7 and start["init_weights"] == "model" and len(start["init_seal"]) == 64


ZERO = pytest.param(("deepspeed", "engine.zero_stage=2"), marks=pytest.mark.slow)


@pytest.mark.parametrize("engine", [("ddp",), ("fsdp2",), ZERO], ids=lambda e: e[0])
def test_two_processes_find_what_one_does(pretrained, tuned, engine, tmp_path):
    """Losses and norms to 1e-4, top-1 to one of the 70 images, one of which may have two classes that are all but equal."""
    name, *more = engine
    run = tmp_path / "run"
    done("eval", "finetune", str(pretrained), *TUNE, f"run.dir={run}", "--nproc", "2", f"engine.name={name}", *more)
    for one, two in zip(curve(tuned), curve(run), strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    for one, two in zip(lines(tuned, "eval"), lines(run, "eval"), strict=True):
        assert one["val_images"] == two["val_images"] == 70
        assert two["val_loss_ema"] == pytest.approx(one["val_loss_ema"], rel=1e-4)
        assert abs(two["val_top1"] - one["val_top1"]) <= 100 / 70 + 1e-9


def test_killed_it_goes_on_and_ends_the_same(pretrained, tuned, tmp_path):
    run, words = tmp_path / "run", ["eval", "finetune", str(pretrained), *TUNE]
    process = patchmill(*words, f"run.dir={run}")
    wait_for_step(process, run, 5)
    process.kill()
    process.wait()
    assert len(curve(run)) < 9
    done(*words, f"run.dir={run}")
    assert lines(run, "resume")[0]["step"] >= 2
    assert curve(run) == curve(tuned)
    drop = ("time",)
    assert [{k: v for k, v in line.items() if k not in drop} for line in lines(run, "eval")] == [
        {k: v for k, v in line.items() if k not in drop} for line in lines(tuned, "eval")
    ]


@pytest.mark.slow
def test_a_killed_rank_is_told_and_the_run_goes_on_with_another_engine(pretrained, tuned, tmp_path):
    run, words = tmp_path / "run", ["eval", "finetune", str(pretrained), *TUNE]
    process = patchmill(*words, f"run.dir={run}", "--nproc", "2", "engine.name=ddp")
    wait_for_step(process, run, 5)
    ranks_of(process)[1].kill()
    assert process.wait(timeout=180) == 1 and "rank 1 was killed by SIGKILL" in process.stderr.read()
    done(*words, f"run.dir={run}")
    for one, two in zip(curve(tuned), curve(run), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_the_encoder_starts_as_the_run_s_and_the_rest_as_new(pretrained, tmp_path):
    for weights in ("model", "ema"):
        cfg = finetune_config(read_config(pretrained), pretrained, ["optim.ema=0.9"], weights)
        engine = TorchEngine(cfg, torch.device("cpu"))
        fresh = engine.full_params()
        start_from(engine, choose_source(pretrained), weights)
        expected = dict(restore(pretrained, weights).method.encoder.named_parameters())
        for name, value in engine.full_params().items():
            short = name.removeprefix("encoder.")
            if short.startswith(("head.", "fc_norm.", "pos_embed")):
                assert torch.equal(value, fresh[name]), name
            else:
                assert torch.equal(value, expected[short]), name
            assert torch.equal(value, engine.ema[short].cpu()), name
    assert not torch.equal(expected["blocks.0.attn.qkv.weight"], fresh["encoder.blocks.0.attn.qkv.weight"])


def test_the_configuration_follows_the_run_and_the_user(pretrained):
    source = read_config(pretrained)
    cfg = finetune_config(source, pretrained, [], "model")
    assert (cfg.model.name, cfg.data.image_size, cfg.method.num_classes) == ("vit_p", 32, 10)
    assert cfg.method.position_grid == 8 and cfg.method.class_token and cfg.run.dir == str(pretrained / "finetune")
    cfg = finetune_config(
        read_config(pretrained),
        pretrained,
        ["eval/finetune_vit_b", "data.image_size=48", "train.global_batch=8"],
        "ema",
    )
    assert cfg.method.rand_augment and cfg.model.name == "vit_p" and cfg.grid == 12 and cfg.method.position_grid == 8
    assert cfg.method.init_weights == "ema" and cfg.eval.loss_every == 8
    assert build_method(cfg).encoder.pos_embed.shape == (1, 145, 96)


def refused(*words: str) -> str:
    more = ["train.global_batch=20"] if words[1] == "finetune" else []
    process = patchmill(*words, *more)
    _, said = process.communicate()
    assert process.returncode == 2 and "Traceback" not in said, said
    return said


def test_what_cannot_be_fine_tuned_is_refused(pretrained, tuned, tmp_path):
    assert "is a fine-tuned classifier; give the run of the pretraining" in refused("eval", "finetune", str(tuned))
    assert "is not a run folder" in refused("eval", "finetune", str(tmp_path))
    said = refused("eval", "finetune", str(pretrained), "model.name=vit_t", f"run.dir={tmp_path / 'a'}")
    assert (
        f"method.init = {pretrained}: its model weights are not those of this encoder" in said
        and "ize mismatch between saved" in said
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text((pretrained / "config.yaml").read_text())
    assert "holds no checkpoint" in refused("eval", "finetune", str(tmp_path / "empty"))
    shutil.copytree(pretrained, tmp_path / "cut", ignore=shutil.ignore_patterns("finetune"))
    for shard in (tmp_path / "cut").glob("checkpoints/*/shard-*"):
        os.truncate(shard, 1000)
    said = refused("eval", "finetune", str(tmp_path / "cut"))
    assert f"method.init = {tmp_path / 'cut'}: cannot be started from: every checkpoint in" in said
    said = refused("eval", "finetune", str(pretrained), "method.num_classes=7", f"run.dir={tmp_path / 'b'}")
    assert "method.num_classes = 7: the images of data.train have 10 classes" in said
    said = refused("eval", "finetune", str(pretrained), "method.rand_augment=rnd-m9", f"run.dir={tmp_path / 'c'}")
    assert "method.rand_augment = rnd-m9: is no policy of timm" in said
    assert "is a pretraining, which has no classifier" in refused("eval", "compression", str(pretrained))


def test_compression_tells_accuracy_and_cost_and_at_its_own_ratio_what_training_did(tuned, tmp_path):
    report = compression(tuned, [0.2, 0.0, 0.4], "model")
    draw(report, tmp_path / "figure.png")
    by_ratio = {row.ratio: row for row in report.rows}
    assert by_ratio[0.2].top1 == pytest.approx(lines(tuned, "eval")[2]["val_top1"])
    assert by_ratio[0.0].gmacs > by_ratio[0.2].gmacs > by_ratio[0.4].gmacs > 0
    assert report.num_images == 70 and report.trained == 0.2 and (tmp_path / "figure.png").stat().st_size > 5000
    told = {row["ratio"]: row["top1"] for row in lines(tuned, "eval")[-1]["compression"]}
    assert told == {ratio: row.top1 for ratio, row in by_ratio.items()}
    with pytest.raises(UserError, match=r"method.drop_ratio = 0.99"):
        compression(tuned, [0.99])
    other = Path(shutil.copytree(tuned, tmp_path / "other"))
    (other / "config.yaml").write_text(load_config([other / "config.yaml"], ["data.num_classes=7"]).to_yaml())
    with pytest.raises(UserError, match="has 7 classes, the classifier 10"):
        compression(other, [0.0])


class Counting:
    """An engine whose classifier says what each image's place in the set is."""

    def __init__(self, labels):
        self.method, self.seen = self, []
        self.labels = labels

    def draw(self, keys, labels):
        return labels

    def call(self, name, images, labels):
        self.seen.append(len(labels))
        logits = torch.zeros(len(labels), 10)
        logits[torch.arange(len(labels)), labels] = torch.where(labels == 3, -1.0, 1.0)
        return logits, None


@pytest.mark.parametrize("images", [71, 49])  # of 49 the third process has none left in the last round
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_counts_once_on_any_number_of_processes(size, images):
    cfg = load_config(
        ["eval/finetune_small"],
        ["run.dir=x", "data.loader=synthetic", f"data.num_samples={images}", "eval.batch_size=8"],
    )
    accuracy, sums, calls = Accuracy(cfg, Plan(1, 3, 0)), [], []
    for rank in range(size):
        world = World(rank, size)
        object.__setattr__(world, "gather", lambda value: sums.append(value) or [value])
        engine = Counting(None)
        accuracy.measure(engine, world)
        calls.append(len(engine.seen))
    accuracy.close()
    labels = np.arange(images) % 10
    assert sum(part["top1"] for part in sums) == int((labels != 3).sum()) and len(set(calls)) == 1
    means = accuracy._means(sums)
    assert means["val_top1"] == pytest.approx(100 * (labels != 3).mean()) and means["val_images"] == images


def test_equal_logits_are_won_by_the_lower_class():
    found = count(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([0, 1, 2]))
    assert int(found["top1"]) == 1 and int(found["top5"]) == 3
    assert float(found["loss"]) == pytest.approx(2 * np.log(1 + 1 + np.exp(-1)) + np.log(3))


SETTINGS = FinetuneConfig(name="finetune", num_classes=10, erase=0.25, rand_augment="rand-m9-mstd0.5-inc1")


def pictures(number: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 3, size, size), np.uint8)


def test_an_image_is_augmented_the_same_whatever_thread_makes_it_and_nobody_else_notices():
    policy, images = build_policy(SETTINGS, 32), pictures(64)
    keys = np.arange(64, dtype=np.int64)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002  it is the global one that must stay
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    alone = images.copy()
    policy(keys, alone)
    shared = images.copy()
    parts = [slice(k, k + 3) for k in range(0, 64, 3)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: policy(keys[part], shared[part]), parts))
    assert np.array_equal(alone, shared)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    other = images.copy()
    policy(keys + 1000, other)
    assert not np.array_equal(alone, other) and (alone != images).any((1, 2, 3)).mean() > 0.5


def test_a_quarter_is_erased_by_boxes_of_the_stated_share_about_the_mean():
    policy = build_policy(SETTINGS.model_copy(update={"rand_augment": None}), 64)
    images = np.zeros((800, 3, 64, 64), np.uint8)
    policy(np.arange(800, dtype=np.int64), images)
    touched = images.any(1)
    erased = touched.any((1, 2))
    assert 0.2 < erased.mean() < 0.3
    areas = touched[erased].mean((1, 2))
    assert areas.min() > 0.015 and areas.max() < 0.36
    inside = images.transpose(0, 2, 3, 1)[touched]
    assert inside.mean(0) == pytest.approx(255 * np.array([0.485, 0.456, 0.406]), abs=4)
    assert build_policy(SETTINGS.model_copy(update={"rand_augment": None, "erase": 0.0}), 64) is None


def test_every_operation_of_the_policy_works_at_its_strongest():
    policy = build_policy(SETTINGS.model_copy(update={"rand_augment": "rand-m10-n15-p1.0-inc1", "erase": 0.0}), 32)
    policy(np.arange(60, dtype=np.int64), pictures(60))


def test_the_loader_augments_training_images_alone():
    from pipeline.runs import open_images, open_training

    cfg = load_config(["eval/finetune_small"], ["run.dir=x", "data.loader=synthetic", "method.rand_augment=rand-m9"])
    assert open_training(cfg).policy is not None
    assert open_images(cfg, "train", augment=True).policy is None, "which is for probes of it"
    assert open_images(cfg, "val", augment=False).policy is None


def test_with_a_share_of_the_labels_only_these_images_are_seen(tmp_path):
    from pipeline.evaluate.subset import label_subset
    from pipeline.order import sample_keys
    from pipeline.runs import open_images, open_training

    cfg = load_config(
        ["eval/finetune_small"],
        ["run.dir=x", "data.loader=synthetic", "data.num_samples=200", "eval.label_fraction=0.1"],
    )
    loader = open_training(cfg)
    chosen = label_subset(loader.labels(), 0.1, 0)
    with loader.batches(iter([(2, np.arange(20))])) as batches:
        batch = next(batches)
    assert loader.num_samples == 20 and batch.ids.tolist() == chosen.tolist()
    assert batch.keys.tolist() == sample_keys(cfg.train.seed, 2, chosen).tolist(), "an image is cut as in the whole set"
    assert sorted(batch.labels.tolist()) == sorted([*range(10)] * 2)
    whole = open_training(cfg.model_copy(update={"eval": cfg.eval.model_copy(update={"label_fraction": 1.0})}))
    assert whole.num_samples == 200 and whole.image_set != loader.image_set
    assert open_images(cfg, "val", augment=False).num_samples == 200
