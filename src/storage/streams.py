"""What is printed for somebody who may not want all of it."""

import os
import sys
from contextlib import AbstractContextManager
from types import TracebackType


class ReaderMayLeave(AbstractContextManager[None, bool]):
    """A block that ends quietly where nobody reads its output any more, as behind `| head`."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        try:
            sys.stdout.flush()
        except BrokenPipeError as broken:
            error = error or broken
        if not isinstance(error, BrokenPipeError):
            return False
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return True
