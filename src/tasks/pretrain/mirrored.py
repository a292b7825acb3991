"""How a run's mirror (`checkpoint.mirror`) begins, tells of itself and ends, on each rank."""

import time
from pathlib import Path

from src.checkpoint.host_group import HostGroup
from src.checkpoint.mirror import Copied, Mirror, bring_back
from src.run import Run
from src.train.report import Report
from src.train.stop import Stop

# Of the grace between a stop signal and the end: the save before may take half of it.
SHARE_OF_GRACE = 0.25
LOOK_SECONDS = 5.0  # between two words from rank 0 to the others, which no collective's timeout then ends
PATIENCE_SECONDS = 600.0  # at the end of a run, with a store that fails all the time


class Mirroring:
    """Collective, all of it, but for `tell`."""

    def __init__(self, run: Run, home: Path, stop: Stop, writer: str) -> None:
        """Brings back what the mirror has and this folder has not. `home`: of the whole run; `writer`: as a store's."""
        self._team, self._stop, self._grace_seconds = HostGroup(), stop, run.cluster.grace_seconds
        self._line = bring_back(home, run.checkpoint, self._team, writer=writer)
        self._failing = False
        self.mirror = Mirror(home, run.checkpoint, run.cache) if self._team.rank == 0 else None
        if self.mirror is not None:
            self.mirror.wake()  # an attempt before this one may have ended before its last copy did

    def tell(self, report: Report) -> None:
        """What has happened since the last time, on rank 0. A failure is told once until a copy arrives."""
        if self._line is not None:
            report.say(self._line)
            self._line = None
        for each in [] if self.mirror is None else self.mirror.news():
            if isinstance(each, Copied):
                self._failing = False
                costs = {"write_seconds": each.seconds, "bytes": each.bytes, "failures": each.failures}
                report.measure(each.step, {f"mirror/{key}": float(value) for key, value in costs.items()})
            else:
                report.trouble(each.step, "mirror", each.words)
                again = f"tried again in {each.again_seconds:.0f} s, training goes on (incidents.jsonl)"
                if not self._failing:
                    report.say(f"warning: step {each.step} is not in the mirror yet: {each.words}; {again}")
                self._failing = True

    def conclude(self, report: Report) -> None:
        """Wait for the last copies: after a stop for a part of the grace, else as long as some arrive."""
        until = time.monotonic() + SHARE_OF_GRACE * self._grace_seconds if self._stop.seen is not None else None
        told = False
        while (whole := self._team.on_rank_zero(lambda: self._arrived(until))) is None:
            if not told:
                report.say("waits for the last copy to checkpoint.mirror")
                told = True
            self.tell(report)
        self.tell(report)
        if not whole:
            report.say("warning: the last checkpoint is not in checkpoint.mirror yet; the same command copies it")
        if self.mirror is not None:
            self.mirror.close()

    def _arrived(self, until: float | None) -> bool | None:
        """Rank 0: whether all is there at last; None: that is to be seen. `until`: of a run that was told to stop."""
        assert self.mirror is not None, "rank 0 has it"
        wait = LOOK_SECONDS if until is None else min(LOOK_SECONDS, max(0.0, until - time.monotonic()))
        if self.mirror.finish(wait):
            return True
        over = self._stop.seen is not None if until is None else time.monotonic() >= until
        return False if over or self.mirror.failing_seconds > PATIENCE_SECONDS else None
