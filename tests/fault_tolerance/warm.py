"""What a group needs, imported once by the process that forks them."""

import src.cluster.job
import src.fault_tolerance.synchronous
import src.tasks.pretrain_rank
import src.train.loop  # noqa: F401
