"""A collective that one rank never enters, for real: gloo's timeout, the dumps of all ranks, and who is named."""

import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from src.cluster.diagnosis import hang
from src.distributed.process import flight_recorder
from tests.rendezvous import launcher_store

RANK = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from src.cluster.diagnosis.rank_failure import classify
from src.distributed.process import flight_recorder
from src.distributed.process.rank_context import RankContext

traces, forgetful = Path(sys.argv[1]), int(sys.argv[2])
ranks = RankContext.join("cpu", 3, timeout_seconds=60.0, traces=traces)
pair = dist.new_group([1, 2], group_desc="tensor")
dist.all_reduce(torch.ones(3))
if ranks.rank > 0:
    dist.all_reduce(torch.ones(3), group=pair)
ranks.set_timeout(4.0, [])

def do_something_else():
    time.sleep(600)

if ranks.rank == forgetful:
    do_something_else()
try:
    dist.all_gather_object([None] * 3, "late")
except RuntimeError as error:
    assert classify(error) == "peer", error
    flight_recorder.ask(traces, 3, patience_seconds=100.0)  # on a machine that compiles beside it
"""


@pytest.mark.slow
def test_the_rank_that_never_came_is_named_with_what_it_did_instead(tmp_path: Path) -> None:
    store, port = launcher_store()
    began = time.time()
    ranks = [start(tmp_path, rank, port) for rank in range(3)]
    assert [rank.wait(180) for rank in ranks[::2]] == [0, 0]
    ranks[1].kill()
    ranks[1].wait()
    found = hang.find(tmp_path, began, ("a", "b", "c"), keep=tmp_path / "kept")
    del store
    assert found is not None
    assert found.rank == 1
    named, _, stood = found.words.partition("; it was at ")
    assert named == "rank 1 (node b) never entered all_gather #3 of group default_pg"
    assert stood == "<string>:19 in do_something_else"
    assert sorted(each.name for each in (tmp_path / "kept").iterdir()) == ["rank_0", "rank_1", "rank_2"]
    dump = pickle.loads((tmp_path / "kept/rank_2").read_bytes())
    assert {group["ranks"] for group in dump["pg_config"].values()} == {"[0, 1, 2]", "[1, 2]"}
    assert hang.find(tmp_path, time.time() + 1, ("a", "b", "c")) is None, "dumps of an earlier attempt"


NCCL_RANK = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from src.distributed.process.rank_context import RankContext

ranks = RankContext.join("cuda", 2, timeout_seconds=120.0, traces=Path(sys.argv[1]))
x = torch.ones(3, device=ranks.device)
dist.all_reduce(x)
ranks.set_timeout(10.0, [])
if ranks.rank == int(sys.argv[2]):
    time.sleep(300)
dist.all_gather_into_tensor(torch.empty(6, device=ranks.device), x)
torch.cuda.synchronize()
"""

if torch.cuda.device_count() != 1:  # without any it is left out, with one alone nobody can be waited for

    @pytest.mark.gpu
    def test_nccl_writes_the_dumps_of_all_ranks_by_itself(tmp_path: Path) -> None:
        store, port = launcher_store()
        began = time.time()
        ranks = [start(tmp_path, rank, port, code=NCCL_RANK, world=2) for rank in range(2)]
        assert ranks[0].wait(180) != 0
        end = time.monotonic() + 60
        while not (tmp_path / "rank_1").exists() and time.monotonic() < end:
            time.sleep(0.5)
        ranks[1].kill()
        ranks[1].wait()
        del store
        found = hang.find(tmp_path, began, ("a", "b"))
        assert found is not None
        assert re.match(r"rank 1 \(node b\) never entered \w*all_gather\w* #\d+ of group ", found.words), found


def start(traces: Path, rank: int, port: int, *, code: str = RANK, world: int = 3) -> "subprocess.Popen[bytes]":
    facts = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    environment = os.environ | shared | {key: str(value) for key, value in facts.items()}
    return subprocess.Popen([sys.executable, "-c", code, str(traces), "1"], env=environment)


def test_a_rank_leaves_the_run_folder_to_rank_0(tmp_path: Path) -> None:
    """Under an outer launcher it may come first, and what it made would be taken for somebody else's folder."""
    flight_recorder.watch(tmp_path / "run/traces", 1)
    assert not (tmp_path / "run").exists()
