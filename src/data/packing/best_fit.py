"""Documents into rows: each goes where it leaves the least room (best fit decreasing; Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830).

Pure functions of where documents begin and end. Only a document that is longer than a row is cut.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Signed = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """Documents, and the parts of those that are longer than a row; each array has an entry for each."""

    starts: Signed  # in the stream
    lengths: Signed  # tokens
    begun: Flags  # whether it can begin a row without a mark in front of it
    ended: Flags  # whether another document may follow it in its row
    overlaps: Flags  # whether its first token is the last one of the part before it


def cut_to_fit(starts: Signed, stops: Signed, begun: Flags, ended: Flags, seq_len: int, *, marks: bool) -> Pieces:
    """Documents [start, stop), of which those that fit no row become several pieces.

    A row holds `seq_len` + 1 tokens: all but the first are predicted. With `marks`, one of them is a mark in front of
    a piece that is not `begun`, and parts of a document do not overlap; without, each begins with the last token of the
    one before it. So every token of a document but its first is predicted once.
    """
    room = seq_len + 1 - (marks & ~begun).astype(np.int64)
    long = stops - starts > room
    found = [(starts[~long], stops[~long], begun[~long], ended[~long], np.zeros(int((~long).sum()), bool))]
    for start, stop, first, mark, end in zip(
        starts[long], stops[long], room[long], begun[long], ended[long], strict=True
    ):
        at = np.arange(start + first - (not marks), stop - (not marks), seq_len, dtype=np.int64)
        ends = np.minimum(at + seq_len + (not marks), stop)
        number = np.arange(len(at) + 1)
        found.append(
            (
                np.concatenate([[start], at]),
                np.concatenate([[start + first], ends]),
                np.where(number == 0, mark, not marks),
                (number == len(at)) & end,
                (number > 0) & (not marks),
            )
        )
    begins, finishes, marked, closed, overlaps = (np.concatenate(column) for column in zip(*found, strict=True))
    return Pieces(begins, finishes - begins, marked, closed, overlaps)


def best_fit(pieces: Pieces, seq_len: int, *, marks: bool) -> list[list[int]]:
    """Rows as numbers of pieces, in the order in which they stand in the row.

    The longest piece that waits is next; it goes into the row with the least room that is enough, else into a new one.
    Rooms are numbers up to `seq_len`, so a list of those that occur is all that is searched: 2 us for a document.
    """
    rows: list[list[int]] = []
    waiting: dict[int, list[int]] = {}  # room -> rows that have it
    rooms: list[int] = []  # keys of `waiting`, sorted
    lengths, begun, ended = pieces.lengths.tolist(), pieces.begun.tolist(), pieces.ended.tolist()
    for piece in np.argsort(-pieces.lengths, kind="stable").tolist():
        length = lengths[piece]
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[at]
            rows[row].append(piece)
        else:
            room, row = seq_len + 1 - (marks and not begun[piece]), len(rows)
            rows.append([piece])
        left = room - length
        if left > 1 and ended[piece]:
            if left not in waiting:
                insort(rooms, left)
            waiting.setdefault(left, []).append(row)
    return rows


def laid_out(pieces: Pieces, rows: list[list[int]]) -> Signed:
    """(pieces, 2): start and length of each as it stands in its row, one row after the other.

    A part that follows another document in its row does without the token that it has in common with the part before.
    """
    order = np.array([piece for row in rows for piece in row], np.int64)
    first = np.zeros(len(order), bool)
    first[np.cumsum([0, *(len(row) for row in rows[:-1])])] = True
    twice = (pieces.overlaps[order] & ~first).astype(np.int64)
    return np.stack([pieces.starts[order] + twice, pieces.lengths[order] - twice], axis=1)
