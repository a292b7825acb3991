"""python -m src.planning calibrate FOLDER...: factors of this site's speed, from runs that have measured steps."""

from src.entry import begin

if __name__ == "__main__":
    begin()

import argparse
import sys
from pathlib import Path

from src.errors import UserError
from src.planning.time.calibration import fit, measured
from src.storage.streams import to_stderr


def main() -> int:
    """Exit code 2 for a folder that says nothing of time."""
    parser = argparse.ArgumentParser(prog="python -m src.planning", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    calibrate = commands.add_parser("calibrate", help="fit cluster.time_factors to measured steps")
    calibrate.add_argument("folders", type=Path, nargs="+", help="run folders of task=bench or of training")
    given = parser.parse_args()
    try:
        runs = [measured(folder) for folder in given.folders]
    except UserError as error:
        to_stderr(error.problems)
        return error.exit_code
    found = fit(runs)
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(f"{count}: {found.before:.1%} off in the mean, {found.after:.1%} with these factors", file=sys.stderr)
    print("cluster.time_factors={" + ", ".join(f"{name}: {value:g}" for name, value in found.factors.items()) + "}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
