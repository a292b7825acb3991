"""The batch system that this machine belongs to, and that of a run's cluster.

A lock records the job that its process is in, also when cluster=local started the ranks inside an allocation: another
machine can then ask whether the owner still lives. A second batch system would be chosen here, and nowhere else.
"""

from src.cluster.backend import JobScheduler
from src.cluster.slurm.scheduler import SlurmScheduler
from src.config.build import target_class
from src.config.tree import Tree


def batch_system() -> JobScheduler:
    """Also where its commands are absent: then it does not answer, and what somebody recorded counts as live."""
    return SlurmScheduler()


def scheduler_of(tree: Tree) -> JobScheduler:
    """Of the class that the section `cluster` names; its values are not looked at, so an older version's will do."""
    scheduler: JobScheduler = target_class(tree, "cluster").scheduler  # type: ignore[attr-defined]
    return scheduler
