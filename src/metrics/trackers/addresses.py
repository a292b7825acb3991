"""Where a tracker shows a run: it notes the address in the run folder once it knows it, and pages link to it."""

from pathlib import Path
from urllib.parse import urlsplit

from src.storage.json_lines import Lines

ADDRESSES_FILE = "trackers.jsonl"  # a line for each address of a tracker; the newest counts


def note_address(folder: Path, tracker: str, url: str) -> None:
    """Keep the address of this run's page, without what a URL may hold of a name and a password. OSError."""
    parts = urlsplit(url)
    plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if addresses(folder).get(tracker) != plain:
        Lines(folder / ADDRESSES_FILE).append({"tracker": tracker, "url": plain})


def addresses(folder: Path) -> dict[str, str]:
    """URL by tracker. Only of the web: a folder that somebody else has made may hold any text."""
    found = {}
    for line in Lines(folder / ADDRESSES_FILE).read():
        tracker, url = line.get("tracker"), line.get("url")
        if isinstance(tracker, str) and isinstance(url, str) and url.startswith(("https://", "http://")):
            found[tracker] = url
    return found
