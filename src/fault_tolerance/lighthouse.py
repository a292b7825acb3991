"""Where groups meet, as a program: `python -m src.fault_tolerance.lighthouse --port 0 --min-groups 1`.

It keeps no state that training needs: when it is gone, groups wait, and go on when one listens there again.
"""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Says its address on the first line of stdout, then serves until stdin ends, as it does with who started this."""
    parser = argparse.ArgumentParser(prog="python -m src.fault_tolerance.lighthouse")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--min-groups", type=int, default=1)
    parser.add_argument("--join-seconds", type=float, default=10.0)
    parser.add_argument("--heartbeat-seconds", type=float, default=5.0)
    given = parser.parse_args(arguments)
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"[::]:{given.port}",
        min_replicas=given.min_groups,
        join_timeout_ms=round(1000 * given.join_seconds),
        heartbeat_timeout_ms=round(1000 * given.heartbeat_seconds),
    )
    print(server.address(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
