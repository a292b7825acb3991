"""A dashboard for wandb, made by its own library: `python -m src.metrics.trackers.dashboard --project pretraining`.

Sections: loss, throughput, memory, experts, goodput, incidents. Each call saves a new view of the project and prints
its address; `--json` prints what would be saved, without a key or a network.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from src.config.tree import read
from src.errors import ConfigError, UserError
from src.storage.streams import ReaderMayLeave, to_stderr

NAME = "Pretraining"


class PanelSpec(NamedTuple):
    """A plot of `names` over `x`, or of all names that `pattern` matches from one end to the other."""

    title: str
    names: tuple[str, ...] = ()
    pattern: str = ""
    x: str = "step"
    log: bool = False


# Names are those of src/metrics/names.py as the tracker sends them: it groups the numbers of layers by eight.
SECTIONS: dict[str, tuple[PanelSpec, ...]] = {
    "Loss": (
        PanelSpec("Loss", ("loss", "validation_loss", "validation_loss_ema")),
        PanelSpec("Loss by tokens", ("loss", "validation_loss"), x="tokens"),
        PanelSpec("Loss of multi-token prediction", ("mtp_loss",)),
        PanelSpec("Gradient norm", ("grad_norm",), log=True),
        PanelSpec("Learning rate", ("lr",)),
    ),
    "Throughput": (
        PanelSpec("Tokens per second and device", ("tokens_per_second",)),
        PanelSpec("MFU in percent", ("mfu_causal_percent", "mfu_full_percent")),
        PanelSpec("TFLOP/s of a device", ("tflops_causal", "tflops_full")),
        PanelSpec("Seconds of a step, and of waiting for data", ("step_seconds", "data_seconds")),
    ),
    "Memory": (
        PanelSpec("GiB of a GPU", ("peak_allocated_gib", "peak_reserved_gib")),
        PanelSpec("GiB of a rank on a CPU", ("peak_rss_gib",)),
    ),
    "Experts": (
        PanelSpec("Busiest expert over the mean", ("experts/load_max_over_mean",)),
        PanelSpec("Busiest expert of each layer", pattern=r"experts_of_layers_[0-9-]+/load_max_over_mean/layer_\d+"),
        PanelSpec("Experts without a row", ("experts/dead",)),
        PanelSpec("Entropy of loads", ("experts/entropy",)),
        PanelSpec("Norm of balancing biases", ("experts/bias_norm",)),
        PanelSpec("Milliseconds of dispatch and combine", ("experts/dispatch_ms", "experts/combine_ms")),
    ),
    "Goodput": (
        PanelSpec("Share of time that was useful", ("goodput/share",)),
        PanelSpec("Where the time went, in seconds", pattern=r"goodput/\w+_seconds"),
        PanelSpec("Seconds of a start", pattern=r"startup/\w+_seconds"),
        PanelSpec("Seconds of a save", ("checkpoint/stall_seconds", "checkpoint/write_seconds")),
    ),
    "Incidents": (
        PanelSpec("Attempt", ("attempt",)),
        PanelSpec("Seconds of an interruption", ("goodput/interruption_seconds",)),
        PanelSpec("Spikes: deviations above the median", ("spike_score",), log=True),
        PanelSpec("Rows that no expert got", ("experts/dropped",)),
        PanelSpec("Steps that replica groups lost", ("groups/lost_steps", "groups/commit_failures")),
        PanelSpec("Exchanges that a group missed", ("outer/failed_syncs",)),
    ),
}


def workspace(entity: str, project: str, name: str) -> Any:
    """The dashboard as an object of wandb-workspaces, not saved yet."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports import v2 as reports

    def panel(spec: PanelSpec) -> Any:
        y = {"metric_regex": f"^{spec.pattern}$"} if spec.pattern else {"y": list(spec.names)}
        return reports.LinePlot(title=spec.title, x=spec.x, log_y=spec.log or None, **y)

    # Our own axis: wandb's counts calls, and goes on where a replayed step goes back.
    axis = workspaces.SectionPanelSettings(x_axis="step")
    sections = [
        workspaces.Section(name=title, panels=list(map(panel, specs)), is_open=title != "Experts", panel_settings=axis)
        for title, specs in SECTIONS.items()
    ]
    settings = workspaces.WorkspaceSettings(x_axis="step")
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def spec(board: Any) -> str:
    """What the server is sent, as JSON; the library has no public word for it."""
    return str(board._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=1))


def save(entity: str | None, project: str, name: str) -> str:
    """The address of the new view. ConfigError where wandb's server does not take it."""
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        owner = entity or wandb.Api().default_entity
        if owner is None:
            raise ConfigError("--entity: the key has no entity of its own; name a person or a team")
        return str(workspace(owner, project, name).save().url)
    except (wandb.Error, WandbApiFailedError, TimeoutError) as error:  # no key, no network, no such project
        raise ConfigError(f"{project}: no dashboard is made, wandb says: {error}") from error


def owner_of(folder: Path) -> tuple[str | None, str | None]:
    """Entity and project of a run's config. ConfigError for a folder without one."""
    section = (read(folder / "config.yaml").get("tracker") or {}).get("wandb") or {}
    return section.get("entity"), section.get("project")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2 for a mistake, and where the server took nothing."""
    parser = argparse.ArgumentParser(prog="python -m src.metrics.trackers.dashboard", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="run folder: its entity and project")
    parser.add_argument("--project", help="instead of the run's")
    parser.add_argument("--entity", help="person or team; without it the run's, else the key's own")
    parser.add_argument("--name", default=NAME, help=f"of the view; {NAME} if not given")
    parser.add_argument("--json", action="store_true", help="print it and send nothing")
    given = parser.parse_args(arguments)
    try:
        if find_spec("wandb_workspaces") is None:
            raise ConfigError("the package wandb_workspaces is not installed; pip install wandb-workspaces")
        entity, project = owner_of(given.run) if given.run else (None, None)
        entity, project = given.entity or entity, given.project or project
        with ReaderMayLeave():
            if given.json:
                print(spec(workspace(entity or "", project or "", given.name)))
            elif project is None:
                raise ConfigError("--project: whose dashboard? Give a project, or a run folder whose config names one")
            else:
                print(save(entity, project, given.name))
    except UserError as error:
        to_stderr(error.problems)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
