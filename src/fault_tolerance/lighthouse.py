"""torchft's lighthouse, where replica groups form quorums: `python -m src.fault_tolerance.lighthouse --port 0
--min-groups 1`.

It keeps no state that training needs: when it dies, groups wait until one listens at its address again.
"""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the address as the first line of stdout, then serve until stdin closes, that is until the parent ends."""
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
