"""What each of several ranks does of a run, without starting them: its share, its samples, its numbers in the log."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_data import open_synthetic

from pipeline import launch
from pipeline.config import ConfigError, UserError
from pipeline.engine.torch import TorchEngine
from pipeline.launch import Portion, World
from pipeline.methods.mae import MAE
from pipeline.metrics import Meter


def test_ranks_and_micro_batches_share_out_the_batch(tiny_config):
    cfg = tiny_config("mae", train__global_batch=24)
    assert Portion.of(cfg, World()) == Portion(slice(0, 24), 24, 1)
    assert Portion.of(cfg, World(1, 3)) == Portion(slice(8, 16), 8, 1)
    assert Portion.of(tiny_config("mae", train__global_batch=24, train__micro_batch=2), World(2, 3)) == Portion(
        slice(16, 24), 2, 4
    )


def test_a_batch_that_does_not_divide_is_refused_with_what_would(tiny_config):
    with pytest.raises(UserError, match="train.global_batch = 24: should be a multiple of the 5 processes"):
        Portion.of(tiny_config("mae", train__global_batch=24), World(0, 5))
    with pytest.raises(UserError, match="train.micro_batch = 12: should divide 8, .* take 4"):
        Portion.of(tiny_config("mae", train__global_batch=24, train__micro_batch=12), World(0, 3))


def test_the_ranks_parts_are_the_batch_and_all_know_its_first_key():
    ids = np.array([7, 3, 11, 5, 2, 9])
    whole = next(open_synthetic().batches(iter([(4, ids)])))
    parts = [next(open_synthetic().batches(iter([(4, ids)]), None, slice(k, k + 2))) for k in (0, 2, 4)]
    for name in ("images", "labels", "ids", "keys"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert all(torch.equal(part.batch_key, whole.keys[:1]) for part in [whole, *parts])


def test_the_log_has_the_mean_over_ranks_and_shows_a_loss_that_is_not_finite():
    others = [[5.0, math.nan, math.nan, 3.0], [math.nan, 4.0, math.nan, 6.0]]
    meter = Meter(lambda numbers: [numbers, *others])
    values = {"loss": 1.0, "loss_rank_1": 2.0, "loss_rank_2": math.nan, "grad_norm": 3.0}
    meter.add({name: torch.tensor(value) for name, value in values.items()}, 8, 0.0)
    meter.flush()
    row = meter.rows[0]
    assert math.isnan(row["loss"]) and math.isnan(row["loss_rank_2"])
    assert (row["loss_rank_1"], row["grad_norm"]) == (3.0, 4.0)


def test_a_weight_that_gets_no_first_value_is_an_error(tiny_config, monkeypatch):
    monkeypatch.setattr(MAE, "reset_parameters", lambda self: torch.nn.init.zeros_(self.decoder.head.weight))
    with pytest.raises(RuntimeError, match=r"reset_parameters left .*decoder\.head\.bias.* without a value"):
        TorchEngine(tiny_config("mae"), torch.device("cpu"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"engine__name": "hsdp"}, "engine.shard_size: is required and not set"),
        ({"engine__name": "ddp", "engine__shard_size": 2}, "engine.shard_size = 2: is for engine.name=hsdp"),
        (
            {"engine__name": "ddp", "engine__reshard_after_forward": "false"},
            "engine.reshard_after_forward = False: is for",
        ),
    ],
)
def test_settings_of_another_engine_are_refused(tiny_config, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("mae", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "engine.name = single: 3 processes were started; set engine.name=ddp, fsdp2, hsdp or deepspeed"),
        ({"engine__name": "ddp"}, "train.global_batch = 8: should be a multiple of the 3 processes"),
        (
            {"engine__name": "hsdp", "engine__shard_size": 2, "train__global_batch": 9},
            "engine.shard_size = 2: should divide the 3",
        ),
        (
            {"engine__name": "ddp", "train__global_batch": 9, "train__micro_batch": 9},
            "train.micro_batch = 9: should divide 3",
        ),
    ],
)
def test_what_the_processes_cannot_share_is_said_before_they_start(settings, message, tiny_config):
    with pytest.raises(UserError, match=message):
        launch.start_local(tiny_config("mae", **settings), ["train"], 3)


def test_a_network_device_that_is_not_there_is_named_with_those_that_are(tiny_config, monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"engine\.interface = eth99: .* has no such network device, but .*lo"):
        with launch.connect(tiny_config("mae", engine__name="ddp", engine__interface="eth99")):
            pass


@pytest.mark.parametrize(("code", "seen"), [("3", 3), ("None", 0), ("'a word'", 1)])
def test_a_rank_leaves_with_its_code_after_what_was_registered_and_whatever_its_threads_do(
    code: str, seen: int
) -> None:
    source = f"""
import atexit, threading, time
from pipeline import launch
atexit.register(print, "registered")
threading.Thread(target=time.sleep, args=(30,)).start()
launch.leave({code})
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stdout) == (seen, "registered\n")
