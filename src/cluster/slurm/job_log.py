"""SLURM's own lines in the log of a job: out of memory, lost nodes, and processes that died by a signal."""

import re
from collections.abc import Sequence

from src.cluster.backend import LogFindings, NodeEvent

START = "Starting with JobEnvironment("  # submitit's first line of each start
_HOST_MEMORY = re.compile(r"oom-kill|Out Of Memory|OUT_OF_MEMORY")
# srun: error: n2: task 5: Killed     srun: error: n2: tasks 4-7: Bus error
_DIED = re.compile(
    r"srun: error: (\S+): tasks? ([\d,-]+): (Killed|Bus error|Segmentation fault|Aborted|Illegal instruction)"
)
# From here on it is srun that ends what still runs: whoever is killed later is not the cause.
_ABORTED = re.compile(r"Job step aborted|Terminating StepId|CANCELLED AT")
_NODE_FAILURE = re.compile(r"[Nn]ode failure on (\S+)")
# Its step daemon is gone; srun counts the nodes of the step, from 0.
_LOST_NODE = re.compile(r"[Aa]borting, io error (?:and missing step|with slurmstepd) on node (\d+)")


def findings(log: str, nodes: Sequence[str]) -> LogFindings:
    """Of one start; `nodes` by rank, or each once, in the order of the ranks."""
    died = _DIED.search(_ABORTED.split(log, maxsplit=1)[0])
    return LogFindings(
        out_of_memory=_HOST_MEMORY.search(log) is not None,
        node_down=_node_down(log, list(dict.fromkeys(nodes))),
        died=None if died is None else NodeEvent(died[1], died[0]),
    )


def _node_down(log: str, hosts: Sequence[str]) -> NodeEvent | None:
    if (down := _NODE_FAILURE.search(log)) is not None:
        return NodeEvent(down[1].rstrip(".,"), down[0])
    if (lost := _LOST_NODE.search(log)) is not None:
        return NodeEvent(hosts[int(lost[1])], lost[0])
    return None
