"""Meters that wait for the device once an interval, progress for terminals and for logs, and the process's log."""

import io
import logging
import math
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import metrics
from pipeline.metrics import Meter, Progress, setup_logging


class Clock:
    now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = time = perf_counter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(metrics, "time", fake)
    return fake


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("patchmill")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def test_means_rates_and_rows(clock: Clock) -> None:
    meter = Meter()
    for step, extra in enumerate([{}, {"rare": torch.tensor([7.0])}, {}]):
        clock.now += 2
        meter.add({"loss": torch.tensor(float(step)), "skipped": torch.tensor(step == 1), **extra}, 10, 0.5)
    assert meter.flush() == pytest.approx(
        {"loss": 1.0, "skipped": 1 / 3, "rare": 7.0, "images_per_s": 5.0, "data_wait": 0.25}
    )
    assert [row["loss"] for row in meter.rows] == [0.0, 1.0, 2.0]
    assert [row["time"] for row in meter.rows] == [1002.0, 1004.0, 1006.0]
    assert ["rare" in row for row in meter.rows] == [False, True, False]
    assert all(row["images_per_s"] == 5.0 and row["data_wait"] == 0.25 for row in meter.rows)


def test_each_interval_starts_anew_and_an_empty_one_only_restarts_the_clock(clock: Clock) -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(4.0)}, 10, 0.0)
    clock.now += 1
    assert meter.flush()["loss"] == 4.0
    clock.now += 100
    assert meter.flush() == {} and meter.rows == []
    clock.now += 1
    meter.add({"loss": torch.tensor(2.0)}, 10, 0.0)
    assert meter.flush() == pytest.approx({"loss": 2.0, "images_per_s": 10.0, "data_wait": 0.0})


def test_numbers_that_are_not_finite_are_shown() -> None:
    meter = Meter()
    meter.add({"loss": torch.tensor(math.nan), "norm": torch.tensor(math.inf)}, 1, 0.0)
    meter.add({"loss": torch.tensor(1.0), "norm": torch.tensor(1.0)}, 1, 0.0)
    means = meter.flush()
    assert math.isnan(means["loss"]) and means["norm"] == math.inf
    assert meter.rows[1]["loss"] == 1.0


def test_a_tensor_that_is_written_again_keeps_its_steps_value_and_no_graph() -> None:
    meter, scalar = Meter(), torch.tensor(1.0, requires_grad=True)
    meter.add({"loss": scalar * 1}, 1, 0.0)
    buffer = torch.tensor(2.0)
    meter.add({"loss": buffer}, 1, 0.0)
    buffer.fill_(99.0)
    assert not any(value.requires_grad for logs, _ in meter._steps for value in logs.values())
    meter.flush()
    assert [row["loss"] for row in meter.rows] == [1.0, 2.0]


def test_one_transfer_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (transfers.append(tensor.shape), real(tensor))[1])
    for name in ("item", "__float__", "__bool__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    meter = Meter()
    for _ in range(20):
        meter.add({"loss": torch.tensor(1.0), "norm": torch.tensor(2.0, dtype=torch.bfloat16)}, 1, 0.0)
    assert transfers == []
    assert meter.flush()["norm"] == 2.0
    assert transfers == [torch.Size([40])]


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_lines_of_progress_off_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pretrain", 558, "step") as progress:
        for done in range(121):
            progress.update(done, text=f"loss {done / 100:.2f}")
            clock.now += 1
        clock.now += 4
    out = lines(capsys.readouterr().err)
    assert out[0] == "pretrain  0/558  0 %  loss 0.00"
    assert out[1] == "pretrain  15/558  2 %  loss 0.15  1.0 step/s  ETA 9:03"
    assert [line.split()[1].split("/")[0] for line in out] == ["0", "15", "30", "45", "60", "75", "90", "105", "120"]


def test_the_last_state_is_shown_once(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("scan", None, "image") as progress:
        progress.update(1)
        clock.now += 2
        progress.update(401, 401)
    with Progress("write", 3, "image") as progress:
        progress.update(3)
    with Progress("nothing", None, "image"):
        pass
    assert lines(capsys.readouterr().err) == ["scan  1", "scan  401/401  100 %  200 image/s", "write  3/3  100 %"]


def test_a_resumed_runs_rate_counts_its_own_work_and_a_text_stays(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train", 8000, "step") as progress:
        progress.update(4000)
        clock.now += 100
        progress.update(4100, text="loss 0.4")
        clock.now += 100
        progress.update(4200)
    assert lines(capsys.readouterr().err)[-1] == "train  4200/8000  52 %  loss 0.4  1.0 step/s  ETA 1:03:20"


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress("train", 10, "step") as progress:
        progress.update(1)
        progress.update(4)
        _ = 1 / 0
    assert lines(capsys.readouterr().err)[-1].startswith("train  4/10")


def on_a_terminal(script: str) -> str:
    """What the script shows on a terminal of 100 columns, without colours."""
    parent, child = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=child, stderr=child, env=env)
    os.close(child)
    shown = b""
    while select.select([parent], [], [], 60)[0]:
        try:
            shown += os.read(parent, 65536)
        except OSError:  # Linux: the other end is closed
            break
    os.close(parent)
    assert process.wait(60) == 0, shown
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def test_a_bar_on_a_terminal_is_throttled_and_leaves_log_lines_whole() -> None:
    shown = on_a_terminal("""
        import logging
        from pipeline.metrics import Progress, setup_logging
        setup_logging(None)
        with Progress("train [mae]", 20_000, "step") as progress:
            for step in range(20_001):
                progress.update(step, text="loss [0.5]")
                if step == 10_000:
                    logging.getLogger("patchmill").warning("half way")
    """)
    assert "train [mae] ━" in shown and "20000/20000  100 %  loss [0.5]" in shown
    assert re.search(r"\x1b\[2K\d{4}-\d\d-\d\d \d\d:\d\d:\d\d WARNING half way\r\n", shown)
    assert shown.count("train [mae]") < 1000


def test_two_bars_stand_below_each_other() -> None:
    shown = on_a_terminal("""
        from pipeline.metrics import Progress
        with Progress("one", 2, "step") as one, Progress("two", 2, "step") as two:
            one.update(1)
            two.update(1)
    """)
    assert re.search(r"one ━[^\r\n]* 1/2  50 %\s*\r?\n[^\r\n]*two ", shown)


def test_the_log_goes_to_stderr_and_to_the_run(
    tmp_path: Path, logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging(None)
    setup_logging(tmp_path)
    logger.info("hello %d", 1)
    logger.debug("not this")
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO hello 1\n"
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert re.fullmatch(pattern, (tmp_path / "log.txt").read_text())
    assert not logger.propagate and len(logger.handlers) == 2
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logger.warning("elsewhere")
    assert "WARNING elsewhere" in later.getvalue()
    setup_logging(None)
    logger.info("not in the run")
    assert "not in the run" not in (tmp_path / "log.txt").read_text()


def test_importing_needs_no_torch_and_no_mlflow() -> None:
    code = "import sys, pipeline.metrics, pipeline.tracking; print([m for m in ('torch', 'mlflow', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
