"""Files that every rank may write for itself: `rank_<r>...` in a folder, or in one of its sub-folders of 1,024 ranks.

Some shared file systems lock a folder for each new name in it, so that 16,384 ranks that fail at once would wait for
each other.
"""

from pathlib import Path

RANKS = 1024  # in a folder


def folder_of(folder: Path, rank: int) -> Path:
    """Where this rank's files are: `folder` itself for the first 1,024."""
    first = rank // RANKS * RANKS
    return folder if first == 0 else folder / f"from_{first:05d}"


def found(folder: Path, suffix: str = "") -> dict[int, Path]:
    """By rank, in its order, the files `rank_<r><suffix>` that are there."""
    files = {
        int(rank): file
        for pattern in (f"rank_*{suffix}", f"from_*/rank_*{suffix}")
        for file in folder.glob(pattern)
        if (rank := file.name.removeprefix("rank_").removesuffix(suffix)).isdecimal()
    }
    return dict(sorted(files.items()))
