"""`python -m src.runs`: the commands about runs."""

import sys

from src.runs.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
