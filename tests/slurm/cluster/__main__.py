"""``python -m tests.slurm.cluster start``, as root: the cluster for people."""

import argparse
import sys
import time
from pathlib import Path

from . import Cluster, ClusterError

ON_A_NODE = ("crash", "boot", "link-down", "link-up", "kill-slurmd", "start-slurmd")
HELP = """\
start             starts the cluster, or what of it does not run, and prints what to export
stop              ends all of it and removes its folder
crash NODE        power failure; boot NODE switches it on again
link-down NODE    pulls the network cable; link-up NODE plugs it in again
kill-slurmd NODE  ends slurmd alone; start-slurmd NODE starts it again
release           starts requeued jobs now instead of two minutes after the requeue
logs              the ends of all logs
"""


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.slurm.cluster", description="A Slurm cluster of two nodes, n1 and n2.",
                                     epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, help="where all its files are (default: patchmill-slurm in the temporary folder)"
    )
    parser.add_argument("action", choices=("start", "stop", *ON_A_NODE, "release", "logs"))
    parser.add_argument("node", nargs="?", choices=("n1", "n2"))
    given = parser.parse_args()
    if (given.action in ON_A_NODE) != (given.node is not None):
        parser.error(f"{given.action} takes {'a node: n1 or n2' if given.action in ON_A_NODE else 'no node'}")
    cluster = Cluster(given.folder)
    try:
        answer = act(cluster, given.action, given.node)
    except ClusterError as error:
        sys.exit(f"{given.action}: {error}")
    sys.stdout.write(f"{answer}\n" if answer else "")


def act(cluster: Cluster, action: str, node: str | None) -> str | None:
    if node is not None:
        return getattr(cluster, action.replace("-", "_"))(node)
    if action == "start":
        cluster.start()
        return "\n".join(f"export {name}={value}" for name, value in cluster.environment.items())
    if action == "release":
        end = time.monotonic() + 60
        while not (released := cluster.release()) and time.monotonic() < end:
            time.sleep(1)
        return "\n".join(released) or "no requeued job came to wait in a minute, or a node is away"
    return cluster.logs() if action == "logs" else cluster.stop()


if __name__ == "__main__":
    main()
