"""Python imports this at its start, where PYTHONPATH leads here."""

import warm_client  # noqa: F401
