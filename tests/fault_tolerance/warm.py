"""What a group needs, imported once by the process that forks them."""

import tests.fault_tolerance.life  # noqa: F401
