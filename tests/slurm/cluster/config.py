"""What the cluster looks like, and Slurm's configuration that says so."""

import socket
import time
from pathlib import Path

NODES = {"n1": "10.199.0.11", "n2": "10.199.0.12"}
CONTROLLER = "10.199.0.1"  # this machine's end of the bridge
CPUS, MEMORY_MB, GPUS = 4, 8000, 2  # of a node, as Slurm is told; the machine may have less
MAX_MINUTES = 120
DATABASE_PORT = 16306

# No cgroups, which a container may not have: linuxproc and task/none. The short intervals only make the tests faster.
# preempt_send_user_signal: a job that is to give way gets the signal of its --signal at once, then has GraceTime seconds.
# Without EnforcePartLimits a job that is over its partition's limits waits for ever; without associations,qos in
# AccountingStorageEnforce a job for an account that does not exist runs.
SLURM = """\
ClusterName=patchmill
SlurmctldHost={host}({controller})
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
PlugStackConfig={folder}/etc/plugstack.conf
MailProg=/bin/true
FirstJobId={first_job}
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={default_memory}
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
KillWait=5
UnkillableStepTimeout=30
MessageTimeout=20
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller}
AccountingStoragePort=16816
AccountingStoragePass={folder}/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,qos
{nodes}
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF {limits}
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=15 {limits}
PartitionName=high Nodes=ALL PriorityTier=20 PreemptMode=OFF {limits}
"""

ACCOUNTING = """\
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost={host}
DbdAddr={controller}
DbdPort=16816
SlurmUser=root
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
"""


def write(folder: Path) -> None:
    """The files of ``folder/etc``; ``hosts`` is mounted over /etc/hosts in the nodes."""
    host = socket.gethostname().split(".")[0]
    nodes = (
        f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        for name, address in NODES.items()
    )
    values = {
        "folder": folder,
        "host": host,
        "controller": CONTROLLER,
        "database_port": DATABASE_PORT,
        "default_memory": MEMORY_MB // CPUS // 2,
        "limits": f"MaxTime={MAX_MINUTES} DefaultTime=5 State=UP",
        "nodes": "\n".join(nodes),
        # from the clock: whoever looks for results by job id would take those of an older cluster for its own
        "first_job": int(time.time()) % 60_000_000 + 1000,
    }
    etc = folder / "etc"
    (etc / "slurmdbd.conf").touch(mode=0o600)  # slurmdbd refuses a password that others may read
    (etc / "slurmdbd.conf").write_text(ACCOUNTING.format(**values))
    (etc / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (etc / "plugstack.conf").touch()
    names = [f"{CONTROLLER} {host}", *(f"{address} {name}" for name, address in NODES.items())]
    (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
    (etc / "slurm.conf").write_text(SLURM.format(**values))
