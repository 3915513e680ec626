"""The probes that are trained on images: their parts against plain references, and that they can be stopped at any step."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import UserError
from pipeline.evaluate import probe, trained
from pipeline.evaluate.attentive import AttentiveHead
from pipeline.evaluate.features import rounds
from pipeline.evaluate.mae_linear import LinearHead, build_lars
from pipeline.evaluate.session import evaluation_config, open_session
from pipeline.evaluate.trained import Stopped, TokenNorm, block_tokens
from pipeline.launch import World
from pipeline.order import epoch_permutation
from pipeline.runlog import read_log
from pipeline.stop import StopRequest
from pipeline.tensors import read_tensors
from pipeline.vit import normalise


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# LARS


def published_lars(
    weights: list[Tensor], gradients: list[list[Tensor]], lr: float, trust: float = 0.001, momentum: float = 0.9
) -> None:
    """MAE's update with weight decay 0, a tensor at a time in float64; moves ``weights`` in place."""
    speeds = [torch.zeros_like(weight) for weight in weights]
    for step in gradients:
        for weight, gradient, speed in zip(weights, step, speeds, strict=True):
            change = gradient.clone()
            if weight.dim() > 1:
                own, of_change = float(weight.norm()), float(change.norm())
                change *= trust * own / of_change if own > 0 and of_change > 0 else 1.0
            speed *= momentum
            speed += change
            weight -= lr * speed


@pytest.mark.parametrize("zero", ["nothing", "weight", "gradient"])
def test_lars_moves_as_the_published_one(zero: str) -> None:
    shapes = [(10, 7), (10,)]
    first = [0 * random(*shape) if zero == "weight" else random(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [[(0 if zero == "gradient" and step < 2 else 3.0) * random(*shape, seed=10 * step + i + 2)
                  for i, shape in enumerate(shapes)] for step in range(10)]  # fmt: skip
    parameters = [torch.nn.Parameter(value.clone()) for value in first]
    optimizer = build_lars(parameters, 6.4)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    expected = [value.double() for value in first]
    published_lars(expected, [[gradient.double() for gradient in step] for step in gradients], 6.4)
    for parameter, value, start in zip(parameters, expected, first, strict=True):
        assert float((value - start).norm()) > 0.01  # it moved
        torch.testing.assert_close(parameter.double(), value, rtol=1e-6, atol=1e-6)


# Normalisation


def test_the_normalisation_is_torchs_batch_norm_in_training_and_after_it() -> None:
    norm, plain = TokenNorm(3, 5), [torch.nn.BatchNorm1d(5, affine=False, eps=1e-6) for _ in range(3)]
    scale, shift = 1 + torch.arange(5.0), 3 * torch.arange(5.0)
    for step in range(4):
        tokens = random(6, 3, 7, 5, seed=step) * scale + shift
        mean, var = norm.observe([tokens[:4], tokens[4:]], World())
        made = norm.apply_to(tokens, mean, var)
        for index, each in enumerate(plain):
            torch.testing.assert_close(made[:, index], each(tokens[:, index].mT).mT, rtol=1e-5, atol=1e-5)
    for index, each in enumerate(plain):
        torch.testing.assert_close(norm.mean[index], each.running_mean)
        torch.testing.assert_close(norm.var[index], each.running_var)
        tokens = random(2, 3, 7, 5, seed=9)
        torch.testing.assert_close(
            norm.apply_to(tokens, norm.mean, norm.var)[:, index], each.eval()(tokens[:, index].mT).mT
        )


def test_a_constant_channel_is_no_division_by_zero_and_what_is_not_finite_is_refused() -> None:
    norm = TokenNorm(1, 2)
    mean, var = norm.observe([torch.full((4, 1, 1, 2), 1e3)], World())
    assert norm.apply_to(torch.full((4, 1, 1, 2), 1e3), mean, var).abs().max() < 1
    with pytest.raises(UserError, match="the features of training images are not finite"):
        norm.observe([torch.full((4, 1, 1, 2), math.inf)], World())


# Heads


def plain_attention(head: AttentiveHead, x: Tensor) -> Tensor:
    """Every token is projected, image by image and head by head, in float64."""
    query, key, value, linear = (p.double() for p in (head.query, head.key, head.value, head.linear))
    size = x.shape[-1] // head.num_heads
    rows = []
    for tokens in x.double():
        gathered = []
        for each in query:
            parts = []
            for start in range(0, x.shape[-1], size):
                some = slice(start, start + size)
                scores = torch.stack([(each[some] * (key[some] @ token)).sum() for token in tokens]) / math.sqrt(size)
                parts.append((scores.softmax(0)[:, None] * (tokens @ value[some].T)).sum(0))
            gathered.append(torch.cat(parts))
        rows.append(linear @ torch.stack(gathered).mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("num_heads", "queries"), [(1, 1), (3, 1), (4, 3)])
def test_an_attentive_head_is_plain_attention(num_heads: int, queries: int) -> None:
    head = AttentiveHead(12, num_heads, queries, 5, seed=0)
    with torch.no_grad():
        for number, parameter in enumerate(head.parameters()):
            parameter.copy_(random(*parameter.shape, seed=number))
    x = random(3, 9, 12, seed=7)
    torch.testing.assert_close(head(x).double(), plain_attention(head, x), rtol=1e-4, atol=1e-4)
    gradients = []
    for logits in (head(x).double(), plain_attention(head, x)):
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 3, 4])), list(head.parameters())))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


def test_first_values_are_those_of_the_papers() -> None:
    head = AttentiveHead(400, 4, 3, 200, seed=1).requires_grad_(False)
    assert float(head.query.std()) == pytest.approx(0.02, rel=0.1) and abs(float(head.query.mean())) < 0.003
    for weight in (head.key, head.value, head.linear):
        assert float(weight.abs().max()) == pytest.approx(0.05, rel=0.01) and float(weight.std()) == pytest.approx(
            0.05 / math.sqrt(3), rel=0.02
        )
    assert not torch.equal(head.key, head.value)
    linear = LinearHead(400, 100, seed=1).requires_grad_(False)
    assert float(linear.weight.std()) == pytest.approx(0.01, rel=0.02) and not linear.bias.any()
    assert torch.equal(linear.weight, LinearHead(400, 100, seed=1).weight)
    assert not torch.equal(linear.weight, LinearHead(400, 100, seed=2).weight)


# Every image once


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_whole_batches_and_call_equally_often(num: int, size: int, ranks: int) -> None:
    ids = 3 * np.arange(num)
    shares = [rounds(ids, size, World(rank, ranks)) for rank in range(ranks)]
    assert len({len(batches) for batches, _ in shares}) == 1
    counted = [batch.tolist() for batches, count in shares for batch in batches[:count]]
    alone = [ids[start : start + size].tolist() for start in range(0, num, size)]
    assert sorted(counted) == alone  # the very batches of one process
    dealt = [
        batches[index].tolist() for index in range(len(shares[0][0])) for batches, count in shares if index < count
    ]
    assert dealt == alone  # in their order when the ranks' are put together round by round


# Runs

QUICK = {"data__num_samples": 37, "data__num_classes": 4, "eval__batch_size": 8,
         "eval__mae": {"epochs": 3, "warmup_epochs": 1, "batch": 16},
         "eval__attentive": {"epochs": 3, "warmup_epochs": 1, "batch": 16, "lrs": [0.001, 0.01]}}  # fmt: skip


@pytest.fixture
def quick(run_dir: Path, write_config: Callable[..., object]) -> Path:
    write_config(**QUICK)
    return run_dir


def test_tokens_are_those_of_the_blocks_and_pooled(quick: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with open_session(quick, weights="untrained") as session, torch.no_grad():
        encoder = session.encoder.eval()
        x = encoder._pos_embed(encoder.patch_embed(normalise(images)))
        expected = []
        for block in encoder.blocks:
            x = block(x)
            expected.append(encoder.norm(x))
        found = block_tokens(session, [1, 4])(images)
        torch.testing.assert_close(found, torch.stack([expected[0][:, 1:], expected[3][:, 1:]], 1))
        mean, cls = (block_tokens(session, [4], pooling)(images) for pooling in ("mean", "cls"))
    torch.testing.assert_close(mean[:, 0, 0], expected[3][:, 1:].mean(1))
    torch.testing.assert_close(cls[:, 0, 0], expected[3][:, 0])


def state_of(run: Path, name: str) -> dict[str, Tensor]:
    found = read_tensors(run / "probes" / f"{name}_untrained.safetensors")
    assert found is not None
    return found[0]


class Interrupting(StopRequest):
    """A signal comes while step ``at`` of this process is computed."""

    at = 0
    asked = 0

    @property
    def requested(self) -> str | None:  # type: ignore[override]
        type(self).asked += 1
        return "SIGTERM" if type(self).asked == type(self).at else None

    @requested.setter
    def requested(self, value: str | None) -> None:
        pass


def test_maes_recipe_is_a_plain_loop(quick: Path) -> None:
    """Torch's own BatchNorm and layer, the published update, MAE's schedule by the formula; the weights after 6 steps."""
    probe(quick, "linear_mae", "untrained", ["eval.mae.base_lr=3.0"])
    found = state_of(quick, "linear_mae")
    norm, head = torch.nn.BatchNorm1d(96, affine=False, eps=1e-6), LinearHead(96, 4, seed=0)
    speeds = [torch.zeros_like(parameter) for parameter in head.parameters()]
    with open_session(quick, weights="untrained") as session, session.images("train", augment=True) as loader:
        assert loader.crops.scale == (0.08, 1.0) and loader.crops.flip and loader.crops.augment
        for step in range(6):
            ids = epoch_permutation(0, step // 2, 37)[step % 2 * 16 : step % 2 * 16 + 16]
            with loader.batches(iter([(step // 2, ids)])) as batches, torch.no_grad():
                batch = next(iter(batches))
                tokens = session.encoder.eval().forward_features(normalise(batch.images))
            head.zero_grad()
            F.cross_entropy(head(norm(tokens[:, 1:].mean(1))[:, None]), batch.labels).backward()
            peak = 3.0 * 16 / 256
            lr = peak * step / 2 if step < 2 else peak * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4))
            with torch.no_grad():
                for parameter, speed in zip(head.parameters(), speeds, strict=True):
                    adapted = 0.001 * parameter.norm() / parameter.grad.norm() if parameter.dim() > 1 else 1.0
                    speed.mul_(0.9).add_(adapted * parameter.grad)
                    parameter.sub_(lr * speed)
    torch.testing.assert_close(found["linear.bias"], head.bias.data, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["linear.weight"], head.weight.data, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["mean"][0], norm.running_mean, rtol=1e-4, atol=1e-6)
    assert float((head.weight - LinearHead(96, 4, seed=0).weight).detach().abs().max()) > 1e-5


@pytest.mark.parametrize("name", ["linear_mae", "attentive"])
def test_a_probe_that_is_stopped_at_any_step_ends_as_if_it_had_not_been(
    quick: Path, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe(quick, name, "untrained")
    expected = state_of(quick, name)
    (quick / "probes" / f"{name}_untrained.safetensors").unlink()
    monkeypatch.setattr(trained, "StopRequest", Interrupting)
    for _ in range(2):
        Interrupting.at, Interrupting.asked = 1, 0
        with pytest.raises(Stopped, match="of 6 of the probe; the same command goes on"):
            probe(quick, name, "untrained")
    Interrupting.at = 0
    steps: list[int] = []
    update = trained._update
    monkeypatch.setattr(trained, "_update", lambda *args: steps.append(1) or update(*args))
    assert probe(quick, name, "untrained") == whole
    assert len(steps) == 4
    found = state_of(quick, name)
    assert found.keys() == expected.keys() and len(found) > 5
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    assert probe(quick, name, "untrained") == whole and len(steps) == 4  # it is done


def test_a_probe_of_other_settings_begins_anew_and_says_so(quick: Path, caplog: pytest.LogCaptureFixture) -> None:
    probe(quick, "linear_mae", "untrained")
    before = state_of(quick, "linear_mae")
    with caplog.at_level("WARNING", logger="patchmill"):
        probe(quick, "linear_mae", "untrained", ["eval.batch_size=5"])  # changes nothing but rounding
        assert not caplog.text
        probe(quick, "linear_mae", "untrained", ["eval.mae.base_lr=0.2"])
    assert "it begins anew" in caplog.text
    assert not torch.equal(before["linear.weight"], state_of(quick, "linear_mae")["linear.weight"])


def test_the_recipes_learn_and_choose(run_dir: Path, write_config: Callable[..., object]) -> None:
    write_config(**QUICK | {"data__num_samples": 80, "model__patch_size": 8, "method__decoder_heads": 3})
    more = ["eval.mae.epochs=20", "eval.mae.base_lr=30", "eval.attentive.epochs=10", "eval.crop_scale=[0.5,1]"]
    assert probe(run_dir, "linear_mae", "untrained", more).top1 > 60
    report = probe(run_dir, "attentive", "untrained", more)
    assert report.top1 > 60 and report.heads is not None
    assert list(report.heads.held_out) == ["block 1", "block 2", "block 3", "block 4"]
    assert report.heads.num_held_out == 8 and report.num_train == report.num_test == 80
    best = max(score for scores in report.heads.held_out.values() for score in scores)
    assert report.heads.held_out[report.heads.pooling][report.heads.lrs.index(report.heads.lr)] == best
    names = {name for line in read_log(run_dir / "log.jsonl") for name in line}
    assert names == {"kind", "time", "step", "linear_mae_untrained", "attentive_untrained", "changed"}


def test_the_held_out_tenth_is_not_trained_on(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    fit, correct = trained.fit, trained.correct

    def spy_fit(probe_: Any, session: Any, schedule: Any, loader: Any, ids: Any) -> None:
        seen["fit"] = set(ids.tolist())
        fit(probe_, session, schedule, loader, ids)

    def spy_correct(probe_: Any, session: Any, loader: Any, ids: Any, title: str) -> dict[str, float]:
        seen[title] = set(ids.tolist())
        return correct(probe_, session, loader, ids, title)

    from pipeline.evaluate import attentive

    monkeypatch.setattr(attentive, "fit", spy_fit)
    monkeypatch.setattr(attentive, "correct", spy_correct)
    probe(quick, "attentive", "untrained")
    assert seen["fit"] | seen["held-out images"] == seen["test"] == set(range(37))
    assert not seen["fit"] & seen["held-out images"] and len(seen["held-out images"]) == 3


@pytest.mark.parametrize("name", ["knn", "linear", "linear_heads", "linear_mae", "attentive"])
def test_a_label_fraction_is_all_that_a_probe_sees_and_part_of_its_name(
    run_dir: Path, write_config: Callable[..., object], name: Any
) -> None:
    write_config(**QUICK | {"data__num_samples": 80})
    settings = ["eval.label_fraction=0.5", "eval.knn_k=3", "eval.linear_epochs=1"]
    report = probe(run_dir, name, "untrained", settings)
    assert (report.num_train, report.num_test) == (40, 80)
    assert f"{name}_50pct_untrained" in read_log(run_dir / "log.jsonl")[-1]
    assert f"{name}_50pct " in str(report)
    if name == "knn":
        assert probe(run_dir, name, "untrained", ["eval.knn_k=3"]).num_train == 80  # another file of features
        assert probe(run_dir, name, "untrained", [*settings, "eval.label_seed=1"]).num_train == 40


BAD = [
    ("linear_mae", ["eval.mae.warmup_epochs=3"], "eval.mae.warmup_epochs = 3: should be less than eval.mae.epochs = 3"),
    ("attentive", ["eval.attentive.blocks=[2,5]"], r"eval.attentive.blocks = \[2, 5\]: should be different numbers from 1 to 4"),
    ("attentive", ["eval.attentive.blocks=[2,2]"], "should be different numbers"),
    ("attentive", ["data.num_samples=9"], "data.train has 9: give it at least 10"),
    ("linear_mae", ["data.num_classes=1"], "have the label 0: a probe needs images of at least two classes"),
    ("knn", ["train.seed=3"], "train.seed = 3: was 0 when .* was trained; an evaluation may set"),
    ("knn", ["model.name=vit_t"], "model.name = vit_t: was vit_p"),
    ("knn", ["data.image_size=64"], "data.image_size = 64: was 32"),
    ("knn", ["eval.crop_scale=[0.9,0.1]"], r"eval.crop_scale = \[0.9, 0.1\]: should be two shares"),
    ("knn", ["eval.knn_q=3"], "did you mean eval.knn_k"),
    ("knn", ["eval.mae.batchs=3"], "eval.mae.batchs"),
    ("knn", ["eval.label_fraction=0"], "eval.label_fraction"),
    ("knn", ["eval.knn_k=38"], "eval.knn_k or --k = 38: is more than the 37 training images"),
    ("knn", ["data.loader=ffcv", "data.train=nowhere.beton", "data.val=nowhere.beton"], "nowhere.beton"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[" ".join(bad[1]) for bad in BAD])
def test_bad_input_is_one_line(quick: Path, name: Any, change: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        probe(quick, name, "untrained", change)
    assert "\n" not in str(caught.value)


def test_a_method_without_class_token_has_no_such_pooling(run_dir: Path, tiny_config: Callable[..., Any]) -> None:
    (run_dir / "config.yaml").write_text(tiny_config("randsac").to_yaml())
    with pytest.raises(UserError, match="eval.pooling = cls: the encoder of randsac has no class token; take mean"):
        probe(run_dir, "linear_mae", "untrained", ["eval.pooling=cls"])


def test_a_large_batch_becomes_a_power_of_two_with_a_word(quick: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="patchmill"):
        probe(quick, "linear_mae", "untrained", ["eval.mae.batch=16384", "eval.pooling=cls"])
    assert "eval.mae.batch = 16384: there are 37 training images, so a batch has 32" in caplog.text
    assert "linear_mae_cls_untrained" in read_log(quick / "log.jsonl")[-1]


def test_the_engine_of_an_evaluation_is_its_own(run_dir: Path, tiny_config: Callable[..., Any]) -> None:
    trained_with = {"engine__name": "deepspeed", "engine__zero_stage": 3, "engine__precision": "bf16"}
    (run_dir / "config.yaml").write_text(tiny_config("mae", **trained_with).to_yaml())
    engine = evaluation_config(run_dir).engine
    assert (engine.name, engine.zero_stage, engine.precision) == ("ddp", None, "fp32")
    assert evaluation_config(run_dir, ["engine/fsdp2"]).engine.name == "fsdp2"


def test_bf16_is_close_and_kept_apart(quick: Path) -> None:
    with open_session(quick, weights="untrained") as session:
        whole = session.features("val").features
    with open_session(quick, ["eval.precision=bf16"], "untrained") as session:
        half = session.features("val").features
    assert not torch.equal(half, whole)
    assert float((half - whole).norm() / whole.norm()) < 0.02


def test_a_line_that_training_is_writing_stays(quick: Path) -> None:
    import fcntl

    log = quick / "log.jsonl"
    log.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    with (quick / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        probe(quick, "knn", "untrained")
    assert log.read_text().startswith('{"kind": "train", "step": 1}\n{"kind": "tr{"kind": "eval"')
    log.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    probe(quick, "knn", "untrained")
    assert [line["kind"] for line in read_log(log)] == ["train", "eval"]


def test_the_verbs(quick: Path) -> None:
    def said(*words: str) -> list[str]:
        result = CliRunner().invoke(app, ["eval", words[0], str(quick), "--weights", "untrained", *words[1:]])
        assert result.exit_code == 0, result.output
        return result.stdout.splitlines()

    *table, last = said("knn", "--k", "1", "--k", "3", "eval.knn_k=5")
    assert [line.split()[2] for line in table] == ["1", "3", "5"] and last.startswith("knn ")
    record = read_log(quick / "log.jsonl")[-1]
    assert {f"{record[f'knn{k}_untrained']:.2f}" for k in (1, 3, 5)} == {line.split()[3] for line in table}
    assert record["knn_untrained"] == record["knn5_untrained"]
    assert record["changed"] == {"eval.knn_k": 5}, "what an evaluation was asked otherwise than the run is in its line"
    said("knn", "eval.batch_size=7", "data.threads=1")
    assert "changed" not in read_log(quick / "log.jsonl")[-1], "only speed"
    (line,) = said("linear", "--mae")
    assert line.startswith("linear_mae ")
    assert len(said("attentive")) == 5
    result = CliRunner().invoke(app, ["eval", "linear", str(quick), "--exact", "--mae"])
    assert isinstance(result.exception, UserError) and "--exact, --mae" in str(result.exception)
