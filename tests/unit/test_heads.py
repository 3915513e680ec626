"""Many heads at once against one plain loop each; on what they are trained, chosen and tested; the verb."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import Config, ConfigError, UserError, load_config
from pipeline.evaluate import features, heads, probe
from pipeline.evaluate.features import Features
from pipeline.evaluate.heads import heads_accuracy, poolings, split, train_heads
from pipeline.order import epoch_permutation

SETTINGS: dict[str, Any] = {"num_classes": 4, "lrs": (0.01, 0.1, 1.0), "epochs": 5, "batch_size": 16, "seed": 0}


def blobs(num: int, seed: int, *, spread: float = 1.0, class_token: bool = True, width: int = 12) -> Features:
    """Clouds of four classes around fixed centres; the class token sees less of them than the mean, the blocks more."""
    centres = torch.randn(4, 4 * width, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 4
    last4 = centres[labels] + spread * torch.randn(num, 4 * width, generator=generator)
    cls = centres[labels, :width] + 3 * spread * torch.randn(num, width, generator=generator)
    return Features(last4[:, -width:].clone(), labels, {"last4": last4, **({"cls": cls} if class_token else {})})


def alone(x: Tensor, labels: Tensor, lr: float, epochs: int, batch_size: int, seed: int) -> torch.nn.Linear:
    """One head by torch's own layer, loss, optimizer and schedule, in float64."""
    head = torch.nn.Linear(x.shape[1], 4, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    batches = -(-len(x) // batch_size)
    solver = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, epochs * batches)
    for epoch in range(epochs):
        for ids in torch.tensor(epoch_permutation(seed, epoch, len(x))).tensor_split(batches):
            solver.zero_grad()
            F.cross_entropy(head(x[ids].double()), labels[ids]).backward()
            solver.step()
            schedule.step()
    return head


def test_every_head_is_the_one_trained_alone_in_a_plain_loop() -> None:
    part = blobs(70, 1)  # five batches of 14, not four of 16 and one of 6
    made = train_heads(poolings(part), part.labels, **SETTINGS)
    assert made.keys() == {"mean", "cls", "cls+mean", "last4"}
    for pooling, x in poolings(part).items():
        for index, lr in enumerate(SETTINGS["lrs"]):
            head = alone(x, part.labels, lr, 5, 16, 0)
            torch.testing.assert_close(made[pooling][:-1, index].T.double(), head.weight.data, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(made[pooling][-1, index].double(), head.bias.data, rtol=1e-3, atol=1e-5)


def test_poolings_follow_the_class_token() -> None:
    part = blobs(8, 1)
    found = poolings(part)
    assert torch.equal(found["cls+mean"], torch.cat([part.others["cls"], part.features], 1))
    assert torch.equal(found["mean"], part.features)
    assert list(found) == ["mean", "cls", "cls+mean", "last4"]
    assert list(poolings(blobs(8, 1, class_token=False))) == ["mean", "last4"]
    train, test = blobs(80, 1, class_token=False), blobs(80, 2, class_token=False)
    assert list(heads_accuracy(train, test, **SETTINGS).held_out) == ["mean", "last4"]


@pytest.mark.parametrize("num", [10, 19, 20, 1003])
def test_a_tenth_is_held_out_by_the_seed_alone(num: int) -> None:
    fitted, held = split(num, 3)
    assert len(held) == num // 10
    assert sorted([*fitted.tolist(), *held.tolist()]) == list(range(num))
    assert torch.equal(held, split(num, 3)[1])
    assert num < 1000 or not torch.equal(held, split(num, 4)[1])


def test_nine_images_are_too_few() -> None:
    with pytest.raises(UserError, match="data.train has 9: give it at least 10"):
        heads_accuracy(blobs(9, 1), blobs(40, 2), **SETTINGS)


def test_images_of_the_held_out_tenth_are_not_trained_on() -> None:
    """Random labels in more dimensions than images: what is trained on is learnt by heart."""
    generator = torch.Generator().manual_seed(0)
    train = Features(torch.randn(200, 400, generator=generator), torch.randint(4, (200,), generator=generator))
    report = heads_accuracy(train, train, **SETTINGS)
    assert report.num_held_out == 20 and max(report.held_out["mean"]) < 60
    assert report.top1 > 85  # of these nine tenths are the images trained on


def test_the_held_out_tenth_changes_neither_head_nor_scale() -> None:
    train, test = blobs(200, 1, spread=2), blobs(200, 2, spread=2)
    only = [Features(part.features, part.labels) for part in (train, test)]
    one = {**SETTINGS, "lrs": (0.1,)}  # no choice: the tested head is the trained one
    before = heads_accuracy(*only, **one)
    held = split(200, 0)[1]
    moved = Features(only[0].features.index_fill(0, held, 1e4), train.labels.index_fill(0, held, 0))
    after = heads_accuracy(moved, only[1], **one)
    assert before.top1 == after.top1 < 100 and before.held_out != after.held_out


def test_the_choice_does_not_see_the_test_labels() -> None:
    train, test = blobs(200, 1, spread=3), blobs(200, 2, spread=3)
    first = heads_accuracy(train, test, **SETTINGS)
    for shift in (1, 2, 3):
        other = heads_accuracy(train, Features(test.features, (test.labels + shift) % 4, test.others), **SETTINGS)
        assert (other.held_out, other.pooling, other.lr) == (first.held_out, first.pooling, first.lr)
        assert other.top1 < first.top1


def test_the_best_held_out_head_is_the_one_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = blobs(400, 1, spread=2), blobs(400, 2, spread=2)
    best = train_heads({"cls": blobs(400, 1).others["cls"]}, train.labels, **{**SETTINGS, "lrs": (0.1,)})["cls"]

    def crafted(inputs: dict[str, Tensor], *_: Any, **__: Any) -> dict[str, Tensor]:
        made = {pooling: torch.zeros(x.shape[1] + 1, 3, 4) for pooling, x in inputs.items()}
        made["cls"][:, 1] = best[:, 0]
        return made

    monkeypatch.setattr(heads, "train_heads", crafted)
    report = heads_accuracy(train, test, **SETTINGS)
    assert (report.pooling, report.lr) == ("cls", 0.1)
    assert report.held_out["cls"][1] > 35 and 35 < report.top1 < 100
    assert report.held_out["mean"] == [report.held_out["last4"][0]] * 3  # class 0 always


def test_of_equal_heads_the_first_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", 7)  # several of them, the last one smaller
    report = heads_accuracy(blobs(200, 1, spread=0.01), blobs(200, 2, spread=0.01), **SETTINGS)
    assert {score for scores in report.held_out.values() for score in scores} == {100}
    assert (report.pooling, report.lr, report.top1) == ("mean", 0.01, 100)


def test_shuffled_labels_give_chance() -> None:
    train, test = blobs(2000, 1), blobs(2000, 2)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(5))
    report = heads_accuracy(Features(train.features, train.labels[order], train.others), test, **SETTINGS)
    assert 17 < report.top1 < 33
    assert all(15 < score < 36 for scores in report.held_out.values() for score in scores)


def test_two_runs_are_equal_whatever_the_global_generator_and_a_seed_changes_them() -> None:
    train, test = blobs(200, 1, spread=3), blobs(200, 2, spread=3)
    before = train.features.clone()
    torch.manual_seed(1)
    first, state = heads_accuracy(train, test, **SETTINGS), torch.get_rng_state()
    torch.manual_seed(2)
    assert heads_accuracy(train, test, **SETTINGS) == first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from it
    assert torch.equal(train.features, before)
    assert heads_accuracy(train, test, **{**SETTINGS, "seed": 1}).held_out != first.held_out


@pytest.mark.parametrize("pooling", ["cls", "last4"])
@pytest.mark.parametrize("which", ["training", "test"])
def test_every_pooling_must_be_finite(pooling: str, which: str) -> None:
    parts = {"training": blobs(40, 1), "test": blobs(40, 2)}
    parts[which].others[pooling][7, 3] = float("inf")
    with pytest.raises(UserError, match=f"the {which} features of image 7 are not finite"):
        heads_accuracy(parts["training"], parts["test"], **SETTINGS)


def test_the_table_marks_the_chosen_head_only() -> None:
    report = heads.HeadsReport({"mean": [10.0, 50.0], "last4": [50.0, 60.25]}, (0.003, 0.1), 8, "last4", 0.1, 55.0)
    title, head, *rows = str(report).splitlines()
    assert title.startswith("held-out top-1 % of 4 heads on 8 training images")
    assert head.split() == ["lr", "mean", "last4"]
    assert [row.split() for row in rows] == [["0.003", "10.00", "50.00"], ["0.1", "50.00", "60.25*"]]


QUICK = {"eval__linear_epochs": 2, "eval__linear_lrs": [0.1, 1.0], "data__num_samples": 40, "data__num_classes": 4}


def test_all_probes_need_one_pass_over_each_set(
    run_dir: Path, write_config: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(**QUICK)
    seen: list[int] = []
    monkeypatch.setattr(features, "normalise", lambda images: seen.append(len(images)) or images.float() / 255)
    report = probe(run_dir, "linear_heads", "untrained")
    assert sum(seen) == 80 and report.num_train == report.num_test == 40
    assert list(report.heads.held_out) == ["mean", "cls", "cls+mean", "last4"]
    assert probe(run_dir, "linear_heads", "untrained") == report
    probe(run_dir, "knn", "untrained")
    probe(run_dir, "linear", "untrained")
    assert sum(seen) == 80


@pytest.mark.parametrize(("options", "name"), [([], "linear_heads"), (["--exact"], "linear")])
def test_the_verb_prints_the_table_and_logs_each_solver_by_its_name(
    run_dir: Path, write_config: Callable[..., object], options: list[str], name: str
) -> None:
    write_config(**QUICK)
    result = CliRunner().invoke(app, ["eval", "linear", str(run_dir), "--weights", "untrained", *options])
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.splitlines()
    assert line.startswith(f"{name} ") and len(table) == (0 if options else 4)
    record = json.loads((run_dir / "log.jsonl").read_text())
    assert record["kind"] == "eval" and f"{record[f'{name}_untrained']:.2f} % top-1" in line
    assert set(record) == {"kind", "time", "step", f"{name}_untrained"}


def test_learning_rates_are_settings(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    cfg = tiny_config(eval__linear_lrs=[0.5, 2])
    assert cfg.eval.linear_lrs == (0.5, 2)
    (tmp_path / "config.yaml").write_text(cfg.to_yaml())
    assert load_config([tmp_path / "config.yaml"]) == cfg
    for wrong in ([], [0.0], [-0.1], [".inf"]):
        with pytest.raises(ConfigError, match="eval.linear_lrs"):
            tiny_config(eval__linear_lrs=wrong)
