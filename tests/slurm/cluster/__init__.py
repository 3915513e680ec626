"""A real Slurm cluster on one machine, to test against and to try things out: ``python -m tests.slurm.cluster``."""

from .cluster import Cluster, why_not
from .hosts import ClusterError, wait_for

__all__ = ["Cluster", "ClusterError", "wait_for", "why_not"]
