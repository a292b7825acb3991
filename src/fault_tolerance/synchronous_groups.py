"""fault_tolerance=torchft: each optimizer step is one of all groups that are there, as if they were one run.

A step's micro-batches are divided over the groups of its quorum, so the samples of a step follow from its position
alone. Gradients, loss and tokens are summed over groups before anything is decided; every group then takes the same
step. One that fails does not count for the groups that noticed: they meet again for the same samples, and a group that
fell behind another takes over its state.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from src.distributed.collectives import any_rank
from src.distributed.process.rank_context import RankContext, Replica
from src.fault_tolerance.membership import Membership, MembershipOptions
from src.fault_tolerance.replica_groups import ReplicaGroups, StateCallbacks, Tree
from src.fault_tolerance.table import HISTORY_BITS, Quorum, Row, Table, Tally, share

AGAIN_SECONDS = 0.2  # between two looks for a group that lives and is not there yet


class SynchronousOptions(MembershipOptions, Protocol):
    @property
    def groups(self) -> int: ...


class SynchronousGroups(ReplicaGroups):
    def __init__(self, options: SynchronousOptions, ranks: RankContext) -> None:
        self.options, self.ranks = options, ranks
        self.group = Replica.read().group
        self.leads = self.gave_up = False
        self.committed = True
        self.table = Table()
        self._membership: Membership | None = None
        self._quorum: Quorum | None = None
        self._own: StateCallbacks | None = None
        self._history = 0  # a number that groups share exactly when they have counted the same steps
        self._led = False  # the last step that counted
        self._leaving = self._stale = self._retried = False
        self._fresh = True  # no step counted since this process began, no state taken over
        self._awaited: set[int] = set()  # living groups without which a fresh one does not begin
        self._lost = 0  # steps of this group's work that did not count
        self._failures = 0  # votes that said no
        self._tally = Tally()

    def register(self, callbacks: StateCallbacks) -> None:
        def give() -> Tree:
            return {"run": callbacks.give(), "history": self._history, "tally": self._tally}

        def take(tree: Tree) -> None:
            callbacks.take(tree["run"])
            self._history, self._stale, self._fresh = tree["history"], False, False
            self._led = False  # not at the last step that counted: others know its numbers, and record them
            self._tally = tree["tally"]

        self._own = replace(callbacks, give=give, take=take)

    def recall(self, lost: int, failures: int) -> None:
        self._tally = Tally(over=(lost, failures))

    @property
    def members(self) -> Membership:
        """Connection to the other groups, made at the first quorum, so that nobody waits for a group that still
        loads.
        """
        if self._membership is None:
            self._membership = Membership(self.options, self.ranks, self._tell)
        return self._membership

    def start_quorum(self, step: int, micro_batches: int) -> range | None:
        assert self._own is not None, "register() comes first"
        members, before, began = self.members, self._quorum, time.perf_counter()
        # A group with another past than its peers is behind them, however many steps it has done.
        quorum = members.start_quorum(2 * step + (not self._stale), self._own)
        if quorum is None:
            self.gave_up = True
            return None
        self._quorum = quorum
        so_far = (self._lost, self._failures, members.heal_seconds)
        row = Row(
            self.group, self._led, self._leaving, self._history, *so_far, self._fresh, self._awaits(), quorum.healed
        )
        table = Table.exchange(row, quorum, lambda rows: members.allreduce(rows, self.options.heal_seconds))
        failed = any_rank(members.error is not None, torch.device("cpu"))
        if failed or table.split:
            self._stale = self._stale or (not failed and table.astray(row))
            self._vote(fine=False)
            return None
        if table.premature:
            time.sleep(AGAIN_SECONDS)
            self._vote(fine=False)
            self.gave_up = any_rank(self._own.stopped(), torch.device("cpu"))
            return None
        self.table, self.leads = table, table.leader() == self.group
        self._tally = self._tally.after(table.rows)
        if before is None or before.id != quorum.id:
            self._own.tell(self._described(quorum, time.perf_counter() - began))
        return share(quorum.rank, quorum.size, micro_batches)

    def _awaits(self) -> bool:
        """Collective in the group. Whether this group is fresh, and another lives that its quorum is without."""
        if not self._fresh:
            return False
        outside = self.members.outside()
        if outside - self._awaited:
            names = ", ".join(map(str, sorted(outside)))
            self._tell(f"does not begin without group {names}: it lives, and may be further than the newest checkpoint")
        self._awaited = outside
        return any_rank(bool(outside), torch.device("cpu"))

    def allreduce(self, tensors: Sequence[Tensor]) -> None:
        assert self._quorum is not None, "start_quorum() comes first"
        if self._quorum.size > 1:
            self.members.allreduce(tensors)

    def should_commit(self, finite: Tensor) -> bool:
        # A broken device makes numbers that are not finite as well as bad data do: the same samples are tried once
        # more before the run's own rule for such steps holds.
        fine = bool(finite) or self._retried
        if not fine:
            self._tell("this step was not finite: it is tried once more")
        counts = self._vote(fine=fine)
        self._retried = not fine and not counts
        self._lost += not counts
        return counts

    def _vote(self, *, fine: bool) -> bool:
        members, quorum = self.members, self._quorum
        assert quorum is not None, "start_quorum() comes first"
        self.committed = members.vote(fine=fine)
        if self.committed:
            self._history = hash((self._history, quorum.id, quorum.size)) % 2**HISTORY_BITS
            self._led, self._fresh = self.leads, False
            return True
        self._failures += 1
        if members.error is not None:
            self._tell(f"this step did not count ({_short(members.error)}): the groups meet again")
        return False

    def may_stop(self, asked: bool) -> bool:
        # One step later than asked: a signal to all groups reaches them within a step of each other, and the last ones
        # must know whether somebody stays who has the state.
        told, self._leaving = self._leaving, self._leaving or asked
        return told

    @property
    def saves(self) -> bool:
        if self.gave_up:  # those that were leaving have left
            return self.table.heir() == self.group
        return self.leads and (not self._leaving or self.table.all_leave)

    def metrics(self) -> Mapping[str, float]:
        assert self._quorum is not None
        found = {"groups/participants": float(len(self.table.rows)), "groups/quorum": float(self._quorum.id)}
        found["groups/lost_steps"] = float(self._tally.lost)
        found["groups/commit_failures"] = float(self._tally.failures)
        for row in self.table.rows:
            found[f"group_{row.group}/lost_steps"] = float(row.lost)
            found[f"group_{row.group}/commit_failures"] = float(row.failures)
            found[f"group_{row.group}/heal_seconds"] = row.heal_seconds
        return found

    def _described(self, quorum: Quorum, seconds: float) -> str:
        there = ", ".join(str(row.group) for row in self.table.rows)
        healed = f"; healed in {self.members.heal_seconds:.1f} s" if quorum.healed else ""
        return f"quorum {quorum.id}: groups {there} of {self.options.groups}, met in {seconds:.1f} s{healed}"

    def _tell(self, text: str) -> None:
        assert self._own is not None, "register() comes first"
        self._own.tell(text)

    def leave(self) -> None:
        if self._membership is not None:
            self._membership.leave()


def _short(error: Exception) -> str:
    """Its first line, without the places in gloo's sources that each layer has put before it."""
    text = re.sub(r"\[[^\]\s]*\.(cc|cpp|h):\d+\]\s*", "", str(error)).partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:240]
