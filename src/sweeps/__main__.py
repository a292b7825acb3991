"""`python -m src.sweeps`: the commands about a sweep."""

from src.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()

import sys

from src.sweeps.commands import main

if __name__ == "__main__":
    sys.exit(main())
