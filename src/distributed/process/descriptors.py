"""Open files of a rank: most are connections to others, and a process may open 1,024 by most systems' default."""

import resource

from src.errors import PlanError

# gloo connects all with all, a connection for each other rank in each group (measured: world + 3 descriptors a group).
# Beyond this many ranks each connects only to those that it speaks with: 4 descriptors for 32 ranks, and 0.02 s of
# start for 0.41. Below it nothing is gained, and a rank that dies is noticed by all others at once.
FULL_MESH = 32
GROUPS = 2  # of gloo: the world's for tensors of the CPU, and the one of checkpoints
OWN_FILES = 128  # libraries, logs, token shards


def make_room(rank: int, world: int) -> None:
    """Raise this process's soft limit of open files where its connections need it. PlanError where the hard limit is
    lower than that.
    """
    needed = descriptors(rank, world)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise PlanError(
            f"rank {rank} needs {needed:,} open files in a world of {world:,} ranks, and its hard limit is {hard:,} "
            f"(ulimit -Hn): raise it on the nodes to {needed:,} or more, or start fewer ranks"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else hard, hard))


def descriptors(rank: int, world: int) -> int:
    """An upper bound of what a rank opens, NCCL's aside. Rank 0 hosts the store of the rendezvous: every rank has a
    connection to it, and NCCL's watchdog one of its own.
    """
    peers = GROUPS * (world if world <= FULL_MESH else 2 * world.bit_length())
    return OWN_FILES + peers + (2 * world if rank == 0 else 2)
