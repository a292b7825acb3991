"""A collective that one rank never enters, for real: gloo's timeout, the dumps of all ranks, and who is named."""

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

from src.cluster import hang
from src.distributed.process import host_store

RANK = """
import sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from src.cluster.failures import classify
from src.distributed import recorder
from src.distributed.process import Ranks

traces, forgetful = Path(sys.argv[1]), int(sys.argv[2])
ranks = Ranks.join("cpu", 3, timeout_seconds=60.0, traces=traces)
pair = dist.new_group([1, 2], group_desc="tensor")
dist.all_reduce(torch.ones(3))
if ranks.rank > 0:
    dist.all_reduce(torch.ones(3), group=pair)
ranks.set_timeout(4.0, [])

def do_something_else():
    time.sleep(60)

if ranks.rank == forgetful:
    do_something_else()
try:
    dist.all_gather_object([None] * 3, "late")
except RuntimeError as error:
    assert classify(error) == "peer", error
    recorder.ask(traces, 3)
"""


def test_the_rank_that_never_came_is_named_with_what_it_did_instead(tmp_path: Path) -> None:
    store, port = host_store()
    began = time.time()
    ranks = [start(tmp_path, rank, port) for rank in range(3)]
    assert [rank.wait(60) for rank in ranks[::2]] == [0, 0]
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
    dump = pickle.loads((tmp_path / "rank_2").read_bytes())
    assert {group["ranks"] for group in dump["pg_config"].values()} == {"[0, 1, 2]", "[1, 2]"}
    assert hang.find(tmp_path, time.time() + 1, ("a", "b", "c")) is None, "dumps of an earlier attempt"


def start(traces: Path, rank: int, port: int) -> "subprocess.Popen[bytes]":
    facts = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    environment = os.environ | shared | {key: str(value) for key, value in facts.items()}
    return subprocess.Popen([sys.executable, "-c", RANK, str(traces), "1"], env=environment)
