"""fault_tolerance=local_sgd and diloco: groups take steps of their own and meet between rounds of them.

The samples of a step are divided over the groups of the last quorum, as in synchronous mode, but gradients stay in the
group. At the end of an interval one fragment of the model is exchanged; its merge is voted on, and where it fails the
fragment goes back to the outer weights and is the next one again. All groups of a meeting are at the same step: one
that is behind, or that voted otherwise than its peers, takes over the whole state of another.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from math import sqrt
from typing import Protocol

import torch
from torch import Tensor

from src.distributed.collectives import any_rank, limbs, of_limbs, world_sum
from src.distributed.model_stages import ModelStages
from src.distributed.process.rank_context import RankContext
from src.errors import SampleError
from src.fault_tolerance.fragments import Modules, Rounds
from src.fault_tolerance.mean import Exchange, Means, sent_bytes
from src.fault_tolerance.outer import Outer, Place, Rule
from src.fault_tolerance.replica_groups import StateCallbacks, Taken, Tree
from src.fault_tolerance.synchronous_groups import SynchronousGroups, SynchronousOptions
from src.fault_tolerance.table import HISTORY_BITS, Quorum, share

REFUSED = "the mean was not finite, or another rank refused it"


class LocalSGDOptions(SynchronousOptions, Protocol):
    """Interface of the config classes of local_sgd and diloco, for what differs between them."""

    @property
    def rounds(self) -> Rounds: ...
    @property
    def exchange(self) -> Exchange: ...
    @property
    def own_share(self) -> float: ...
    @property
    def copy_on(self) -> Place: ...
    def rule(self) -> Rule: ...
    def modules(self, n_layers: int) -> Modules: ...


class LocalSGDGroups(SynchronousGroups):
    def __init__(self, options: LocalSGDOptions, ranks: RankContext) -> None:
        super().__init__(options, ranks)
        self.method = options
        self.rounds = self.method.rounds
        self._outer: Outer | None = None
        self._means: Means | None = None
        self._sent = False  # a fragment, and it was not merged yet
        self._pending: Future[Tensor] | None = None
        self._met = False  # in this life
        self._copied = False  # the state is another group's, with no step of this one since
        self._loaded = False  # the outer weights, from a checkpoint or a peer
        self._others = 0  # tokens of the others that the loop does not know of
        self._taken: Taken | None = None  # since a fragment was sent last, in this life and state
        self._share, self._sharers = range(0), 0  # of the micro-batches of each step, and among how many groups
        self._sent_bytes, self._way = 0, 0.0  # of this rank in this life; norm of the last merge
        # What follows is of the run.
        self._at = 0  # steps that are done
        self._left = 0  # the step after which a fragment was sent last
        self._merged = self._failed = 0  # exchanges
        self._unshared = 0  # tokens of this group that the others do not know of

    def watch(self, network: ModelStages, refresh: Sequence[Callable[[], None]]) -> None:
        fragments = self.method.modules(network.stages[0].config.n_layers)
        self._outer = Outer(network, fragments, self.method.rule(), self.method.copy_on, refresh)

    @property
    def outer(self) -> Outer:
        assert self._outer is not None, "watch() comes first"
        return self._outer

    def tree(self) -> Tree:
        counts = {"at": self._at, "left": self._left, "merged": self._merged, "failed": self._failed}
        return {"outer": self.outer.tensors() | counts | {"unshared": self._unshared, "history": self._history}}

    def adopt(self, tree: Tree) -> None:
        self._taken = None
        if "outer" not in tree:  # the checkpoint is of a run without an outer optimizer
            return
        outer, self._loaded = tree["outer"], True
        self._at, self._left, self._merged = outer["at"], outer["left"], outer["merged"]
        self._failed, self._unshared, self._history = outer["failed"], outer["unshared"], outer["history"]

    def register(self, callbacks: StateCallbacks) -> None:
        super().register(callbacks)
        self._unshared = 0  # a checkpoint gave all groups the same count; what else was done since a meeting is lost
        if not self._loaded:
            self.outer.begin()

    def start_quorum(self, step: int, micro_batches: int) -> range | None:
        if not self._met:
            self._at = step
            if not self._gather():
                return None
            self._met = True
            self._exchange()
            if self._at != step:
                return None  # healed: there may be nothing left to do
        return self.summed(micro_batches)

    def summed(self, micro_batches: int) -> range:
        assert self._quorum is not None, "the groups have met"
        self._share = share(self._quorum.rank, self._quorum.size, micro_batches)
        self._sharers = self._quorum.size
        return self._share

    def allreduce(self, tensors: Sequence[Tensor]) -> None:
        """Gradients stay in the group."""

    def should_commit(self, finite: Tensor) -> bool:
        self.committed, self._copied, self._fresh = True, False, False
        return True

    def outer_step(self, step: int, tokens: int, taken: Taken) -> int:
        self._at, self._unshared = step, self._unshared + tokens
        before = self._taken or Taken(taken.samples[:0], 0)
        samples, total = range(before.samples.start, taken.samples.stop), before.checksum + taken.checksum
        self._taken = Taken(samples, total % 2**64)
        if self.rounds.leaves(step):
            while not self._gather():  # each time it waits for the others
                if self.gave_up:
                    return 0  # what is due is the next life's
        self._exchange()
        others, self._others = self._others, 0
        return others

    def _gather(self) -> bool:
        """Collective. A meeting, after which all groups have done the same steps; false: once more."""
        met = super().start_quorum(self._at, self.options.groups) is not None
        self._copied = self._copied or (self._quorum is not None and self._quorum.healed)
        self._led = self.leads if met else self._led
        return met

    def _exchange(self) -> None:
        """Collective. What is due after the steps that are done, as all groups of the meeting see it alike."""
        if self.rounds.leaves(self._at) and self._left < self._at:
            self._send()
        if self.rounds.arrives(self._at) and self._sent:
            self._merge()

    def conclude(self) -> int:
        """The mean over groups of their weights, one fragment after the other, where groups have been apart since they
        were exchanged: other fragments than the last one, and what was learned while that was on its way.
        """
        if not (self.rounds.fragments > 1 or self.rounds.delay or self.method.own_share):
            return 0
        last = self._at
        while (done := max(0, self._left - last)) < len(self.outer):  # further exchanges, as if after further steps
            if self._gather():
                self._average(done)
            elif self.gave_up:
                self._tell("stopped before the last exchange: groups end with weights of their own")
                break
        self._left = last
        others, self._others = self._others, 0
        return others

    def _average(self, fragment: int) -> None:
        """Collective. As an exchange: where it is refused, it comes again."""
        vector, contributors = self.outer.live(fragment), self._count()
        members, quorum = self.members, self._quorum
        assert quorum is not None, "the groups have met"
        if contributors:  # of copies alone there is nothing to add up
            if self._copied:
                vector.zero_()
            if quorum.size > 1:
                members.allreduce([vector])
            vector.div_(contributors)
        if members.vote(fine=bool(vector.isfinite().all())):
            self.outer.set(fragment, vector)
            self._left = self._at + fragment + 1
        else:
            self._failures += 1
            self._tell(f"fragment {fragment} could not be exchanged ({members.error or REFUSED}): once more")
        self._remember(quorum)

    def _send(self) -> None:
        """A group that took over another's state has learned nothing of its own: it does not count in the mean."""
        members, quorum = self.members, self._quorum
        assert quorum is not None, "the groups have met"
        vector = self.outer.outgoing(self._fragment)
        if self._copied:
            vector.zero_()
        if (contributors := self._count()) is not None:
            self._pending = self.means.start(vector, max(contributors, 1), members.group, quorum.size)
            self._sent_bytes += sent_bytes(vector.numel(), quorum.size, self.method.exchange)
        self._left, self._sent = self._at, True

    def _count(self) -> int | None:
        """Collective. How many groups have learned something since the last exchange; their tokens are added up and
        their samples audited. None: a group was lost.
        """
        members, quorum = self.members, self._quorum
        assert quorum is not None, "the groups have met"
        taken = (0.0, 0.0, 0.0) if self._taken is None else (1.0, *limbs(self._taken.checksum))
        cells = torch.tensor([1.0, self._unshared, *taken], dtype=torch.float64)
        if self._copied:
            cells.zero_()
        if quorum.size > 1:
            members.allreduce([cells])
        contributors = None
        if not any_rank(members.error is not None, torch.device("cpu")):
            contributors, tokens, sharers = (int(value) for value in cells[:3].tolist())
            self._audit(sharers, of_limbs(*cells[3:].tolist()))
            self._others += tokens - self._unshared
        self._unshared, self._taken = 0, None
        return contributors

    def _audit(self, sharers: int, found: int) -> None:
        """Whether the groups together took each sample since the last exchange once. Where not all of those that the
        samples were divided among are there (one died), nothing can be said.
        """
        if self._taken is None or sharers != self._sharers:
            return
        assert self._own is not None, "register() comes first"
        samples, right = self._taken.samples, self._own.checksum(self._taken.samples)
        if found != right:
            raise SampleError(
                f"steps up to {self._at} are of samples {samples.start} to {samples.stop - 1}, checksum {right:016x}; "
                f"the {sharers} groups took {found:016x}: group {self.group} took micro-batches {self._share.start} "
                f"to {self._share.stop - 1} of each step"
            )

    def _merge(self) -> None:
        mean, fragment, quorum = self._received(), self._fragment, self._quorum
        self._sent = False
        assert quorum is not None, "the groups have met"
        fine = mean is not None and bool(mean.isfinite().all())
        if self.members.vote(fine=fine):
            assert mean is not None, "without one the vote is no"
            squares = self.outer.merge(fragment, mean, self.method.own_share)
            self._way = sqrt(world_sum(torch.tensor(squares, device=self.ranks.device)).item())
            self._merged += 1
        else:
            self.outer.restore(fragment)
            self._failed, self._lost = self._failed + 1, self._lost + self.rounds.interval
            self._failures += 1
            why = self.members.error or REFUSED
            self._tell(f"fragment {fragment} could not be exchanged ({why}): it goes back to the outer weights")
        self._remember(quorum)

    def _remember(self, quorum: Quorum) -> None:
        """Make this exchange, and how it ended here, a part of the past that groups must share."""
        past = (self._history, quorum.id, quorum.size, self._at, self._left, self._merged)
        self._history = hash(past) % 2**HISTORY_BITS

    def _received(self) -> Tensor | None:
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        try:
            return pending.result()
        except (RuntimeError, OSError, TimeoutError, AssertionError) as error:
            self.members.fail(error)
            return None

    @property
    def _fragment(self) -> int:
        """The one that is exchanged next; after a failure, once more."""
        return self._merged % len(self.outer)

    @property
    def means(self) -> Means:
        if self._means is None:
            nccl = "nccl" in self.members.group.getBackendName()
            device = self.ranks.device if nccl else torch.device("cpu")
            self._means = Means(self.method.exchange, self.options.sum_seconds, device)
        return self._means

    def may_stop(self, asked: bool) -> bool:
        # What is on its way is in no checkpoint; it arrives a few steps later. What was to be sent is sent by the next
        # life: another group may have left already.
        return asked and not self._sent

    @property
    def saves(self) -> bool:
        return self.leads

    def metrics(self) -> Mapping[str, float]:
        sent = world_sum(torch.tensor(self._sent_bytes, dtype=torch.float64, device=self.ranks.device)).item()
        counts = {"outer/syncs": float(self._merged), "outer/failed_syncs": float(self._failed)}
        return {**super().metrics(), **counts, "outer/update_norm": self._way, "outer/sent_bytes": sent}

    def leave(self) -> None:
        if self._means is not None:
            self._means.close()
        super().leave()
