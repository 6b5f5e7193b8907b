"""The environment variables that latentcore reads. Nothing else in the package reads any.

Each is looked at when it is needed, so that a test or a program may set it at any time.
"""

import os
from pathlib import Path

from latentcore.errors import ConfigError, UserError

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


def cache_limit() -> int | None:
    """`LATENTCORE_CACHE_LIMIT`: most bytes of packed weights kept (`500GB`), None without a limit.

    0 turns the packed cache off. Raises UserError for what is no size.
    """
    value = os.environ.get("LATENTCORE_CACHE_LIMIT", "").strip()
    if not value:
        return None
    return 0 if value == "0" else parse_bytes("LATENTCORE_CACHE_LIMIT", value)


_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes: 1000000, 16MiB, 1.5GB."""
    stripped = str(text).strip().lower()
    number = stripped.rstrip("bgikmt ")
    unit = stripped[len(number) :].strip()
    try:
        value = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        value = 0
    if value < 1:
        raise UserError(f"{option}: expected a size such as 500MB or 16GiB, found {text!r}")
    return value
