"""Applies every drift to a copy of the tree and tells which check notices it, and how soon.

    python tests/drift/run.py [WORD...]     drifts whose names hold all words; all without any

For each: the change is made, the library rebuilt where it must be (only what changed), and the
checks run one after the other until one fails. None of them reads a checkpoint's weights; all they
load are small random ones of their own. Exits with 1 where a drift survives.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from drifts import DRIFTS, Drift

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "drift"
TREE = WORK / "tree"
BUILD = WORK / "native"
LIBRARY = "_C.abi3.so"
COPIED = ("src", "csrc", "tests", "tools", "CMakeLists.txt", "pyproject.toml")

PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header")
CHECKS: Sequence[tuple[str, Sequence[str]]] = (
    ("how ops are called", ("tools/check_ops_calls.py",)),
    (
        "preflight",
        (*PYTEST, "tests/engine/test_preflight.py", "-k", "small_limits or template or stale"),
    ),
    ("fake weights", (*PYTEST, "tests/models/test_dryrun.py")),
    ("contract", (*PYTEST, "tests/ops/test_contract.py")),
    ("entry checks", (*PYTEST, "tests/ops/test_entry_checks.py")),
)


class Copy:
    """The copy of the tree, with its own build of the library."""

    def __init__(self) -> None:
        """Brings the copy up to date; files that are the same keep their time, and their build."""
        kept = set()
        for name in COPIED:
            source = ROOT / name
            for path in [source] if source.is_file() else sorted(source.rglob("*")):
                if path.is_dir() or "__pycache__" in path.parts or path.name.startswith("_C"):
                    continue
                target = TREE / path.relative_to(ROOT)
                kept.add(target)
                if not target.exists() or target.read_bytes() != path.read_bytes():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
        for path in TREE.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()
        self.environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(TREE / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        """Runs a command in the copy."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=TREE,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def build(self) -> str | None:
        """Builds what has changed and puts the library into place; the compiler's first error."""
        if not (BUILD / "build.ninja").exists():
            python = f"-DPython_EXECUTABLE={sys.executable}"
            done = self.run(("cmake", "-S", TREE, "-B", BUILD, "-G", "Ninja", python))
            if done.returncode != 0:
                sys.exit(f"error: cmake failed\n{done.stdout}{done.stderr}")
        done = self.run(("ninja", "-C", BUILD))
        if done.returncode != 0:
            found = re.search(r"error: .*", done.stdout)
            return found[0] if found else done.stdout[-300:]
        shutil.copyfile(BUILD / LIBRARY, TREE / "src" / "latentcore" / LIBRARY)
        return None

    def first_failure(self) -> tuple[str, str] | None:
        """The first check that fails, and what it says; None where all pass."""
        for name, arguments in CHECKS:
            done = self.run((sys.executable, *arguments))
            if done.returncode != 0:
                return name, said(done)
        return None


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a failed check that names what it found."""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed:
        return failed[1].rpartition("::")[2] or failed[1]
    lines = done.stdout.splitlines() or done.stderr.splitlines()[-1:]
    if done.returncode < 0:
        return f"the program was killed by signal {-done.returncode}"
    return lines[0] if lines else f"exit code {done.returncode}"


def apply(drift: Drift) -> dict[Path, str]:
    """Makes the change; gives each file's text before it. Fails where a place is not found once."""
    before: dict[Path, str] = {}
    after: dict[Path, str] = {}
    for edit in drift.edits:
        path = TREE / edit.file
        before.setdefault(path, path.read_text())
        text = after.get(path, before[path])
        if text.count(edit.old) != 1:
            restore(before)
            sys.exit(
                f"FAILED: {drift.name}: expected this once in {edit.file}, found it "
                f"{text.count(edit.old)} times; bring the drift up to date\n{edit.old}"
            )
        after[path] = text.replace(edit.old, edit.new)
        path.write_text(after[path])
    return before


def restore(before: dict[Path, str]) -> None:
    """Undoes a change."""
    for path, text in before.items():
        path.write_text(text)


def main(words: Sequence[str]) -> int:
    """Runs the drifts and prints a line each."""
    chosen = [drift for drift in DRIFTS if all(word in drift.name for word in words)]
    if not chosen:
        sys.exit(f"error: no drift is named by {' '.join(words)}")
    copy = Copy()
    for drift in chosen:  # before anything takes long
        restore(apply(drift))
    start = time.perf_counter()
    if error := copy.build():
        sys.exit(f"error: the tree does not build: {error}")
    built = time.perf_counter() - start
    start = time.perf_counter()
    if failure := copy.first_failure():
        sys.exit(f"error: without any drift, {failure[0]} fails: {failure[1]}")
    seconds = time.perf_counter() - start
    print(
        f"built in {built:.0f} s; without a drift all checks pass, in {seconds:.0f} s", flush=True
    )
    survivors: list[str] = []
    stale = False
    for drift in chosen:
        before = apply(drift)
        start = time.perf_counter()
        error = copy.build() if drift.native or stale else None
        stale = drift.native
        built = time.perf_counter() - start
        start = time.perf_counter()
        failure = ("compiler", error) if error else copy.first_failure()
        seconds = time.perf_counter() - start
        restore(before)
        if failure is None:
            survivors.append(drift.name)
        verdict = f"{failure[0]}: {failure[1]}" if failure else "SURVIVED"
        rebuilt = f" after {built:.0f} s of building" if built >= 0.5 else ""
        print(f"{drift.name}\n    {seconds:5.1f} s{rebuilt}  {verdict}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} drifts noticed", flush=True)
    for name in survivors:
        print(f"FAILED: nothing noticed that {name}", file=sys.stderr)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
