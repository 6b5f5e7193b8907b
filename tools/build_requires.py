"""Prints what pyproject.toml needs to build the package, one requirement a line."""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

with PYPROJECT.open("rb") as file:
    print("\n".join(tomllib.load(file)["build-system"]["requires"]))
