"""The environment variables that latentcore reads. Nothing else in the package reads any.

Each is looked at when it is needed, so that a test or a program may set it at any time.
"""

import os
from pathlib import Path

from latentcore.errors import ConfigError

ISA_TIERS = ("avx2", "avx512", "amx")


def force_isa() -> str | None:
    """`LATENTCORE_FORCE_ISA`: the instruction-set tier to use instead of the best one, or None.

    Raises ConfigError for a value that is not a tier. Whether this CPU has it is checked natively.
    """
    value = os.environ.get("LATENTCORE_FORCE_ISA", "")
    if not value:
        return None
    if value not in ISA_TIERS:
        raise ConfigError(
            f"LATENTCORE_FORCE_ISA is {value!r}, expected one of {', '.join(ISA_TIERS)}"
        )
    return value


def cache_dir() -> Path:
    """`LATENTCORE_CACHE`: the folder for packed weights and measurements.

    Defaults to `latentcore` under the user's cache home (`XDG_CACHE_HOME`, else `~/.cache`).
    The folder is not created here.
    """
    value = os.environ.get("LATENTCORE_CACHE", "")
    if value:
        return Path(value).expanduser()
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home else Path.home() / ".cache") / "latentcore"
