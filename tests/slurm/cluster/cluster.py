"""A Slurm cluster of two nodes on this machine, as root; all that it writes is in one folder."""

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil

from . import config
from .hosts import BRIDGE, PATH, ClusterError, Node, lives, process_of, run, spawn, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd", "mariadb", "mariadb-install-db", "ip",
            "unshare", "nsenter")  # fmt: skip
SERVICES = ("slurmctld", "slurmdbd", "mariadbd", "munged")  # in the order in which they are stopped
UP = {"idle", "mixed", "allocated", "completing"}
MARK = "PATCHMILL_SLURM_CLUSTER"  # with its folder, in the environment of all that a cluster starts
HOLD_S, CAUTION_S = 120, 5


def why_not() -> str | None:
    """Why a cluster cannot be started here."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root, for namespaces"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"a Slurm cluster needs {', '.join(missing)}: make slurm-packages" if missing else None


class Cluster:
    """Starts and stops the cluster, breaks its nodes, and looks after its jobs; every wait has an end."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or Path(tempfile.gettempdir()) / "patchmill-slurm").resolve()
        self.environment = {"SLURM_CONF": str(self.folder / "etc/slurm.conf")}
        self._marked = self.environment | {MARK: str(self.folder)}
        self.nodes = {name: Node(name, address, self.folder) for name, address in config.NODES.items()}
        self._mark = self.folder / "a-slurm-cluster-of-patchmill"

    # ---- the cluster -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts all that does not run yet, and waits until both nodes take jobs."""
        if reason := why_not():
            raise ClusterError(reason)
        self._take_bridge()
        if not (self.folder / "etc/slurm.conf").exists():
            self._make_folder()
        try:
            self._start_munge()
            self._start_database()
            self._start_slurm()
            for node in self.nodes.values():
                node.power_on()
                node.start_slurmd()
            wait_for("both nodes up", 60, lambda: set(self.states().values()) <= UP)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self.logs()}") from error

    def stop(self) -> None:
        """Ends all that this folder's cluster ever started and removes the folder."""
        if not self._mark.exists():
            return
        if process_of(self._run("slurmctld.pid")):
            with contextlib.suppress(ClusterError):  # so that no srun outside the nodes is left waiting
                self.cancel_all()
        for node in self.nodes.values():
            node.power_off()
        for name in SERVICES:
            self._end(name)
        for process in self.processes():  # what a start was doing that was killed
            process.kill()
            wait_for(f"the end of process {process.pid}", 5, lambda process=process: not lives(process))
        if _bridge_owner() == self.folder:
            run("ip", "link", "delete", BRIDGE)
        shutil.rmtree(self.folder)

    def is_running(self) -> bool:
        """Whether anything of it runs."""
        services = any(process_of(self._run(f"{name}.pid")) for name in SERVICES)
        return services or any(node.is_on for node in self.nodes.values())

    def processes(self) -> list[psutil.Process]:
        """What it started outside the nodes, and the children of that; not the asking one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.pid != os.getpid() and lives(process):
                    found.append(process)
        return found

    def logs(self, lines: int = 25) -> str:
        """The ends of all logs."""
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            tails += [f"--- {path.name}", *text] if text else []
        return "\n".join(tails)

    # ---- its nodes ---------------------------------------------------------------------------------------------------

    def crash(self, name: str) -> None:
        """Power failure. Slurm notices after SlurmdTimeout, in 20 to 30 s."""
        self.nodes[name].power_off()

    def boot(self, name: str) -> None:
        """Switches a node on again and waits until it takes jobs."""
        since = int(time.time())
        node = self.nodes[name]
        if not node.is_on:
            node.power_on()
            self._wait_registered(name, since)

    def link_down(self, name: str) -> None:
        """Pulls the node's network cable."""
        self.nodes[name].set_link("down")

    def link_up(self, name: str) -> None:
        """Plugs it in again and waits until the node answers: 97 s were seen where Slurm had just given it up."""
        self.nodes[name].set_link("up")
        wait_for(f"{name} answering", 150, lambda: self.states()[name] in UP)

    def kill_slurmd(self, name: str) -> None:
        """Ends slurmd alone; the node's jobs go on."""
        self.nodes[name].kill_slurmd()

    def start_slurmd(self, name: str) -> None:
        """Starts it again and waits until the node takes jobs."""
        since = int(time.time())
        self.nodes[name].start_slurmd()
        self._wait_registered(name, since)

    def repair(self) -> None:
        """Brings every node back, whatever was done to it."""
        for name, node in self.nodes.items():
            self.boot(name)
            node.start_slurmd()
            self.link_up(name)

    def states(self) -> dict[str, str]:
        """Slurm's word for each node; with a * where it does not answer."""
        rows = self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T").splitlines()
        return dict(row.split() for row in rows)

    # ---- its jobs ----------------------------------------------------------------------------------------------------

    def run(self, *command: str, timeout: float = 60) -> str:
        """What a command prints, of Slurm or that calls Slurm; ``ClusterError`` with its words if it fails."""
        return run(*command, timeout=timeout, env=os.environ | self._marked)

    def submit(self, command: str, *options: str) -> str:
        """Submits a line of shell as a batch job; its id."""
        return self.run("sbatch", "--parsable", *options, "--wrap", command)

    def job(self, job_id: str) -> dict[str, str]:
        """The fields of ``scontrol show job``, such as JobState, Reason and Restarts."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job_id)))

    def wait_for_job(self, job_id: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Its fields as soon as it is in one of the states; ``release`` helps where it was requeued."""
        last: dict[str, str] = {}

        def reached() -> bool:
            last.update(self.job(job_id))
            return last["JobState"] in states

        try:
            wait_for(f"job {job_id} {' or '.join(states)}", timeout, reached)
        except ClusterError as error:
            raise ClusterError(f"{error}; it is {last.get('JobState')}, reason {last.get('Reason')}") from error
        return last

    def cancel_all(self) -> None:
        """Leaves no job, so that the next test has all nodes."""
        jobs = sorted(set(self.run("squeue", "-h", "-o", "%A").split()))
        if jobs:
            self.run("scancel", *jobs)
            wait_for("no job", 60, lambda: not self.run("squeue", "-h", "-o", "%A"))

    def release(self) -> list[str]:
        """Starts requeued jobs, which Slurm holds back for two minutes, now; the ids of those that may.

        That wait (Reason=BeginTime) is no setting. A job is released only some seconds after it was requeued, while all
        nodes are up for as long: one of two nodes that started the moment its crashed node came back was seen to hang.
        """
        if set(self.states().values()) - UP or time.time() - max(map(self._slurmd_since, self.nodes)) < CAUTION_S:
            return []
        released = []
        for row in self.run("squeue", "-h", "-r", "-t", "PD", "-o", "%i|%r|%S").splitlines():
            job_id, reason, begins = row.split("|")
            if reason != "BeginTime" or self.job(job_id)["Restarts"] == "0":
                continue
            if HOLD_S - (datetime.fromisoformat(begins).timestamp() - time.time()) > CAUTION_S:
                self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")
                released.append(job_id)
        return released

    @contextlib.contextmanager
    def releasing(self) -> Iterator[None]:
        """Releases requeued jobs while its body runs."""
        ended = threading.Event()

        def loop() -> None:
            while not ended.wait(1):
                with contextlib.suppress(ClusterError):
                    self.release()

        thread = threading.Thread(target=loop, name="release", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _run(self, name: str) -> Path:
        return self.folder / "run" / name

    def _make_folder(self) -> None:
        """What a start finds, also one after a start that was killed; slurm.conf comes last."""
        if not self._mark.exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ClusterError(f"{self.folder} holds something else: give an empty or a new folder")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._mark.touch()
        for name in ("etc", "log", "run", "state", "spool"):
            (self.folder / name).mkdir(exist_ok=True)
        for number in range(config.GPUS):  # copies of /dev/null: slurmd wants a device
            if not (gpu := self.folder / f"gpu{number}").exists():
                os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        key = self.folder / "etc/munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        config.write(self.folder)

    def _take_bridge(self) -> None:
        """Makes the bridge; its alias names the folder, so that of two clusters the second says where the first is."""
        owner = _bridge_owner()
        if owner == self.folder:
            return
        if owner is not None:
            if Cluster(owner).is_running():
                raise ClusterError(f"a cluster runs in {owner}: python -m tests.slurm.cluster --folder {owner} stop")
            run("ip", "link", "delete", BRIDGE)
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "alias", str(self.folder), "up")
        run("ip", "address", "add", f"{config.CONTROLLER}/24", "dev", BRIDGE)

    def _start_munge(self) -> None:
        socket = self._run("munge.socket")
        if not process_of(self._run("munged.pid")):
            files = {"key-file": "etc/munge.key", "pid-file": "run/munged.pid", "seed-file": "state/munge.seed",
                     "log-file": "log/munged.log", "socket": "run/munge.socket"}  # fmt: skip
            self.run("munged", "--force", *(f"--{option}={self.folder / path}" for option, path in files.items()))
        wait_for("munged", 20, lambda: self.run("munge", "-n", "-S", str(socket), timeout=5))

    def _start_database(self) -> None:
        data, pid_file = self.folder / "database", self._run("mariadbd.pid")
        socket = f"--socket={self._run('database.socket')}"
        sizes = ["--innodb-log-file-size=16M", "--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0"]
        options = ["--no-defaults", "--user=root", *sizes]
        if not data.exists():
            new = tempfile.mkdtemp(dir=self.folder)
            self.run(
                "mariadb-install-db",
                *options,
                f"--datadir={new}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            )
            os.rename(new, data)
        if not process_of(pid_file):
            listen = [socket, "--bind-address=127.0.0.1", f"--port={config.DATABASE_PORT}", "--skip-name-resolve"]
            command = ["mariadbd", *options, *listen, f"--datadir={data}", f"--pid-file={pid_file}"]
            self._database = spawn(command, self.folder / "log/mariadbd.log", os.environ | self._marked)
            pid_file.write_text(str(self._database.pid))  # it does so itself, but later
        client = ("mariadb", "--no-defaults", socket, "--user=root", "-e")
        user = "CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm.* TO 'slurm'@'127.0.0.1'"
        wait_for("the database", 60, lambda: self.run(*client, f"{user}; SELECT 1", timeout=5))

    def _start_slurm(self) -> None:
        # without a time limit sacctmgr tries for minutes to reach a slurmdbd that is not there
        questions = {"slurmdbd": ("sacctmgr", "-n", "list", "qos"), "slurmctld": ("scontrol", "ping")}
        answers = {"slurmdbd": "normal", "slurmctld": "is UP"}
        for name, question in questions.items():
            if not process_of(self._run(f"{name}.pid")):
                self.run(name)
            wait_for(name, 60, lambda name=name, question=question: answers[name] in self.run(*question, timeout=5))
            if name == "slurmdbd" and "patchmill" not in self.run("sacctmgr", "-n", "list", "cluster"):
                self.run("sacctmgr", "-i", "add", "cluster", "patchmill")

    def _end(self, name: str) -> None:
        process = process_of(self._run(f"{name}.pid"))
        if process is None:
            return
        process.terminate()
        try:
            wait_for(f"the end of {name}", 20, lambda: not lives(process))
        except ClusterError:
            process.kill()
            wait_for(f"the end of {name}", 5, lambda: not lives(process))

    def _slurmd_since(self, name: str) -> float:
        """When the slurmd that Slurm knows was started."""
        found = re.search(r"SlurmdStartTime=(\d\S+)", self.run("scontrol", "show", "node", name))
        return datetime.fromisoformat(found[1]).timestamp() if found else 0.0

    def _wait_registered(self, name: str, since: int) -> None:
        wait_for(f"{name} up", 60, lambda: self._slurmd_since(name) >= since and self.states()[name] in UP)


def _bridge_owner() -> Path | None:
    """The folder of the cluster whose bridge it is; None where there is no bridge."""
    known = json.loads(run("ip", "-json", "link", "show", "type", "bridge") or "[]")
    return next((Path(link.get("ifalias", "/nowhere")) for link in known if link.get("ifname") == BRIDGE), None)
