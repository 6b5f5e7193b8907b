"""Checks that only latentcore.ops reaches the native library.

Every other module calls the typed functions of `latentcore.ops`. Prints each breach as
`file:line: what` and exits with 1 where there is one.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "latentcore"
ALLOWED = PACKAGE / "ops"


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` for an attribute chain on a name, and an empty text for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(parts)])


def breaches(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every way in which a module reaches the native library by itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and dotted_name(node) == "torch.ops":
            yield node.lineno, "torch.ops"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in ("latentcore._C", "torch.ops"):
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            if (node.module == "latentcore" and "_C" in names) or (
                node.module == "torch" and "ops" in names
            ):
                yield node.lineno, f"from {node.module} import {', '.join(sorted(names))}"
            elif node.module == "latentcore.ops.native" and "op" in names:
                yield node.lineno, "from latentcore.ops.native import op"


def main() -> int:
    """Checks the whole package."""
    found = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(ALLOWED):
            continue
        for line, what in breaches(ast.parse(path.read_text(), str(path))):
            print(f"{path.relative_to(ROOT)}:{line}: {what}: only latentcore.ops calls native ops")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
