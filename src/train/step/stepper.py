"""One optimizer step: gradient accumulation over micro-batches, clipping, update; without a wait for the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.data.batches import Batch
from src.distributed.collectives import limbs, of_limbs, world_sum
from src.distributed.fsdp.gradient_norm import Gradients
from src.distributed.model_stages import ModelStages
from src.models.cross_entropy import IGNORED
from src.train.step.metrics import STEP_METRICS, AfterBackward, StepMetric


@dataclass(frozen=True)
class StepOutcome:
    """What one step did, once the host knows."""

    step: int
    metrics: dict[str, float]  # by the names of STEP_METRICS; loss in nats per valid token, grad_norm before clipping
    tokens: int  # valid labels of the step
    checksum: int  # of the samples of the step, see `SampleAudit`
    skipped: bool  # loss or norm not finite: nothing was updated
    dead: bool  # too many skipped in a row: nothing will be updated any more
    stop: bool  # some rank saw a signal

    @property
    def loss(self) -> float:
        return self.metrics["loss"]

    @property
    def grad_norm(self) -> float:
        return self.metrics["grad_norm"]


TOTALS = ("tokens", "checksum_low", "checksum_high")  # known before the backward pass
CONTROL = (*TOTALS, "skipped", "dead", "stop")  # what a step says of itself besides its metrics


class Stepper:
    """Computes steps and decides on the device whether each may update.

    A non-finite loss or norm anywhere leaves weights and moments untouched everywhere: the sum over the world that
    makes the norm carries it to every rank. After more than `skips` such steps in a row no later step updates either,
    so the host may learn of it a step late and nothing is lost.
    """

    captured_bytes = 0  # of device memory that a CUDA graph keeps for its replays

    def __init__(
        self,
        network: ModelStages,
        optimizer: Optimizer,
        max_norm: float | None,
        skips: int,
        after_update: Sequence[Callable[[], None]] = (),
        metrics: Sequence[StepMetric] = STEP_METRICS,
    ) -> None:
        """`after_update`: what follows from new weights, in order; collective."""
        self.network, self.optimizer, self.max_norm, self.skips = network, optimizer, max_norm, skips
        self.mesh, self.device, self.metrics = network.mesh, network.device, metrics
        names = [metric.name for metric in metrics]
        assert len({*names, *CONTROL}) == len(names) + len(CONTROL), f"a name twice: {names}, {CONTROL}"
        parameters = [parameter for _, parameter in network.named_parameters() if parameter.requires_grad]
        self.gradients = Gradients(parameters, self.mesh.world // self.mesh.degrees.pipeline)
        self.after_update = after_update
        self.limits: Tensor | None = None  # of loss and gradient norm, (2,) float64: beyond them a step does not update
        self.in_a_row = torch.zeros((), device=self.device)
        self.dead = torch.zeros((), device=self.device)

    def __call__(self, batches: Sequence[Batch], stop: bool) -> dict[str, Tensor]:
        """Collective. Metrics and CONTROL by name: 0-dim, on the device; see `StepOutcome`."""
        return self._step(batches, self._mine(batches), self._vote(stop))

    def set_limits(self, limits: tuple[float, float]) -> None:
        """Of loss and gradient norm in the next step."""
        if self.limits is None:
            self.limits = torch.empty(2, dtype=torch.float64, device=self.device)
        for place, limit in zip(self.limits.unbind(), limits, strict=True):  # a step may be a CUDA graph
            place.fill_(limit)

    def _step(self, batches: Sequence[Batch], mine: Tensor, vote: Tensor) -> dict[str, Tensor]:
        totals = self._totals(mine)
        loss = self._backward(batches, totals[0])
        return self._update(self._measure(batches, loss, totals[0], vote) | named(totals))

    def _vote(self, stop: bool) -> Tensor:
        """1.0 to stop; a tensor that were made from data would wait for the device."""
        return torch.full((), float(stop), device=self.device)

    def _backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Gradients of the mean over `tokens` labels; this rank's share of that mean."""
        scale = 1.0 / tokens.clamp(min=1)
        self.network.weigh_router_z_loss(scale)
        return self.network.backward(batches, scale)

    def _measure(self, batches: Sequence[Batch], loss: Tensor, tokens: Tensor, vote: Tensor) -> dict[str, Tensor]:
        """Collective: all metrics and the votes to stop in one sum."""
        now = AfterBackward(loss, tokens.clamp(min=1).float(), self.gradients, self.network, batches)
        *sums, votes = world_sum(torch.stack((*(metric.measure(now) for metric in self.metrics), vote))).unbind()
        pairs = zip(self.metrics, sums, strict=True)
        return {metric.name: metric.of_sum(total, self.mesh.world) for metric, total in pairs} | {"stop": votes}

    def _update(self, measured: dict[str, Tensor]) -> dict[str, Tensor]:
        skipped = self._decide(all_finite(measured))
        if self.max_norm is not None:  # divided as the optimizer reads them: one pass over all gradients less
            excess = self.gradients.excess(measured["grad_norm"], self.max_norm)
            self.optimizer.grad_scale = excess  # type: ignore[attr-defined]
        still = torch.maximum(skipped, self.dead)
        if self.limits is not None:
            beyond = torch.stack((measured["loss"], measured["grad_norm"])).double() > self.limits
            still = torch.maximum(still, beyond.any().float())
        self.optimizer.found_inf = still.to(self.gradients.device)  # type: ignore[attr-defined]  # where it works
        self.optimizer.step()
        self.optimizer.zero_grad()
        for part in self.network.stages:
            part.post_optimizer_step(self.mesh.sum_over_tokens, 1.0 - still)
        for act in self.after_update:
            act()
        return measured | {"skipped": skipped, "dead": self.dead}

    def _counters(self) -> list[Tensor]:
        """What all stages add up until the update."""
        return [counter for part in self.network.stages for counter in part.step_sums()]

    def _mine(self, batches: Sequence[Batch]) -> Tensor:
        """This rank's TOTALS, (3,) on the device: labels that count, and limbs of the checksum. All are whole numbers,
        which float64 holds exactly to 2^53.
        """
        count = torch.stack([(batch.labels != IGNORED).sum() for batch in batches]).sum()  # where the loader put them
        checksum = limbs(sum(batch.checksum for batch in batches) % 2**64)
        mine = torch.stack([count.double(), *(count.new_full((), limb, dtype=torch.float64) for limb in checksum)])
        return mine.to(self.device, non_blocking=True)

    def _totals(self, mine: Tensor) -> Tensor:
        """TOTALS over all ranks and micro-batches of the step: one all-reduce and one division for all three."""
        return world_sum(mine) / self.mesh.label_copies

    def _decide(self, finite: Tensor) -> Tensor:
        """1.0 when this step must not update; also remembers how many such steps came in a row."""
        skipped = (~finite).float()
        self.in_a_row.add_(1).mul_(skipped)  # in place: a step may be a CUDA graph, which keeps addresses
        self.dead.copy_(torch.maximum(self.dead, (self.in_a_row > self.skips).float()))
        return skipped


def named(totals: Tensor) -> dict[str, Tensor]:
    """TOTALS by name."""
    return dict(zip(TOTALS, totals.unbind(), strict=True))


def all_finite(measured: dict[str, Tensor]) -> Tensor:
    """0-dim, bool: whether a step with this loss and gradient norm may update."""
    return torch.isfinite(measured["loss"]) & torch.isfinite(measured["grad_norm"])


class Readback:
    """Outcomes one step late: the copy of step n is read while step n + 1 runs, so the device never waits for the
    host.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[int, tuple[str, ...], Tensor, torch.cuda.Event | None]] = []

    def push(self, step: int, outcome: Mapping[str, Tensor]) -> list[StepOutcome]:
        """Hand in a step's outcome; get those that can be read without a bubble (on the CPU: this one)."""
        names, values = tuple(outcome), torch.stack([value.double() for value in outcome.values()])
        if not values.is_cuda:
            return [_read(step, names, values)]
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        ready, self._waiting = self._waiting, [(step, names, copy, event)]
        return [self._wait(*entry) for entry in ready]

    def flush(self) -> list[StepOutcome]:
        """All outstanding outcomes; waits for the device."""
        ready, self._waiting = self._waiting, []
        return [self._wait(*entry) for entry in ready]

    @staticmethod
    def _wait(step: int, names: tuple[str, ...], values: Tensor, event: "torch.cuda.Event | None") -> StepOutcome:
        if event is not None:
            event.synchronize()
        return _read(step, names, values)


def _read(step: int, names: tuple[str, ...], values: Tensor) -> StepOutcome:
    told = dict(zip(names, values.tolist(), strict=True))
    tokens, low, high, skipped, dead, stop = (told.pop(name) for name in CONTROL)
    return StepOutcome(step, told, int(tokens), of_limbs(low, high), skipped > 0, dead > 0, stop > 0)
