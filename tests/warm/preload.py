"""What processes of tests need, imported once by the one that forks them (tests/forks.py). Nothing here may start a
thread or compute: a fork takes neither along.
"""

import pytest  # noqa: F401
import torch.distributed.tensor  # noqa: F401

import src.cluster.rank
import src.cluster.replicas.worker
import src.launch.start
import src.tasks.pretrain.rank  # noqa: F401
import tests.fault_tolerance.life  # noqa: F401
