"""Tokens per second and what share of the device's arithmetic they are, in both conventions."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Dense bfloat16 flop/s of the datasheets, without sparsity. The first match counts.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bG?H200\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bG?B200\b", 2.25e15),
    (r"\bA100\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bMI300X\b", 1300e12),
    (r"\bMI325X\b", 1300e12),
    (r"\bMI355X\b", 2500e12),
    (r"\bMI250X\b", 191.5e12),  # per die
)


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s that an MFU is relative to; `label` belongs beside every MFU that is shown."""

    flops_per_second: float
    label: str


def peak_flops(device_name: str, precision: str) -> Peak | None:
    """The datasheet's peak of a device for an MFU; None, with a warning, where no number would be honest."""
    for pattern, flops in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            label = f"{flops / 1e12:g} TFLOP/s bfloat16 dense, {device_name}"
            if precision != "bfloat16":
                label = f"{precision} work against {label}"
            return Peak(flops, label)
    logger.warning("MFU is not shown: the peak of '%s' is not known", device_name)
    return None


class Throughput:
    """Counts since the last report; `restart` leaves out what is not training, such as a validation."""

    def __init__(
        self,
        *,
        devices: int,
        flops_per_token: float,
        flops_per_token_causal: float,
        peak: Peak | None,
        predicted: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`predicted`: tokens per second of one device, as the plan says; None: it does not know the device."""
        self._devices = devices
        self._flops = {"full": flops_per_token, "causal": flops_per_token_causal}
        self._peak = peak
        self._predicted = predicted
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._started = self._clock()
        self._steps = 0
        self._tokens = 0
        self._data_seconds = 0.0

    def step(self, tokens: int, data_seconds: float) -> None:
        """Count one optimizer step: tokens of all ranks, and the seconds that it waited for data."""
        self._steps += 1
        self._tokens += tokens
        self._data_seconds += data_seconds

    def report(self) -> dict[str, float]:
        """Per step and per device since the last report, with the device idle: call it after a wait for the loss."""
        assert self._steps > 0, "a report without a step"
        seconds = self._clock() - self._started
        rate = self._tokens / seconds / self._devices
        values = {
            "tokens_per_second": rate,
            "step_seconds": seconds / self._steps,
            "data_seconds": self._data_seconds / self._steps,
        }
        for convention, flops in self._flops.items():
            values[f"tflops_{convention}"] = rate * flops / 1e12
            if self._peak is not None:
                values[f"mfu_{convention}_percent"] = 100.0 * rate * flops / self._peak.flops_per_second
        if self._predicted is not None:
            values["throughput/predicted_ratio"] = rate / self._predicted
        self.restart()
        return values
