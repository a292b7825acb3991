"""Folders at a URL, through fsspec: s3://, gs://, hdfs://, and whatever else there is a driver for.

Files go there and come back whole; nobody writes into the middle of one. fsspec and the driver are imported when a URL
is opened, so who names none needs neither. Keys and endpoints are the driver's own business: environment and files of
the cloud's tools, never a config.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from src.errors import RemoteError

T = TypeVar("T")

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# What pip installs for a scheme, where its name does not say so.
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
}
BUCKETS = ("s3", "s3a", "gs", "gcs")  # schemes of stores in which a bucket is made beforehand
# Under which of these a driver keeps what changes with a file's content: a digest, or else a time.
STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")
TRIES = 5  # of one request, beside those that the driver makes itself
LONGEST_WAIT_SECONDS = 60.0


def is_url(text: str) -> bool:
    """Whether this is the URL of a store, and no path."""
    return SCHEME.match(text) is not None


def below(url: str, *names: str) -> str:
    """The URL of what lies in a folder at a URL."""
    return "/".join((url.rstrip("/"), *names))


def patiently(action: Callable[[], T], *, tries: int = TRIES, sleep: Callable[[float], None] = time.sleep) -> T:
    """What `action` gives, tried again after 1, 2, 4 ... seconds; the RemoteError of the last try. What is not there is
    not asked for again.
    """
    for number in range(tries - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except RemoteError:
            sleep(min(2.0**number, LONGEST_WAIT_SECONDS))
    return action()


@dataclass(frozen=True)
class RemoteEntry:
    """Of a folder elsewhere. `size`: bytes, where the driver knows them; `stamp`: changes with the content; empty: the
    driver has none.
    """

    name: str
    folder: bool
    size: int | None
    stamp: str

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "RemoteEntry":
        """Of what fsspec says of it."""
        stamp = next((str(facts[key]) for key in STAMPS if facts.get(key)), "")
        name = facts["name"].rstrip("/").rpartition("/")[2]
        return cls(name, facts["type"] == "directory", facts.get("size"), stamp)


class RemoteFolder:
    """A folder at a URL. Names are relative to it, with / between parts. Every method raises RemoteError, with the URL
    and the driver's words, and FileNotFoundError for what is not there. Safe for several threads.
    """

    def __init__(self, url: str, key: str = "") -> None:
        """RemoteError where there is no driver for the URL. `key`: of the config, for errors."""
        found = SCHEME.match(url)
        assert found, f"{url} is no URL"
        self.url, self._scheme, self._key = url.rstrip("/"), found[1].lower(), key
        self._driver = self._imported()

    def folder(self, *names: str) -> "RemoteFolder":
        """One in it, whether it is there or not."""
        return RemoteFolder(below(self.url, *names), self._key)

    def names(self) -> list[str]:
        """Of what lies in it, sorted; none where it is not there."""
        with suppress(FileNotFoundError):
            return [each.name for each in self.entries("")]
        return []

    def sizes(self, name: str = "") -> dict[str, int]:
        """Bytes of each file in a folder in it, not below; none where it is not there."""
        with suppress(FileNotFoundError):
            entries = [each for each in self._listed(name) if each["type"] == "file"]
            return {each["name"].rpartition("/")[2]: int(each["size"] or 0) for each in entries}
        return {}

    def entries(self, name: str) -> list[RemoteEntry]:
        """Of what lies in a folder in it, sorted by name."""
        return sorted(map(RemoteEntry.of, self._listed(name)), key=lambda each: each.name)

    def entry(self, name: str) -> RemoteEntry:
        """Of a file or a folder in it."""
        with self._asking(name):
            self._files.invalidate_cache()
            return RemoteEntry.of(self._files.info(self._path(name)))

    def read(self, name: str) -> bytes:
        """A small file as a whole."""
        with self._asking(name):
            content: bytes = self._files.cat_file(self._path(name))
        return content

    def send(self, local: Path, name: str) -> None:
        """Copy a file there, over what there is. On object stores it has all of it or is not there; elsewhere it may
        be cut short.
        """
        content_bytes = local.stat().st_size  # FileNotFoundError that is ours, not the store's
        with self._asking(name):
            try:
                self._files.put_file(str(local), self._path(name))
                arrived = self._files.info(self._path(name))["size"]
            except FileNotFoundError as error:
                if not local.exists():
                    raise
                raise RemoteError(f"{self._told(name)}: its bucket or folder is not there") from error
        if arrived != content_bytes:
            raise RemoteError(f"{self._told(name)}: {arrived:,} bytes arrived where {content_bytes:,} were sent")

    def fetch(self, name: str, local: Path) -> None:
        """Copy a file here, over what there is."""
        with self._asking(name):
            self._files.get_file(self._path(name), str(local))

    def remove(self, name: str) -> None:
        """A file or a folder with all below it, if it is there."""
        with suppress(FileNotFoundError), self._asking(name):
            self._files.invalidate_cache()
            self._files.rm(self._path(name), recursive=True)

    def reach(self) -> None:
        """RemoteError unless the store answers; the folder need not be there, but its bucket must."""
        with self._asking(""):
            self._files.invalidate_cache()
            if self._scheme not in BUCKETS:
                self._files.exists(self._path(""))
                return
            bucket = self._path("").split("/")[0]
            try:
                self._files.ls(bucket)
            except FileNotFoundError:
                raise RemoteError(f"{self._told('')}: there is no bucket {bucket}; make it, or name another") from None

    def send_all(self, local: Path, last: str) -> None:
        """Copy all files of a folder here, over an earlier one; the file `last` goes first and comes last, so that who
        finds it finds all of them.
        """
        names = [path.relative_to(local).as_posix() for path in sorted(local.rglob("*")) if path.is_file()]
        patiently(partial(self.remove, last))
        for name in (each for each in names if each != last):
            patiently(partial(self.send, local / name, name))
        for name in set(self.names()) - {each.partition("/")[0] for each in names}:
            patiently(partial(self.remove, name))
        patiently(partial(self.send, local / last, last))

    def _listed(self, name: str) -> list[dict[str, Any]]:
        with self._asking(name):
            self._files.invalidate_cache()
            path = self._path(name)
            entries: list[dict[str, Any]] = self._files.ls(path, detail=True)
        # Object stores list a folder's own name, where somebody has made one, among what is in it.
        return [each for each in entries if each["name"].strip("/") != path.strip("/")]

    def _path(self, name: str) -> str:
        root: str = self._driver._strip_protocol(self.url)
        return f"{root.rstrip('/')}/{name}".rstrip("/") if name else root

    def _told(self, name: str) -> str:
        place = below(self.url, name) if name else self.url
        return f"{self._key}={place}" if self._key else place

    def _imported(self) -> Any:
        try:
            from fsspec import get_filesystem_class
        except ImportError:
            raise RemoteError(f"{self._told('')}: needs fsspec; pip install fsspec") from None
        try:
            return get_filesystem_class(self._scheme)
        except ValueError:
            from fsspec.registry import known_implementations

            near = [each for each in ("s3", "gs", "hdfs", "az", "file") if each in known_implementations]
            told = f"fsspec knows no {self._scheme}://; among others it knows {', '.join(near)}"
            raise RemoteError(f"{self._told('')}: {told}") from None
        except ImportError as error:
            package = PACKAGES.get(self._scheme)
            way_out = f"pip install {package}" if package else str(error)
            raise RemoteError(f"{self._told('')}: {self._scheme}:// needs a package more; {way_out}") from None

    @cached_property
    def _files(self) -> Any:
        from fsspec.core import url_to_fs

        made = {"auto_mkdir": True} if self._scheme in ("file", "local") else {}
        with self._asking(""):
            return url_to_fs(self.url, **made)[0]

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        """Drivers raise what their libraries do: names, credentials and timeouts are of a dozen classes."""
        try:
            yield
        except (FileNotFoundError, RemoteError):
            raise
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise RemoteError(f"{self._told(name)}: {type(error).__name__}: {words}") from error
