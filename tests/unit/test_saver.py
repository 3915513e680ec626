"""Saves in the background: the copy is of its moment, one at a time, and a failure is told without ending training."""

import threading
import time

import pytest
import torch
from test_checkpoint import holds, tensors

from pipeline import checkpoint, saver
from pipeline.checkpoint import CheckpointError
from pipeline.launch import World
from pipeline.saver import Saver


@pytest.fixture
def background(tmp_path):
    made = Saver(tmp_path / "checkpoints", 2, World(), torch.device("cpu"))
    yield made
    made.close()


def test_what_is_saved_is_the_state_of_the_moment_whatever_changes_afterwards(background, tmp_path, monkeypatch):
    go_on, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: go_on.wait(60) and save(*args))
    state = tensors(1)
    background.start(1, state, {"note": "one"})
    background.ready()
    for tensor in state.values():
        tensor.fill_(7.0)
    assert background.outcome() is None
    go_on.set()
    saved = background.wait()
    assert (saved.step, saved.reason) == (1, None)
    assert 0 <= saved.stall_s <= saved.seconds
    assert holds(saved.path, 1)
    assert background.outcome() is None and background.wait() is None


def test_the_copies_keep_their_memory(background):
    state = tensors(1)
    found = []
    for step in (1, 2, 3):
        background.start(step, state, {})
        copy = background._copy.result()
        found.append({name: value.data_ptr() for name, value in copy.items() if value.numel()})
        assert all(value.data_ptr() != state[name].data_ptr() for name, value in copy.items() if value.numel())
        background.wait()
    assert found[0] == found[1] == found[2]
    assert [path.name for path in checkpoint.candidates(background._folder)] == ["step-00000003", "step-00000002"]


def test_a_state_that_is_a_copy_is_not_copied_again(background):
    state = tensors(1)
    background.start(1, state, {}, copied=True)
    assert background._copy.result() is state
    saved = background.wait()
    assert holds(saved.path, 1) and saved.stall_s <= saved.seconds


def test_the_stall_counts_from_where_training_stopped(background):
    background.start(1, tensors(1), {}, began=time.perf_counter() - 100)
    saved = background.wait()
    assert saved.seconds > 100 and saved.stall_s > 100


def test_a_save_that_fails_is_told_and_the_next_one_is_tried(background, monkeypatch):
    save = checkpoint.save

    def full(*args):
        raise CheckpointError("no space left")

    monkeypatch.setattr(checkpoint, "save", full)
    background.start(1, tensors(1), {})
    saved = background.wait()
    assert (saved.path, saved.reason) == (None, "no space left")
    monkeypatch.setattr(checkpoint, "save", save)
    background.start(2, tensors(2), {})
    assert holds(background.wait().path, 2)


def test_what_nobody_foresaw_is_raised_where_the_outcome_is_asked_for(background, monkeypatch):
    def broken(*args):
        raise RuntimeError("gloo: connection closed")

    monkeypatch.setattr(saver.checkpoint, "save", broken)
    background.start(1, tensors(1), {})
    with pytest.raises(RuntimeError, match="connection closed"):
        background.wait()
