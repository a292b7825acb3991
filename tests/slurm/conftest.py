"""One cluster, one repository and one undisturbed run for all tests here."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian import install
from tests.end_to_end.lives import series
from tests.slurm.cluster import TestCluster, cluster, missing
from tests.slurm.runs import Site


@pytest.fixture(scope="session")
def slurm() -> Iterator[TestCluster]:
    """On a laptop without SLURM these tests are skipped; in CI its absence is a failure."""
    if missing() is not None and "CI" in os.environ and os.geteuid() == 0:
        install("slurm-wlm", "munge")
    if (reason := missing()) is not None:
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def site(slurm: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(slurm, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="session")
def straight(site: Site) -> dict[int, float]:
    """The losses of the same run on this machine, without SLURM and without a stop."""
    site.launch("name=straight", "cluster.gpus=0")
    (folder,) = Path(site.folder / "runs").glob("straight-*")
    return series(folder)
