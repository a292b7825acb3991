"""Facts of a site that predicted times depend on: the part of the section `cluster` that all clusters share."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from src.config.base import Config
from src.planning.time.collectives import Fabric
from src.planning.time.devices import GPUS, Gpu, Shares, scaled
from src.runs.cluster import Devices

GIB = 2**30
# GPUs of the largest machine that is sold with these devices, and of a node of those that are wired together.
LARGEST_MACHINE, NODE = 16, 8
# CUDA's compute capability, and from how many GiB on -> device.
RECOGNISED: tuple[tuple[tuple[int, int], float, str], ...] = (
    ((9, 0), 120.0, "H200"),
    ((9, 0), 75.0, "H100"),
    ((10, 0), 160.0, "B200"),
    ((8, 0), 75.0, "A100"),
)

Factor = Annotated[float, Field(ge=0.01, le=100.0)]
Factors = dict[str, Factor]


# Of a site about which nothing is known, as conf/cluster has them.
NO_FACTS: dict[str, Any] = {
    "gpu_model": None,
    "link_gib_per_second": 46.6,
    "link_microseconds": 12.0,
    "time_factors": {},
    "gpu_watts": None,
    "price_per_gpu_hour": None,
    "mtbf_hours_per_gpu": None,
}


class SiteFacts(Config):
    """Links, power and prices of the machines."""

    gpu_model: Literal["A100", "B200", "H100", "H200"] | None
    """Device that times are predicted for; null: the one that is here, and elsewhere no prediction."""
    link_gib_per_second: Annotated[float, Field(ge=0.01, le=10_000.0)]
    """Of each GPU's network card in GiB/s, one way; 46.6 are 400 Gb/s."""
    link_microseconds: Annotated[float, Field(ge=0.1, le=1e6)]
    """Of one step of a collective between nodes."""
    time_factors: Factors
    """Factors on the shares of a device's numbers, such as {products: 0.95}, as `python -m src.planning calibrate`
    prints them.
    """
    gpu_watts: Annotated[float, Field(ge=1.0, le=10_000.0)] | None
    """Power of a GPU's board; null: the datasheet's."""
    price_per_gpu_hour: Annotated[float, Field(ge=0.0, le=1e6)] | None
    """Price of an hour of one GPU, in any currency; null: no money is shown."""
    mtbf_hours_per_gpu: Annotated[float, Field(ge=1.0, le=1e9)] | None
    """Hours in which a GPU, or what it needs, fails once on the average; null: nothing is said about failures."""

    @field_validator("time_factors")
    @classmethod
    def _shares_by_name(cls, time_factors: Factors) -> Factors:
        if unknown := [name for name in time_factors if name not in Shares.__dataclass_fields__]:
            raise ValueError(
                f"{unknown[0]!r} is no share of a device; there are {', '.join(Shares.__dataclass_fields__)}"
            )
        return time_factors

    def gpu(self, devices: Devices | None) -> Gpu | None:
        """The device of this site as it was asked for or is here; None: it is not known, or is a CPU."""
        name = self.gpu_model or recognised(devices)
        return None if name is None else scaled(GPUS[name], self.time_factors)

    def fabric(self, gpu: Gpu, per_node: int | None, world: int) -> Fabric:
        """Its links. `per_node`: GPUs of a node; None: all are in one machine, if one holds the `world`."""
        return Fabric(
            nvlink=gpu.nvlink * gpu.shares.nvlink,
            network=self.link_gib_per_second * GIB * gpu.shares.network,
            network_latency=self.link_microseconds * 1e-6,
            per_node=per_node or (NODE if world > LARGEST_MACHINE else world),
        )

    def guesses(self, per_node: int | None, world: int) -> list[str]:
        """What times are predicted on without being told, for a person."""
        if self.gpu_model is None or per_node is not None or world <= LARGEST_MACHINE:
            return []
        return [
            f"{world} GPUs are no one machine: times are those of nodes of {NODE}; cluster.gpus_per_node of a cluster "
            "of nodes says otherwise"
        ]


def recognised(devices: Devices | None) -> str | None:
    """Name of a device by what torch says of it."""
    if devices is None or devices.count is None or devices.memory_gib is None:
        return None
    fits = (
        name for capability, gib, name in RECOGNISED if devices.capability == capability and devices.memory_gib > gib
    )
    return next(fits, None)
