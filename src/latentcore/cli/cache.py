"""`latentcore cache`: the packed weights that are kept on disk."""

from datetime import datetime
from typing import Annotated

import typer

from latentcore.errors import UserError

app = typer.Typer(name="cache", help="List or remove packed weights.", no_args_is_help=True)


@app.command()
def ls() -> None:
    """List the packed weights: name, size, when used last, formats, model; the latest first."""
    from latentcore.models.memory import format_bytes
    from latentcore.models.packed_cache import entries, packs_dir

    found = entries()
    for entry in found:
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        size = format_bytes(entry.nbytes)
        print(f"{entry.name}  {size:>9}  {used}  {entry.schemes}  {entry.model or 'damaged'}")
    total = format_bytes(sum(entry.nbytes for entry in found))
    print(f"{len(found)} packed models, {total}, in {packs_dir()}")


@app.command()
def rm(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names as `ls` prints them.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all of them.")] = False,
) -> None:
    """Remove packed weights. Running models keep theirs; the next start packs again."""
    from latentcore.models.packed_cache import entries

    if everything == bool(names):
        raise UserError("expected the names of packed weights (latentcore cache ls), or --all")
    found = entries()
    chosen = found
    if names:
        chosen = []
        for name in names:
            matches = [entry for entry in found if entry.path.stem.startswith(name)]
            if len(matches) != 1:
                raise UserError(
                    f"{name}: {len(matches)} packed weights have this name; "
                    "latentcore cache ls prints them all"
                )
            chosen += matches
    for entry in chosen:
        entry.path.unlink(missing_ok=True)
        print(f"removed {entry.name} {entry.model}")
