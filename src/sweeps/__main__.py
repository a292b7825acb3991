"""`python -m src.sweeps`: the commands about a sweep."""

from src.entry import begin

if __name__ == "__main__":
    begin()

import sys

from src.sweeps.commands import main

if __name__ == "__main__":
    sys.exit(main())
