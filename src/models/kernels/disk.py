"""Where packages that compile kernels at their first use keep them: by themselves some compile anew in each process."""

import os
from pathlib import Path


def keep_on_disk() -> None:
    """Before such a package is imported: kernels of flash-attn-4 and quack, which it imports, go beside inductor's."""
    beside = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # of a run, where it has one of its own
    home = Path(beside or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(home / "flash_attention"))
    os.environ.setdefault("QUACK_CACHE_DIR", str(home / "quack"))
