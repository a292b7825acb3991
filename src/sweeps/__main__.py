"""`python -m src.sweeps`: the commands about a sweep."""

import sys

from src.sweeps.commands import main

if __name__ == "__main__":
    sys.exit(main())
