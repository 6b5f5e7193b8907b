"""The built wheel: its tag, its contents, its libraries, and that it runs on another Python."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SYSTEM_LIBRARIES = {
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
}
TORCH_LIBRARIES = {"libtorch_cpu.so"}
"""Declared by the requirement on torch, which the package imports first."""


def clean_environment() -> dict[str, str]:
    """This process's environment without what would lead another Python astray."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree by this Python (incrementally, in build/)."""
    pytest.importorskip("scikit_build_core", reason="building needs the build requirements")
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"),
        *("--wheel-dir", folder, ROOT),
        cwd=ROOT,
    )
    (found,) = folder.glob("*.whl")
    return found


def needed_libraries(library: Path) -> set[str]:
    """The shared libraries that an ELF file names."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestWheel:
    def test_serves_every_python_from_3_11(self, wheel: Path) -> None:
        assert re.fullmatch(r"latentcore-[\d.]+-cp311-abi3-linux_x86_64\.whl", wheel.name)

    def test_holds_the_package_and_nothing_else(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        info = {name for name in names if re.match(r"latentcore-[\d.]+\.dist-info/", name)}
        assert any(name.endswith("/licenses/LICENSE") for name in info)
        assert all(name.startswith("latentcore/") for name in names - info)
        assert {name for name in names if name.endswith(".so")} == {"latentcore/_C.abi3.so"}
        for wanted in (
            "py.typed",
            "demo_model/config.json",
            "demo_model/model.safetensors",
            "demo_model/tokenizer.json",
            "demo_model/NOTICE",
            "server/static/index.html",
        ):
            assert f"latentcore/{wanted}" in names
        sources = set((ROOT / "src").rglob("*.py"))
        assert {path.relative_to(ROOT / "src").as_posix() for path in sources} <= names

    def test_needs_no_undeclared_library(self, wheel: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract("latentcore/_C.abi3.so", tmp_path))
        needed = needed_libraries(library)
        assert TORCH_LIBRARIES <= needed <= TORCH_LIBRARIES | SYSTEM_LIBRARIES

        shown = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=tmp_path)
        text = " ".join(shown.split())
        assert "is consistent with the following platform tag" in text
        assert (
            "manylinux_2_" in text
        )  # only versioned symbols of the system's libraries are counted

    def test_uses_only_the_limited_python_interface(self, wheel: Path, tmp_path: Path) -> None:
        from elftools.elf.elffile import ELFFile

        with zipfile.ZipFile(wheel) as archive:
            library = Path(archive.extract("latentcore/_C.abi3.so", tmp_path))
        with library.open("rb") as file:
            symbols = ELFFile(file).get_section_by_name(".dynsym").iter_symbols()
            undefined = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF"}
        assert {name for name in undefined if name.startswith(("Py", "_Py"))} == {
            "PyModule_Create2"
        }
        # PyTorch's stable interface is plain C: no C++ symbol of at::, c10:: or torch::.
        assert not {name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)}

    def test_generates_on_another_python(self, wheel: Path, tmp_path: Path) -> None:
        python = another_python()
        run(python, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
        inside = tmp_path / "venv" / "bin"
        pip = (inside / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        run(*pip, wheel, cwd=tmp_path)
        text = run(
            *(inside / "latentcore", "generate", "--prompt", "Once upon a time"),
            *("--max-tokens", "16", "--temperature", "0", "--threads", "1"),
            cwd=tmp_path,
        )
        assert len(text.split()) >= 4


def another_python() -> Path:
    """A Python of another version, 3.11 or later, that a torch can be had for; else skips."""
    wanted = [minor for minor in (12, 13, 14, 11) if minor != sys.version_info.minor]
    for minor in wanted:
        name = f"python3.{minor}"
        places = [Path(found)] if (found := shutil.which(name)) else []
        places += sorted((Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/{name}"))
        for place in places:
            works = subprocess.run(
                [place, "-c", "import venv, ensurepip"], capture_output=True, check=False
            )
            if works.returncode == 0:
                return place
    pytest.skip(f"no Python of another version here: looked for 3.{', 3.'.join(map(str, wanted))}")
