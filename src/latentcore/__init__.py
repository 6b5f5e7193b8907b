"""latentcore: DeepSeek-architecture language models on CPUs.

The public names are `LLM`, `AsyncEngine`, `SamplingParams`, `StructuredOutputsParams`,
`RequestOutput` and the exceptions of `latentcore.errors`. They are imported when first used, so
that `import latentcore` and the command line's `--help` stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LLM": "latentcore.engine.llm",
    "AsyncEngine": "latentcore.engine.async_engine",
    "SamplingParams": "latentcore.engine.sampling_params",
    "StructuredOutputsParams": "latentcore.engine.sampling_params",
    "RequestOutput": "latentcore.engine.outputs",
    "CompletionOutput": "latentcore.engine.outputs",
    "LatentcoreError": "latentcore.errors",
    "UserError": "latentcore.errors",
}

if TYPE_CHECKING:
    from latentcore.engine.async_engine import AsyncEngine as AsyncEngine
    from latentcore.engine.llm import LLM as LLM
    from latentcore.engine.outputs import CompletionOutput as CompletionOutput
    from latentcore.engine.outputs import RequestOutput as RequestOutput
    from latentcore.engine.sampling_params import SamplingParams as SamplingParams
    from latentcore.engine.sampling_params import StructuredOutputsParams as StructuredOutputsParams
    from latentcore.errors import LatentcoreError as LatentcoreError
    from latentcore.errors import UserError as UserError

__all__ = [
    "LLM",
    "AsyncEngine",
    "CompletionOutput",
    "LatentcoreError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UserError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'latentcore' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
