"""A replica group on this machine: starts its ranks and ends with them.

`python -m src.cluster.replicas.worker <its folder> ...` is to its ranks what `python launch.py` is to those of a run
without groups; src/cluster/replicas/supervisor.py starts it again.
"""

from src.entry import begin

if __name__ == "__main__":
    begin()

import os
import sys
from collections.abc import Sequence

from src.cluster.local.config import Local, conclude
from src.cluster.local.supervisor import RankSupervisor
from src.cluster.rank import RankJob, by_launcher, end_with
from src.runs.folder import RunFolder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = by_launcher("src.cluster.replicas.worker", "One attempt of a replica group.")
    parser.add_argument("--world", type=int, required=True, help="ranks of this group")
    parser.add_argument("--grace", type=float, required=True, help="seconds between a signal and the end by force")
    given = parser.parse_args(arguments)
    end_with(given.launcher)
    with RunFolder.rejoin(given.folder, given.code, Local.scheduler) as folder:
        supervisor = RankSupervisor(RankJob(folder.path, folder.code), folder.begin(given.world), {}, given.grace)
        return conclude(supervisor, supervisor.run(), folder.path, f"group {folder.path.name}: ").exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
