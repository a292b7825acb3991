"""Facts of a site about which nothing is known, as conf/cluster has them."""

from typing import Any

NO_FACTS: dict[str, Any] = {
    "gpu_model": None,
    "link_gib_per_second": 46.6,
    "link_microseconds": 12.0,
    "time_factors": {},
    "gpu_watts": None,
    "price_per_gpu_hour": None,
    "mtbf_hours_per_gpu": None,
}
