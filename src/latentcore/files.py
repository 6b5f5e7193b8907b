"""Reading files that nobody vouches for: strict JSON, and paths that stay inside their folder.

A checkpoint comes from the internet. Its JSON may be crafted to exhaust a parser or to mean one
thing to us and another to somebody else, and its file names may point anywhere.
"""

import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn


class JsonError(ValueError):
    """A text is not the plain, well-formed JSON object that it should be."""


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parses `data` as one JSON object, refusing what a hostile file may hold.

    Refused with JsonError: bytes that are not UTF-8, a duplicate key in any object, `NaN` and
    `Infinity`, integers of thousands of digits, deep nesting, and anything but an object on top.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_pairs,
            parse_constant=_refuse_constant,
        )
    except UnicodeDecodeError as error:
        raise JsonError(f"not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise JsonError("brackets nested too deeply") from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"not valid JSON ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise JsonError(f"expected a JSON object, found {json_kind(value)}")
    return value


def json_kind(value: object) -> str:
    """Names the JSON type of a parsed value, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {shorten(str(value))}"
    if isinstance(value, str):
        return f'the text "{shorten(value)}"'
    return "a list" if isinstance(value, list) else "an object"


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f'the key "{shorten(key)}" stands twice in one object')
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"{name} is not a JSON value")


def _first_line(error: Exception) -> str:
    return shorten(str(error).splitlines()[0] if str(error) else type(error).__name__, 120)


def shorten(text: str, limit: int = 60) -> str:
    """The start of `text` without control characters, for messages."""
    clean = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: limit + 1]
    )
    return clean if len(text) <= limit else clean[:limit] + "..."


def read_json_file(path: Path, max_bytes: int) -> dict[str, Any]:
    """Reads a JSON object from a file of at most `max_bytes`. Raises OSError or JsonError."""
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JsonError(f"larger than {max_bytes} bytes")
    return parse_json_object(data)


class UnsafePathError(ValueError):
    """A file name or a link leads out of the model's folder, or to something not a plain file."""


def contained_file(folder: Path, name: str) -> Path:
    """The path of file `name` in `folder`, which must be a plain file inside that folder.

    `name` must be a bare file name. A symbolic link may lead elsewhere inside the folder or, in the
    Hugging Face cache (`.../snapshots/REVISION`), to that repository's own `.../blobs`.
    Raises FileNotFoundError when there is no such file (a dangling link included), other OSErrors
    as they come, and UnsafePathError otherwise.
    """
    if (
        not name
        or name in (".", "..")
        or "\0" in name
        or "\\" in name
        or PurePosixPath(name).name != name
    ):
        raise UnsafePathError(
            f'{folder}: expected the name of a file in this folder, found "{shorten(name)}"'
        )
    path = folder / name
    real = path.resolve(strict=True)
    root = folder.resolve(strict=True)
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise UnsafePathError(
            f"{path}: a link that leads out of the model's folder, to {shorten(str(real), 200)}; "
            f"put the file itself there"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise UnsafePathError(f"{path}: expected a plain file, found something else")
    return path
