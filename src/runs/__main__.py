"""`python -m src.runs`: the commands about runs."""

from src.entry import begin

if __name__ == "__main__":
    begin()

import sys

from src.runs.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
