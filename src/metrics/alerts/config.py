"""The config section `alert`: what is told of a run while nobody looks, and to whom."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from src.config.base import Config, Line, one_or_more
from src.config.bounds import Count, CountFromZero, Seconds

Event = Literal["failed", "diverged", "stalled", "spike", "preempted", "finished", "straggler"]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        kind = "a URL holds a secret" if "//" in name else "it is no name of a variable"
        raise ValueError(f"{kind}; export ALERT_URL=https://... where the run is started, and pass the name: ALERT_URL")
    return name


Variable = Annotated[str, AfterValidator(_variable)]
Factor = Annotated[float, Field(gt=1.0, le=1e6)]
Share = Annotated[float, Field(ge=0.01, le=100.0)]
Deviations = Annotated[float, Field(gt=0.0, le=1e6)]


class Alerts(Config):
    webhook: Variable | None
    """Name of the environment variable that holds the URL to which alerts are posted; null: none."""
    form: Literal["slack", "json"]
    """Form of what is posted; slack: {"text": ...}; json: all facts."""
    command: Line | None
    """Command that is started for each alert, without a shell, with all facts as JSON on its input; null: none."""
    events: Annotated[tuple[Event, ...], BeforeValidator(one_or_more), Strict(strict=False)]
    """What is told."""
    stall_factor: Factor
    """No step for so many times the median interval between two lines of metrics is a stall."""
    stall_seconds: Seconds
    """Seconds that a stall lasts at least."""
    spike_deviations: Deviations
    """A loss so many standard deviations above the mean of the last 50 lines of metrics is a spike."""
    straggler_share: Share | None
    """How much longer than the median's a rank's own work takes, such as 0.1, to be slow; null: nobody measures it."""
    straggler_steps: Count
    """Steps in a row for which a rank, or a node, is slow before it is named."""
    preemptions: Count
    """Stops of a run within 24 hours that are too many."""
    retries: CountFromZero
    """Times that an alert which did not arrive is sent again, after 1, 2, 4 ... seconds."""
    timeout_seconds: Seconds
    """Seconds that the other side has to answer."""

    @property
    def wanted(self) -> bool:
        """Whether anybody is told anything."""
        return bool(self.events) and (self.webhook is not None or self.command is not None)

    def unheard(self, environment: Mapping[str, str]) -> list[str]:
        """A warning where the webhook's variable is not there."""
        if self.webhook is None or environment.get(self.webhook):
            return []
        return [f"alert.webhook={self.webhook}: the environment has no such variable, so nobody hears of this run"]
