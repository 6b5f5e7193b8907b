"""What pyproject.toml, constraints.txt and the installed package promise each other."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import latentcore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirement_name(requirement: str) -> str:
    """`Some_Package>=1` as pip compares it: some-package."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None, requirement
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def test_everything_imported_is_required(project: dict[str, Any]) -> None:
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", text, re.MULTILINE))
    packages = {name: metadata.packages_distributions().get(name, []) for name in imported}
    needed = {requirement_name(d) for found in packages.values() for d in found} - {"latentcore"}
    declared = {requirement_name(r) for r in project["project"]["dependencies"]}
    declared |= {
        requirement_name(r) for r in project["project"]["optional-dependencies"]["structured"]
    }
    comes_along = {"starlette", "pydantic-core"}  # parts of fastapi and pydantic
    assert "torch" in needed
    assert needed - declared - comes_along == set()


def test_constraints_pin_every_requirement_exactly(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    requirements = list(project["build-system"]["requires"]) + project["project"]["dependencies"]
    for extra in project["project"]["optional-dependencies"].values():
        requirements += extra
    names = {requirement_name(r) for r in requirements if "==" not in r} - {"latentcore"}
    assert names - {requirement_name(name) for name in pins} == set()
    assert f"torch=={pins['torch']}" in project["build-system"]["requires"]


def test_version_of_the_metadata_is_the_packages() -> None:
    if not Path(latentcore.__file__).is_relative_to(ROOT):
        assert metadata.version("latentcore") == latentcore.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {latentcore.__version__}" in changelog


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    checked = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
                checked += 1
    assert checked >= 5


def test_the_guide_names_every_environment_variable_and_option() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("src", "csrc")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp")
    )
    variables = set(re.findall(r"\bLATENTCORE_[A-Z_]+[A-Z]\b", source))
    options = set()
    for path in (ROOT / "src/latentcore/cli").glob("*.py"):
        options |= set(re.findall(r'"(--[a-z][a-z-]+)', path.read_text(encoding="utf-8")))
    hidden = {"--enable-prefix-caching", "--version"}
    assert "LATENTCORE_FORCE_ISA" in variables
    assert "--temperature" in options
    assert {name for name in variables | (options - hidden) if name not in guide} == set()
