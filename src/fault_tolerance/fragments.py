"""Fragments of a model and the steps at which each is exchanged. Arithmetic only."""

from dataclasses import dataclass

from src.distributed.pipeline.stages import even, modules

Modules = tuple[tuple[str, ...], ...]


def cut(n_layers: int, count: int, named: Modules | None) -> Modules:
    """Module names of each fragment: those `named`, else `count` fragments cut like pipeline stages. ValueError when
    impossible.
    """
    return named if named is not None else even(count, n_layers)


def problems(named: Modules, n_layers: int) -> list[str]:
    """Why the named modules are no fragments of a model of `n_layers`."""
    known, flat = modules(n_layers), [name for fragment in named for name in fragment]
    faults = {
        "missing": [name for name in known if name not in flat],
        "unknown": [name for name in flat if name not in known],
        "twice": sorted({name for name in flat if flat.count(name) > 1}),
    }
    found = [f"{fault} {', '.join(names)}" for fault, names in faults.items() if names]
    if not all(named):
        found.append("a fragment without a module")
    return found


@dataclass(frozen=True)
class Rounds:
    """When each of `fragments` parts is exchanged: one per interval, each once in `sync_steps` inner steps.

    After step n of an interval a fragment leaves; `delay` steps later what comes back is merged, and the next interval
    begins. Streaming DiLoCo, https://arxiv.org/abs/2501.18512, algorithm 2.
    """

    sync_steps: int
    fragments: int
    delay: int

    @property
    def interval(self) -> int:
        """Inner steps from one merge to the next."""
        return self.sync_steps // self.fragments

    def leaves(self, step: int) -> bool:
        """Whether a fragment is sent after this step, the first of which is 1."""
        return step > 0 and (step + self.delay) % self.interval == 0

    def arrives(self, step: int) -> bool:
        """Whether what was sent is merged after this step."""
        return step > 0 and step % self.interval == 0

    def problems(self) -> list[str]:
        """Illegal values of fragments and delay_steps: key, value, rule, nearest legal value."""
        found = []
        if self.sync_steps % self.fragments:
            lower = self.sync_steps // self.fragments * self.fragments
            nearest = f"{lower} or {lower + self.fragments}" if lower else f"{self.fragments}"
            found.append(
                f"fault_tolerance.sync_steps={self.sync_steps} is no multiple of its {self.fragments} fragments, which "
                f"are exchanged one at a time ({nearest} would do)"
            )
        elif self.delay >= self.interval:
            found.append(
                f"fault_tolerance.delay_steps={self.delay}: the next fragment leaves every {self.interval} steps "
                f"(sync_steps over fragments), before this one would be back; at most {self.interval - 1}"
            )
        return found
