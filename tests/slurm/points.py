"""Runs opened in this process, for what a sweep hands over together."""

import os
import sys
from unittest.mock import patch

import yaml
from hydra.core.global_hydra import GlobalHydra

from src.cluster.slurm.config import Slurm
from src.cluster.submission import Prepared
from src.config.composition.requests import asked
from src.config.tree import identity
from src.launch.start import Shared, checked, feed, record
from src.planning.plan import plan
from src.runs.folder import RunFolder
from tests.slurm.runs import FACTS, HOME, Site


def slurm(**changed: object) -> Slurm:
    """cluster=slurm with the test site's facts."""
    facts = yaml.safe_load((HOME / "conf/cluster/slurm.yaml").read_text()) | FACTS | changed
    del facts["_target_"]
    return Slurm(**facts)


def prepared(site: Site, *argv: str) -> Prepared:
    """What launch.py makes of a command line, before it is submitted."""
    GlobalHydra.instance().clear()
    with patch.dict(os.environ, HYDRA_FULL_ERROR="1"), patch.object(sys, "argv", ["launch.py"]):
        ((tree, run, _),) = checked(asked([*site.arguments, *site.site(), *argv]).trees)
    corpus = feed(run, Shared())
    assert corpus is not None
    facts = plan(run, corpus).to_dict()
    where = {"root": run.root, "name": run.name, "identity": identity(tree)}
    folder = RunFolder.open(tree, facts, **where, repository=site.repository)
    record(corpus, folder.path)
    return Prepared(folder, facts)
