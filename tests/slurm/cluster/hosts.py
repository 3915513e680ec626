"""A node: processes in pid, mount, host name and network namespaces of their own, joined to this machine by a bridge.

Ending the first process of a pid namespace ends all of them at once, as a power failure does.
"""

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
BRIDGE = "patchmill0"
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"  # where Debian has the daemons and ip
CLOCKS = 2.0  # psutil computes when a process began from the boot time, in whole seconds


class ClusterError(RuntimeError):
    """The cluster does not do what it should."""


def run(*command: str, timeout: float = 30, check: bool = True, env: Mapping[str, str] | None = None) -> str:
    """What a command prints, without the last line break."""
    env = {**(os.environ if env is None else env), "PATH": PATH}
    try:
        done = subprocess.run(
            command, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout, env=env
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(command)}: no end within {timeout} s") from error
    if check and done.returncode:
        raise ClusterError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout.rstrip("\n")


def wait_for(what: str, seconds: float, condition: Callable[[], T]) -> T:
    """The first true value of ``condition``; a ``ClusterError`` of it counts as not yet."""
    end = time.monotonic() + seconds
    said = ""
    while True:
        try:
            if value := condition():
                return value
        except ClusterError as error:
            said = f"; last: {error}"
        if time.monotonic() > end:
            raise ClusterError(f"{what}: not within {seconds} s{said}")
        time.sleep(0.1)


def process_of(pid_file: Path) -> psutil.Process | None:
    """The living process that a pid file names; not a later one that was given the same number."""
    try:
        process = psutil.Process(int(pid_file.read_text()))
        return process if lives(process) and process.create_time() <= pid_file.stat().st_mtime + CLOCKS else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def lives(process: psutil.Process) -> bool:
    """Whether it has not ended; one that has may be there until its parent looks."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def spawn(command: list[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts what stays in the foreground, out of reach of the terminal's Ctrl-C."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**env, "PATH": PATH}, start_new_session=True
        )


class Node:
    """One host of the cluster; every method says what is done to it, and does not wait for Slurm to notice."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.link = f"patchmill-{name}"
        self.pid_file = folder / "run" / f"{name}.pid"
        self._joined = folder / "run" / f"{name}.joined"
        self.environment = {"SLURM_CONF": str(folder / "etc/slurm.conf"), "HOME": "/root", "LANG": "C.UTF-8"}
        self._unshare: subprocess.Popen[bytes] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the host has power."""
        return process_of(self.pid_file) is not None

    def power_on(self) -> None:
        """Boots the host, slurmd too."""
        if self.is_on and self._joined.exists():
            return
        self.power_off()  # a start that was killed may have left half a host
        # bash takes in and ends the orphans of jobs, which an init must
        init = ["bash", "-c", "while :; do sleep 3600 & wait $!; done"]
        namespaces = ["--fork", "--kill-child", "--pid", "--mount-proc", "--uts", "--net", "--mount"]
        log = self.folder / "log" / f"{self.name}.log"
        self._unshare = spawn(["unshare", *namespaces, *init], log, self.environment)
        self.pid_file.write_text(str(self._unshare.pid))
        wait_for(f"the namespaces of {self.name}", 10, self._init)
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self._init()))
        run("ip", "link", "set", self.link, "master", BRIDGE, "up")
        self._shell(f"""
            hostname {self.name}
            mount --bind '{self.folder}/etc/hosts' /etc/hosts
            ip link set lo up
            ip link set eth0 up
            ip address add {self.address}/24 dev eth0""")
        self._joined.touch()
        self.start_slurmd()

    def power_off(self) -> None:
        """Ends every process of the host at once. The cable first: a host without power does not close its connections."""
        unshare = process_of(self.pid_file)
        if unshare is not None:
            run("ip", "link", "set", self.link, "down", check=False)  # there is none yet where its start was cut short
            for process in unshare.children() or [unshare]:
                process.kill()
            wait_for(f"the end of {self.name}", 20, lambda: not lives(unshare))
        run("ip", "link", "delete", self.link, check=False)  # which the kernel does too, but may be late
        self._joined.unlink(missing_ok=True)
        self.pid_file.unlink(missing_ok=True)

    def start_slurmd(self) -> None:
        """Starts slurmd, unless it runs."""
        if not self._shell(f"kill -0 $(cat '{self._slurmd_pid}') 2>/dev/null && echo runs || true"):
            self._shell(f"exec slurmd -N {self.name}")

    def kill_slurmd(self) -> None:
        """Ends slurmd alone; jobs go on."""
        self._shell(f"kill -KILL $(cat '{self._slurmd_pid}')")
        self._slurmd_pid.unlink()

    def set_link(self, state: str) -> None:
        """Plugs the network cable in ("up") or pulls it ("down")."""
        run("ip", "link", "set", self.link, state)

    @property
    def _slurmd_pid(self) -> Path:
        return self.folder / "run" / f"slurmd-{self.name}.pid"  # a number of the host's own pid namespace

    def _init(self) -> int | None:
        """The host's first process, once it is in its namespaces."""
        unshare = process_of(self.pid_file)
        if unshare is None:
            log = (self.folder / "log" / f"{self.name}.log").read_text()
            raise ClusterError(f"{self.name} is off: {log}")
        return next((child.pid for child in unshare.children() if child.name() == "bash"), None)

    def _shell(self, script: str) -> str:
        """Runs a script on the host."""
        enter = ["nsenter", "--target", str(self._init()), "--pid", "--mount", "--uts", "--net"]
        return run(*enter, "sh", "-ec", script, env=self.environment)
