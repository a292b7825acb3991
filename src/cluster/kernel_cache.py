"""Compiled kernels of runs of one shape: on each machine's own disk, seeded from one file of the disk that all share.

Inductor and Triton keep some files for each kernel. Were they on the shared disk, thousands of ranks would open them
all at a start.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from src.runs.node_copy import DamagedCodeError, hold, home, make, one_by_one, packed, unpacked
from src.storage.atomic_write import atomic_write

# By the libraries' variables, folders of the cache. flash-attn-4's kernels go beside Inductor's.
FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
# Of processes that are at work.
_PASSING = (".lock", ".tmp", ".pid")


@dataclass(frozen=True)
class KernelCache:
    """`folder`: where this machine's ranks keep them; `archive`: what was kept of them for other machines, or None
    where the folder is on the shared disk itself.
    """

    folder: Path
    archive: Path | None

    @classmethod
    def on_node(cls, shared: Path, start: str) -> "KernelCache":
        """This machine's folder, with the kernels that `<shared>.kernels` holds if it has none yet; `shared` itself,
        with a warning, where this machine cannot hold them or may run nothing that lies on its own disk.

        `start`: a name of this start of the job, whose first process on a machine unpacks for all.
        """
        archive = shared.with_name(f"{shared.name}.kernels")
        try:
            folder = home() / "kernels" / shared.name
            if os.statvfs(home()).f_flag & os.ST_NOEXEC:
                raise PermissionError(f"{home()}: is mounted noexec")
            with one_by_one(folder, start) as first:
                with suppress(FileNotFoundError):
                    hold(folder)
                if first and not folder.is_dir():
                    make(folder, _archived(archive))
                    hold(folder)
        except OSError as error:
            print(f"warning: {error}: compiled kernels go to {shared} instead", file=sys.stderr)
            return cls(shared, None)
        return cls(folder, archive)

    def export(self) -> None:
        """To this process's environment, but for what the site has set."""
        for variable, name in FOLDERS.items():
            os.environ.setdefault(variable, str(self.folder / name))

    def keep(self) -> None:
        """Archive what is in the folder, where the archive lacks any of it. A failure is told, and ends nothing."""
        if self.archive is None:
            return
        try:
            found = dict(self._files())
            if not found.keys() <= _archived(self.archive).keys():
                self.archive.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self.archive, packed(found))
        except OSError as error:
            print(f"warning: {error}: other machines will compile their kernels again", file=sys.stderr)

    def _files(self) -> Iterator[tuple[str, bytes]]:
        for name in FOLDERS.values():
            for each in sorted((self.folder / name).rglob("*")):
                with suppress(FileNotFoundError):  # others are at work
                    if each.is_file() and not each.is_symlink() and not each.name.endswith(_PASSING):
                        yield str(each.relative_to(self.folder)), each.read_bytes()


def _archived(archive: Path) -> dict[str, bytes]:
    """Nothing of one that is not there, or damaged: its kernels are compiled again."""
    with suppress(FileNotFoundError, DamagedCodeError):
        return unpacked(archive.read_bytes())
    return {}
