"""A real Slurm cluster for the tests of this folder: they skip where it cannot be, and fail where it does not start."""

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import Cluster, ClusterError, wait_for, why_not

HERE = Path(__file__).parent
FOLDER = Path(tempfile.gettempdir()) / "patchmill-slurm-tests"  # one name, so that a run finds what a killed one left
RUNNING = pytest.StashKey[Cluster]()
LOCK = pytest.StashKey[socket.socket]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These come last, so that the cluster does not run beside all other tests: it is stopped when the session ends."""
    items.sort(key=lambda item: HERE in item.path.parents)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Lets another run on this machine finish with its cluster first; here, where no test's time limit runs yet."""
    if LOCK not in item.config.stash and why_not() is None:
        lock = item.config.stash[LOCK] = socket.socket(socket.AF_UNIX)  # open, and so held, until this process ends
        if not _takes(lock):
            item.config.get_terminal_writer().line("\ntests/slurm: waiting for another run of these tests to end")
            try:
                wait_for("the end of another run of tests/slurm", 1800, lambda: _takes(lock))
            except ClusterError as error:
                pytest.exit(str(error), returncode=1)
    return (yield)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The running cluster, for all tests; SLURM_CONF in the environment leads Slurm's commands to it."""
    if reason := why_not():
        pytest.skip(reason)
    cluster = Cluster(FOLDER)
    cluster.stop()  # what a killed run left
    with pytest.MonkeyPatch.context() as patch:
        try:
            cluster.start()
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            request.config.stash[RUNNING] = cluster
            yield cluster
        finally:
            cluster.stop()
    assert _left_over(cluster) == []


@pytest.fixture(autouse=True)
def in_order(cluster: Cluster) -> Iterator[None]:
    """The next test finds both nodes up and no job."""
    yield
    cluster.repair()
    cluster.cancel_all()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows the ends of the cluster's logs with a failed test."""
    report = yield
    if report.failed and HERE in item.path.parents and RUNNING in item.config.stash:
        report.sections.append(("logs of the Slurm cluster", item.config.stash[RUNNING].logs()))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What disturbances have cost the runs of test_jobs.py."""
    reports = terminalreporter.getreports("passed")
    rows = [value for report in reports for name, value in report.user_properties if name == "disturbed"]
    if rows:
        terminalreporter.section("disturbed runs, all equal to an undisturbed one")
        form = "{:28}{:>12}{:>10}{:>18}{:>18}".format
        terminalreporter.line(form("", "lost steps", "restarts", "recovery s (mean)", "recovery s (max)"))
        for row in rows:
            terminalreporter.line(form(*map(str, row)))


def _takes(lock: socket.socket) -> bool:
    """Whether this run has the machine: an abstract name, unlike a file, is gone when its process is."""
    try:
        lock.bind("\0patchmill-slurm-tests")
    except OSError:
        return False
    return True


def _left_over(cluster: Cluster) -> list[str]:
    """What a stopped cluster must not leave: processes, links, mounts and its folder."""
    lines = [f"process {process.pid}: {process.name()}" for process in cluster.processes()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(cluster.folder) in " ".join(process.cmdline()):
                lines.append(f"process {process.pid}: {process.cmdline()}")
    lines += [f"link {name}" for _, name in socket.if_nameindex() if name.startswith("patchmill")]
    lines += [f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines() if str(cluster.folder) in line]
    return lines + [str(path) for path in [cluster.folder] if path.exists()]
