"""Options that several commands share, and what they become."""

import enum
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from latentcore.errors import UserError


class Quantization(enum.StrEnum):
    """Values of --quantization."""

    AUTO = "auto"
    UNQUANT = "unquant"
    W8A8_INT8 = "w8a8_int8"
    FP8 = "fp8"


ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A model's folder, or a Hugging Face repository. Default: the bundled demo model.",
        show_default=False,
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Longest answer, in tokens. Default: as many as fit."),
]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy. Default: the model's own.")
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", help="Sample among the likeliest tokens of this total probability."),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", help="Sample among this many of the likeliest tokens.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same answer.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", help="Text that ends the answer; may be repeated.")
]
QuantizationOption = Annotated[
    Quantization,
    typer.Option("--quantization", "-q", help="Run the weights as stored (auto), or convert."),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", "-t", help="Default: the physical cores.")
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Longest prompt and answer together, in tokens."),
]
EnforceEagerOption = Annotated[
    bool, typer.Option("--enforce-eager", help="Decode without captured graphs; slower.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how to run it."""

    model: str | None
    quantization: Quantization
    threads: int | None
    max_model_len: int | None
    enforce_eager: bool


@dataclass(frozen=True)
class SamplingOptions:
    """How to answer; None leaves it to the model's own defaults."""

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: list[str] | None

    def given(self) -> dict[str, Any]:
        """The options that were given, by SamplingParams' names."""
        found = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "stop": self.stop,
        }
        return {name: value for name, value in found.items() if value is not None}


def check_lengths(max_tokens: int | None, max_model_len: int | None) -> None:
    """Refuses lengths that contradict each other before anything is loaded."""
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens: expected at least 1, found {max_tokens}")
    if max_tokens is not None and max_model_len is not None and max_tokens >= max_model_len:
        raise UserError(
            f"--max-tokens {max_tokens} leaves no room for a prompt in --max-model-len "
            f"{max_model_len}"
        )
