"""The base of every object that a config section names with `_target_`."""

import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict

from src.config.bounds import CountFromZero

LONGEST_NAME_BYTES = 255  # of a file on every file system of Linux
LONGEST_PATH_BYTES = 4095


class Config(BaseModel):
    """Frozen and strict: unknown keys, text where a number belongs and `true` for 1 are errors, not guesses.

    Constructing one opens no file, reads no environment (but for whose home a ~ is) and joins no process group, so that
    building every section on the login node is the check. Defaults live in conf/ only: fields have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def printable(text: str) -> str:
    """ValueError for a text that cannot stand in one line of a script, a log or a file's name."""
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Zl", "Zp"):
            raise ValueError(f"{text!r} holds a line break or another control character, {letter!r}; leave it out")
        if unicodedata.category(letter) == "Cs":
            raise ValueError(f"{text!r} is not UTF-8; give it a name that is")
    return text


def path_text(value: Any) -> Any:
    """The value itself; ValueError for a string that no file system takes. Other types are told elsewhere."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError(f"{value!r} is empty; it must name a file or folder")
    printable(value)
    longest = max(len(part.encode()) for part in value.split("/"))
    if longest > LONGEST_NAME_BYTES or len(value.encode()) > LONGEST_PATH_BYTES:
        raise ValueError(
            f"{value[:40]!r}... is too long: at most {LONGEST_NAME_BYTES} bytes between two / and "
            f"{LONGEST_PATH_BYTES} in all"
        )
    return value


def _path_here(value: Any) -> Any:
    """As `path_text`; ValueError also for a URL, of which a Path makes a folder here."""
    if isinstance(value, str) and "://" in value:
        raise ValueError(f"{value!r} is a URL, where a path of this machine belongs; checkpoint.mirror takes URLs")
    return path_text(value)


def _at_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r}: {path.parts[0]} is nobody's home; write the whole path") from error


def url_text(text: str) -> str:
    """The value itself; ValueError for what names no place behind a scheme, or holds a password."""
    scheme, mark, rest = printable(text).partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) or not rest.strip("/"):
        raise ValueError(f"{text!r} is no URL of a folder; such as s3://bucket/runs, gs://bucket/runs or file:///disk2")
    if ":" in rest.partition("/")[0].rpartition("@")[0]:
        raise ValueError(f"{scheme}://... holds a password, and configs are kept; leave it to the environment")
    if "::" in rest:
        raise ValueError(f"{text!r} chains file systems by ::, which is not read; name what is in one store")
    return text


def path_or_url(text: str) -> str:
    """The value itself; ValueError for a URL that is none."""
    return url_text(text) if "://" in text else text


def _url(text: str) -> str:
    """As `url_text`; ValueError also for a pattern."""
    if any(letter in url_text(text) for letter in "?#*[]"):
        raise ValueError(f"{text!r} holds one of ? # * [ ]; a folder's URL has none")
    return text


def one_or_more(value: object) -> object:
    """What a list takes: one word by itself is a list of one, as `cluster.after=runs/first`."""
    return (value,) if isinstance(value, str) else value


def _line(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is empty; give it some text, or null")
    return printable(text)


# YAML has no paths and no tuples; these are the only coercions.
PathField = Annotated[Path, BeforeValidator(_path_here), AfterValidator(_at_home), Strict(strict=False)]
Place = Annotated[str, AfterValidator(path_text)]  # a path, or hf:<hub id>
Url = Annotated[str, AfterValidator(_url)]  # of a folder elsewhere
Line = Annotated[str, AfterValidator(_line)]  # a word or several for a command, a script or a service
Names = Annotated[tuple[str, ...], BeforeValidator(one_or_more), Strict(strict=False)]
RankNumbers = Annotated[tuple[CountFromZero, ...], Strict(strict=False)]
