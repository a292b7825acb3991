"""A replica group on this machine: `python -m src.cluster.group <its folder> ...` starts its ranks and ends with them.

To its ranks it is what `python launch.py` is to those of a run without groups; src/cluster/groups.py starts it again.
"""

import os
import sys
from collections.abc import Sequence

from src.cluster.crew import Crew
from src.cluster.folder import RunFolder
from src.cluster.job import Job, by_launcher, end_with
from src.cluster.local import conclude


def main(arguments: Sequence[str] | None = None) -> int:
    parser = by_launcher("src.cluster.group", "One attempt of a replica group.")
    parser.add_argument("--world", type=int, required=True, help="ranks of this group")
    parser.add_argument("--grace", type=float, required=True, help="seconds between a signal and the end by force")
    given = parser.parse_args(arguments)
    end_with(given.launcher)
    with RunFolder.rejoin(given.folder, given.code) as folder:
        crew = Crew(Job(folder.path, folder.code), folder.begin(given.world), {}, given.grace)
        return conclude(crew, crew.run(), folder.path, f"group {folder.path.name}: ").exit_code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
