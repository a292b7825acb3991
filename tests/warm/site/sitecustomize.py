"""Python imports this at its start, where PYTHONPATH leads here."""

import warm_client  # type: ignore[import-not-found]  # noqa: F401
