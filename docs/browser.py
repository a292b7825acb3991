"""The browser of this machine, for pictures of pages and for tests of them."""

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str | None:
    """Its path, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)
