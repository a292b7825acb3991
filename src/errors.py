"""Exceptions that a user can cause (exit code 2, no traceback), and how they list names.

`launch.py` prints the problems of a `UserError` and exits with its code. Any other exception is a bug and keeps its
traceback. What one function of this project guarantees to another is an `assert`.
"""

import os
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import ClassVar, Self


class UserError(Exception):
    """One or more things that the user can put right; each problem names the key, the value, the rule and a way out."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        assert self.problems, "an error without a problem"
        super().__init__("\n".join(self.problems))

    def __str__(self) -> str:
        return "\n".join(self.problems)  # also of those that are OSErrors, too

    def __reduce__(self) -> tuple[type["UserError"], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)  # crosses process borders with its list intact


class ConfigError(UserError):
    """A key, a type or a section of the composed config is wrong."""


class PlanError(UserError):
    """Each section is right by itself, but together they cannot run."""


class FolderError(UserError):
    """The run folder belongs to another run, or cannot be written."""


class DataError(UserError):
    """The text, the tokenizer or the token shards cannot feed this run."""


class CheckpointError(UserError):
    """A checkpoint is incomplete, corrupted, foreign or does not fit the model."""


class DiskFullError(UserError, OSError):
    """A write found no room. The newest complete state is kept, and the same command goes on once there is some.

    Also an OSError, so that whoever can do without the file needs no other word for it.
    """

    exit_code = 74  # sysexits' "input/output error": nothing is wrong with the command

    @classmethod
    def at(cls, path: Path, number: int, free: int | None, needed: int | None) -> Self:
        """`number`: of the system's error; `free`, `needed`: bytes where somebody knows them."""
        facts = [f"{free:,} bytes are free"] if free is not None else []
        facts += [f"{needed:,} are needed"] if needed is not None else []
        error = cls(f"{path}: {'; '.join(filter(None, (os.strerror(number).lower(), ', '.join(facts))))}")
        error.errno = number
        return error


class DiskFaultError(UserError, OSError):
    """A file system kept failing with what passes by itself, for as long as it was waited for.

    Also an OSError, so that whoever can do without the file needs no other word for it.
    """

    exit_code = 75  # sysexits' "temporary failure": the same command goes on once the disk answers

    @classmethod
    def at(cls, path: Path | None, number: int, waited: float) -> Self:
        """`number`: of the system's error; `waited`: seconds."""
        what = "the file system" if path is None else str(path)
        error = cls(f"{what}: {os.strerror(number).lower()}, still after {waited:.0f} s of trying again")
        error.errno = number
        return error


class UnusableFileError(UserError, OSError):
    """A file that this project keeps is there and cannot be opened or replaced: rights, or a folder of its name.

    Also an OSError, so that whoever can do without the file needs no other word for it.
    """


class RemoteError(UserError, OSError):
    """A store at a URL is not there, cannot be reached, has no driver here, or did not take what it was sent.

    Also an OSError: it is to a URL what that is to a path.
    """


class DivergedError(UserError):
    """Loss or gradients stopped being finite; the weights are still those of the last good step."""


class SampleError(Exception):
    """The ranks of a step did not take its samples, each once: a fault of this code or of a machine, no user's."""


class VerdictError(UserError):
    """Nothing is wrong with the question: the answer is no."""

    exit_code = 1


def some(names: Iterable[str], most: int = 6) -> str:
    """Names for an error: the first few, and how many more there are."""
    every = sorted(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def divisors(value: int, asked: int) -> str:
    """In words, what divides `value`: all of them when they are few, the four nearest to `asked` otherwise."""
    small = [candidate for candidate in range(1, isqrt(value) + 1) if value % candidate == 0]
    all_of_them = sorted({*small, *(value // each for each in small)})
    nearest = all_of_them if len(all_of_them) <= 8 else sorted(all_of_them, key=lambda one: abs(one - asked))[:4]
    words = [str(one) for one in sorted(nearest)]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))) + (" do" if len(words) > 1 else " does")
