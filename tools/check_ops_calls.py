"""Checks how ops are called.

Only latentcore.ops reaches the native library; every other module calls its typed functions. And no
call hands over, in one parameter's place, what bears the name of another: two tensors of the same
shape that change places pass every other check. Prints each breach as `file:line: what` and exits
with 1 where there is one.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
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
        if isinstance(node, ast.Attribute) and (
            dotted_name(node) == "torch.ops" or dotted_name(node).endswith(".ops.latentcore")
        ):
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


Signatures = Mapping[tuple[str, str], list[str]]
"""The parameters' names of each function, by module and name."""


def signatures() -> Signatures:
    """The functions of latentcore.ops that others call."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in ALLOWED.glob("*.py"):
        for node in ast.parse(path.read_text(), str(path)).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found[path.stem, node.name] = [a.arg for a in node.args.args]
    return found


def names_in(node: ast.expr) -> set[str]:
    """What an argument goes by: a name; an attribute, alone (`gate_up`) and with what it belongs to
    (`shared_gate_up`). Underscores in front, slices and indices do not count."""
    if isinstance(node, ast.Name):
        return {node.id.lstrip("_")}
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value).rpartition(".")[2].lstrip("_")
        last = node.attr.lstrip("_")
        return {last, f"{owner}_{last}"}
    if isinstance(node, ast.Subscript):
        return names_in(node.value)
    return {name for child in ast.walk(node) if child is not node for name in _shallow(child)}


def _shallow(node: ast.AST) -> set[str]:
    return names_in(node) if isinstance(node, ast.Name | ast.Attribute) else set()


def misplaced(tree: ast.AST, known: Signatures) -> Iterator[tuple[int, str]]:
    """Line and text of every argument that bears another parameter's name and not its own."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        tuples = {
            target.id: node.value.elts
            for node in ast.walk(function)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(function):
            if not isinstance(call, ast.Call):
                continue
            module, _, name = dotted_name(call.func).rpartition(".")
            parameters = known.get((module, name))
            if parameters is None:
                continue
            arguments: list[ast.expr] = []
            for argument in call.args:
                starred = argument.value if isinstance(argument, ast.Starred) else None
                if isinstance(starred, ast.Name):
                    arguments += tuples.get(starred.id, [])
                else:
                    arguments.append(argument)
            named = [(k.arg, k.value) for k in call.keywords if k.arg is not None]
            for parameter, argument in [*zip(parameters, arguments, strict=False), *named]:
                names = names_in(argument)
                own = {parameter, parameter.removesuffix("_to"), parameter.removesuffix("_proj")}
                others = sorted(names & set(parameters))
                if others and not names & own:
                    what = f"{others[0]!r} in the place of {parameter!r}"
                    yield argument.lineno, f"{module}.{name}: {what}"


def main() -> int:
    """Checks the whole package."""
    found = 0
    known = signatures()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.is_relative_to(ALLOWED):
            continue
        tree = ast.parse(path.read_text(), str(path))
        reached = [
            (line, f"{what}: only latentcore.ops calls native ops") for line, what in breaches(tree)
        ]
        for line, what in [*reached, *misplaced(tree, known)]:
            print(f"{path.relative_to(ROOT)}:{line}: {what}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
