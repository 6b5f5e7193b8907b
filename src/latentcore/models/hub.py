"""Where a model's folder is: on this machine, in the Hugging Face cache, or in the package."""

import re
from pathlib import Path

from latentcore.errors import CheckpointError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"
"""The small trained model that comes with the package."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

_WANTED = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tiktoken.model",
    "tokenizer.model",
    "merges.txt",
)
"""Files that are fetched: data alone. Never code (*.py) and never pickles (*.bin, *.pt)."""

_UNWANTED = ("*/*",)
"""Sub-folders hold other forms of the same weights."""


def resolve_model(name: str | Path | None) -> Path:
    """The folder of model `name`: a folder, a Hugging Face repository id, or None for the demo.

    A repository is fetched into the ordinary Hugging Face cache, with progress on stderr. A
    connection that breaks is taken up again where it broke; where that fails, the files that are
    complete stay, and the next call fetches the others.
    Raises CheckpointError when there is no such model or it cannot be fetched.
    """
    if name is None:
        if not (DEMO_MODEL / "config.json").is_file():
            raise CheckpointError(
                f"the demo model is not in this installation (expected {DEMO_MODEL}); "
                f"name a model folder or a Hugging Face repository id"
            )
        return DEMO_MODEL
    path = Path(name).expanduser()
    if str(name) and path.is_dir():
        return path
    if str(name) and path.exists():
        raise CheckpointError(f"{path}: expected a model folder, found a file; give its folder")
    text = str(name)
    if not _REPO_ID.fullmatch(text) or text.startswith((".", "~")):
        raise CheckpointError(
            f"no such model folder: {text!r} (nor is it a Hugging Face repository id, which looks "
            f"like organisation/name)"
        )
    return _fetch(text)


def _fetch(repo_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo_id}"
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id, allow_patterns=list(_WANTED), ignore_patterns=list(_UNWANTED)
        )
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{repo_id}: this model's owner asks for consent first; give it at {page}, then run "
            f"`hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no such model: there is no folder {repo_id}, and no public repository of that name "
            f"at {page} (for a private one run `hf auth login` first)"
        ) from None
    except errors.HFValidationError as error:
        raise CheckpointError(f"no such model: {repo_id} ({_first_line(error)})") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise CheckpointError(
            f"{repo_id}: not in the Hugging Face cache, and huggingface.co cannot be reached; "
            f"connect and try again, or copy the model here and name its folder"
        ) from None
    except (errors.HfHubHTTPError, errors.FileMetadataError, errors.XetDownloadError) as error:
        raise CheckpointError(f"{repo_id}: cannot be fetched: {_first_line(error)}") from None
    except Exception as error:  # whatever its HTTP library raises when a connection breaks
        raise CheckpointError(
            f"{repo_id}: cannot be fetched: {_first_line(error)}; try again: the files that are "
            f"complete are kept"
        ) from None
    return Path(folder)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
