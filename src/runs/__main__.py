"""`python -m src.runs`: the commands about runs."""

from src.interrupts import end_at_once

if __name__ == "__main__":
    end_at_once()

import sys

from src.runs.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
