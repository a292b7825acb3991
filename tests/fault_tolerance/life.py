"""The life of a rank of a replica group, with the troubles that a test sends it and an account of what it did."""

import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from src.cluster.rank import RankJob, run_rank
from src.fault_tolerance.membership import Membership
from src.train.loop import Loop
from src.train.replicated.step import ReplicatedStepper


@dataclass(frozen=True)
class Trouble:
    """What happens to a group at one of its steps: to be called in the middle of it, or while it heals."""

    at: int  # step that is being computed, counted from 1
    # kill; nan; hold, until Fleet.go(at); deny: votes no, alone; killed while it heals (heal) or another does (give)
    kind: str


@dataclass(frozen=True)
class Seat:
    """Which rank of its group."""

    rank: int
    world: int
    port: int  # of the store in which they find each other

    def environment(self) -> dict[str, str]:
        facts = {"RANK": self.rank, "LOCAL_RANK": self.rank, "WORLD_SIZE": self.world, "MASTER_PORT": self.port}
        names = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return names | {key: str(value) for key, value in facts.items()}


def live(folder: Path, group: int, lighthouse: str, troubles: Sequence[Trouble], seat: Seat) -> None:
    """From start to end, as a process of its own."""
    os.environ |= {"REPLICA_GROUP_ID": str(group), "TORCHFT_LIGHTHOUSE": lighthouse} | seat.environment()
    log = os.open(folder / "life.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    life = Life(folder, seat.rank, troubles)
    with (
        patch.object(ReplicatedStepper, "__call__", lambda *args, **kwargs: life.step_of(*args, **kwargs)),
        patch.object(Loop, "run", lambda loop: life.run(loop)),
        patch.object(Membership, "_fetch", lambda *args: life.fetch(*args)),
        patch.object(Membership, "_give", lambda *args: life.give(*args)),
        patch.object(Membership, "vote", lambda members, fine: life.vote(members, fine)),
    ):
        run_rank(RankJob(folder, None))
    os._exit(0)


class Life:
    def __init__(self, folder: Path, rank: int, troubles: Sequence[Trouble]) -> None:
        self._folder, self._rank, self._troubles = folder, rank, list(troubles)
        self._compute, self._run, self._fetch = ReplicatedStepper.__call__, Loop.run, Membership._fetch
        self._give, self._vote = Membership._give, Membership.vote

    def note(self, **facts: Any) -> None:
        """A line of the account, which a kill cannot take back."""
        with (self._folder / f"account_{self._rank}.jsonl").open("a") as file:
            file.write(json.dumps(facts) + "\n")

    @property
    def step(self) -> int:
        """The one that is being computed."""
        return self._loop.training.state.step + 1

    def run(self, loop: Loop) -> bool:
        self._loop, state = loop, loop.training.state
        finished = self._run(loop)
        weights = digest(loop.training.network)
        self.note(end=state.step, position=state.position, tokens=state.tokens, weights=weights)
        return finished

    def step_of(self, stepper: ReplicatedStepper, batches: Any, stop: bool) -> dict[str, Tensor]:
        quorum = stepper.groups._quorum.id  # type: ignore[attr-defined]
        self.note(quorum=quorum, offered=[sample for batch in batches for sample in batch.samples], step=self.step)
        backward = stepper.network.backward
        with patch.object(stepper.network, "backward", lambda *args: backward(*args) + self._befall()):
            outcome = self._compute(stepper, batches, stop)
        if stepper.groups.committed:
            self.note(quorum=quorum, counted=self.step, loss=outcome["loss"].item())
        return outcome

    def fetch(self, members: Membership, answer: Any) -> Any:
        if any(trouble.kind == "heal" for trouble in self._troubles):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._fetch(members, answer)

    def give(self, members: Membership, answer: Any, own: Any) -> None:
        if any(trouble.kind == "give" and trouble.at <= self.step for trouble in self._troubles):
            os.kill(os.getpid(), signal.SIGKILL)
        self._give(members, answer, own)

    def vote(self, members: Membership, fine: bool) -> bool:
        denied = any(trouble == Trouble(self.step, "deny") for trouble in self._troubles)
        return self._vote(members, fine=fine and not denied)

    def _befall(self) -> float:
        """Each trouble comes once; returns what is added to the loss."""
        added = 0.0
        for trouble in [each for each in self._troubles if each.at == self.step]:
            if trouble.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            while trouble.kind == "hold" and not (self._folder.parents[1] / f"go_{trouble.at}").exists():
                time.sleep(0.01)
            if trouble.kind == "nan":
                self._troubles.remove(trouble)
                added = float("nan")
        return added


def digest(network: Any) -> str:
    """Of every bit of the weights."""
    total = sha256()
    for name, tensor in sorted(network.tensors().items()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        total.update(name.encode() + local.detach().contiguous().numpy().tobytes())
    return total.hexdigest()
