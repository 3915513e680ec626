"""What is wrong with a job, from what its ranks found; and the folder that one process looks at."""

import socket
from types import SimpleNamespace

import pytest
import torch

from pipeline import preflight
from pipeline.config import ConfigError
from pipeline.launch import World
from pipeline.preflight import (
    Findings,
    clock_offsets,
    differing,
    judge,
    low_disks,
    low_swap,
    share_of,
    table,
    wrong_clocks,
    wrong_sum,
)

SAME = {"python": "3.11.7", "torch": "2.13.0"}


def total(size: int) -> torch.Tensor:
    return torch.stack([share_of(rank, size) for rank in range(size)]).sum(0)


@pytest.mark.parametrize("size", [1, 2, 300])
def test_the_sum_of_all_shares_is_right(size):
    assert wrong_sum(total(size), size) is None


def test_a_sum_that_misses_a_rank_names_it():
    assert wrong_sum(total(4) - share_of(2, 4), 4) == "has not what rank 2 gave"
    twice = total(400) + share_of(0, 400)
    assert wrong_sum(twice, 400) == "has not what rank 0 gave"


def test_a_number_that_is_off_by_the_least_bit_is_seen():
    found = total(4)
    found[104] = torch.nextafter(found[104], torch.tensor(1e9))
    assert wrong_sum(found, 4).startswith("has 1 of 1004 numbers wrong")


def test_a_wrong_all_reduce_is_said_of_the_rank_where_it_is(monkeypatch):
    def loses_rank_1(tensor: torch.Tensor, group: object) -> None:
        tensor.copy_(share_of(0, 2))

    monkeypatch.setattr(preflight.dist, "all_reduce", loses_rank_1)
    (problem,) = preflight._sums(World(0, 2), torch.device("cpu"))
    (line,) = judge([Findings("a", "cpu", SAME, 0.0, problems=[problem]), Findings("b", "cpu", SAME, 0.0)])
    assert line.startswith("rank 0 on a: all-reduce: the sum over the gloo group has not what rank 1 gave")
    assert "engine.interface" in line


def test_a_clock_more_than_5_s_off_the_median_is_wrong():
    assert clock_offsets([100.0, 101.0, 99.0]) == [0, 1, -1]
    assert list(wrong_clocks([100.0, 104.9, 96.0, 100.0])) == []
    ((rank, text),) = wrong_clocks([100.0, 100.1, 93.0, 100.0])
    assert rank == 2
    assert text.startswith("clock: is 7.0 s behind the median rank's")


def test_what_differs_from_most_ranks_is_wrong_and_what_is_missing_is_another_matter():
    facts = [SAME, SAME | {"torch": "2.12.0"}, SAME, {"python": "3.11.7"}]
    ((rank, text),) = differing(facts)
    assert rank == 1
    assert text.startswith("torch: 2.12.0 instead of 2.13.0, as most ranks have")
    seals = [SAME | {"seal of data.train": seal} for seal in ("aa", "bb")]
    assert [rank for rank, _ in differing(seals)] == [1], "of as many the first one's counts"


def test_every_problem_is_a_line_that_names_ranks_and_hosts():
    shared = ["data.train: /x: there is no such file"]
    findings = [
        Findings("a", "cpu", SAME, 50.0, problems=[*shared, "run.dir = /r: cannot be written"]),
        Findings("b", "cpu", SAME | {"torch": "2.12.0"}, 50.0, problems=shared),
        Findings("b", "cpu", SAME | {"torch": "2.12.0"}, 60.0, problems=shared),
        *(Findings("c", "cpu", SAME, 50.0, problems=shared) for _ in range(4)),
    ]
    lines = judge(findings)
    assert lines[0] == f"all 7 ranks: {shared[0]}"
    assert lines[1] == "rank 0 on a: run.dir = /r: cannot be written"
    assert lines[2].startswith("rank 2 on b: clock: is 10.0 s ahead")
    assert lines[3].startswith("rank 1 on b, rank 2 on b: torch: 2.12.0")
    assert len(lines) == 4


def test_a_problem_of_many_ranks_names_some():
    assert preflight._names([str(n) for n in range(20)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 12 more"


def test_a_disk_for_less_than_three_states_is_a_warning():
    state = 10**9
    found = [Findings("a", "cpu", SAME, 0.0, free={"/runs": 3 * state, "/tmp": 3 * state - 1})]
    ((rank, text),) = low_disks(found, state)
    assert rank == 0 and "free in /tmp" in text
    assert judge(found) == []


def test_a_disk_for_less_than_the_files_of_its_hosts_ranks_is_a_warning():
    hosts = ("a", 999), ("b", 1500), ("b", 1499), ("a", 1000), ("b", 1500), ("c", None)
    found = [Findings(host, "cpu", SAME, 0.0, swap=swap) for host, swap in hosts]
    (first, text), (second, _) = low_swap(found, 3000)
    assert (first, second) == (0, 2) and "files of 2 ranks here" in text
    assert judge(found) == []


def test_a_lone_process_is_warned_of_a_disk_for_less_than_its_files(tmp_path, tiny_config, monkeypatch):
    engine = f"{{name: deepspeed, zero_stage: 3, offload: nvme, offload_dir: {tmp_path / 'disk'}}}"
    cfg = tiny_config("mae", run__dir=tmp_path / "run", engine=engine)
    monkeypatch.setattr(preflight, "check", lambda cfg: "")  # it looks for a compiler
    assert "engine.offload_dir" not in preflight.preflight(cfg)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20 * (path == tmp_path)))
    host = socket.gethostname()
    assert f"warning: rank 0 on {host}: engine.offload_dir: 0.00 GiB free, files of 1 rank" in preflight.preflight(cfg)


def test_the_table_has_a_line_a_rank():
    findings = [
        Findings("a", "cpu", SAME, 10.0, 2e9, {"/r": 5 * 2**30}),
        Findings("bb", "cpu", SAME, 10.5, 2e9, {"/r": 0}),
    ]
    lines = table(findings).splitlines()
    assert lines[1].split() == ["0", "a", "cpu", "2.00", "GB/s", "5", "GiB", "-250", "ms"]
    assert lines[2].split() == ["1", "bb", "cpu", "2.00", "GB/s", "0", "GiB", "+250", "ms"]


def test_a_lone_process_looks_at_its_folder_and_leaves_it_as_it_was(tmp_path, tiny_config):
    said = preflight.preflight(tiny_config("mae", run__dir=tmp_path / "a" / "run"))
    assert said.endswith("in order") and "GB/s" not in said
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="rank 0 on .*run.dir = .*: cannot be written .Not a directory"):
        preflight.preflight(tiny_config("mae", run__dir=tmp_path / "file" / "run"))


def test_a_file_that_never_comes_is_not_seen(tmp_path):
    (tmp_path / "token").write_text("another run's")
    assert not preflight._sees(tmp_path / "token", "mine", until=0.0)
    assert preflight._sees(tmp_path / "token", "another run's", until=0.0)
