"""Mapped files, of which a few are open at a time: each holds a descriptor for as long as it is mapped."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

# Descriptors that a rank spends on tokens. A process may open 1,024 files by most systems' default, and 256 by some;
# a source of 65 billion tokens has a thousand shards. Samples are shuffled, so more would hardly be met again.
MOST_OPEN = 64


class OpenMaps:
    """Arrays of mapped files by name, those that were used last. Any thread may ask."""

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._open: OrderedDict[Hashable, NDArray[np.integer]] = OrderedDict()
        self._lock = Lock()

    def get(self, name: Hashable, open_map: Callable[[], NDArray[np.integer]]) -> NDArray[np.integer]:
        """The array of this name, opened where it is not; it stays valid for whoever has it, also once it is let go."""
        with self._lock:
            if name not in self._open:
                self._open[name] = open_map()
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return self._open[name]
