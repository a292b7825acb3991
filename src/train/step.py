"""One optimizer step, from micro-batches to updated weights, without a wait for the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.data.batches import Batch
from src.distributed.collectives import world_sum
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.model_stages import Network
from src.fault_tolerance.peers import Peers
from src.models.cross_entropy import IGNORED


@dataclass(frozen=True)
class Outcome:
    """What one step did, once the host knows."""

    step: int
    loss: float  # nats per valid token of the whole step
    grad_norm: float  # before clipping
    tokens: int  # valid labels of the step
    skipped: bool  # loss or norm not finite: nothing was updated
    dead: bool  # too many skipped in a row: nothing will be updated any more
    stop: bool  # some rank saw a signal


class Stepper:
    """Computes steps and decides on the device whether each may update.

    A non-finite loss or norm anywhere leaves weights and moments untouched everywhere: the sum over the world that
    makes the norm carries it to every rank. After more than `skips` such steps in a row no later step updates either,
    so the host may learn of it a step late and nothing is lost.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        max_norm: float | None,
        skips: int,
        after_update: Sequence[Callable[[], None]] = (),
        peers: Peers | None = None,
    ) -> None:
        """`after_update`: what follows from new weights, in order; collective. `peers`: other groups of this run."""
        self.network, self.optimizer, self.max_norm, self.skips = network, optimizer, max_norm, skips
        self.mesh, self.device = network.mesh, network.device
        parameters = [parameter for _, parameter in network.named_parameters() if parameter.requires_grad]
        self.gradients = Gradients(parameters, self.mesh.world // self.mesh.degrees.pipeline)
        self.after_update, self.peers = after_update, peers or Peers()
        self.in_a_row = torch.zeros((), device=self.device)
        self.dead = torch.zeros((), device=self.device)

    def __call__(self, batches: Sequence[Batch], stop: bool) -> Tensor:
        """Collective. [loss, norm, tokens, skipped, dead, stop] on the device: see `Outcome`.

        Nothing has changed where `peers.counted` is false afterwards.
        """
        tokens = self.peers.total(self._valid_tokens(batches))
        loss = self.network.backward(batches, 1.0 / tokens.clamp(min=1))
        counters = [counter for part in self.network.parts for counter in part.counters()]
        self.peers.add([*self.gradients.local(), loss, *counters])
        vote = torch.full((), float(stop), device=self.device)  # a tensor made from data would wait for the device
        facts = torch.stack((self.gradients.squares().to(self.device), loss / self.mesh.loss_copies, vote))
        squares, loss, votes = world_sum(facts).unbind()
        norm = squares.sqrt()
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if not self.peers.agree(finite):
            self._forget(counters)
            return torch.stack((loss, norm, tokens.float(), torch.ones_like(loss), self.dead, votes)).double()
        skipped = self._decide(finite)
        if self.max_norm is not None:  # divided as the optimizer reads them: one pass over all gradients less
            self.optimizer.grad_scale = self.gradients.excess(norm, self.max_norm)  # type: ignore[attr-defined]
        still = torch.maximum(skipped, self.dead).to(self.gradients.device)  # where the optimizer works
        self.optimizer.found_inf = still  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in self.network.parts:
            part.after_step(self.mesh.sum_over_tokens, 1.0 - torch.maximum(skipped, self.dead))
        for act in self.after_update:
            act()
        return torch.stack((loss, norm, tokens.float(), skipped, self.dead, votes)).double()

    def _forget(self, counters: Sequence[Tensor]) -> None:
        self.optimizer.zero_grad()
        for counter in counters:
            counter.zero_()

    def _valid_tokens(self, batches: Sequence[Batch]) -> Tensor:
        """Labels that count, over all ranks and micro-batches of the step; float64 is exact to 2^53."""
        mine = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()  # where the loader put them
        count = mine.double().to(self.device, non_blocking=True)
        return world_sum(count) / self.mesh.label_copies

    def _decide(self, finite: Tensor) -> Tensor:
        """1.0 when this step must not update; also remembers how many such steps came in a row."""
        skipped = (~finite).float()
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.dead = torch.maximum(self.dead, (self.in_a_row > self.skips).float())
        return skipped


class Readback:
    """Outcomes one step late: the copy of step n is read while step n + 1 runs, so the device never waits for the
    host.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def push(self, step: int, outcome: Tensor) -> list[Outcome]:
        """Hand in a step's outcome; get those that can be read without a bubble (on the CPU: this one)."""
        if not outcome.is_cuda:
            return [_read(step, outcome)]
        copy = torch.empty(outcome.shape, dtype=outcome.dtype, pin_memory=True)
        copy.copy_(outcome, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        ready, self._waiting = self._waiting, [(step, copy, event)]
        return [self._wait(*entry) for entry in ready]

    def flush(self) -> list[Outcome]:
        """All outstanding outcomes; waits for the device."""
        ready, self._waiting = self._waiting, []
        return [self._wait(*entry) for entry in ready]

    @staticmethod
    def _wait(step: int, outcome: Tensor, event: "torch.cuda.Event | None") -> Outcome:
        if event is not None:
            event.synchronize()
        return _read(step, outcome)


def _read(step: int, outcome: Tensor) -> Outcome:
    loss, norm, tokens, skipped, dead, votes = outcome.tolist()
    return Outcome(step, loss, norm, int(tokens), skipped > 0, dead > 0, votes > 0)
