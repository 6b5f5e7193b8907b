"""Every exception that latentcore raises on purpose.

`UserError` and its subclasses mean that something outside the program is wrong (a checkpoint, a
flag, a request, too little memory). Their message is one clear line, or one line a problem, and the
command line prints it as it stands with exit code 2. Anything else that escapes is a bug of ours.
"""

from collections.abc import Sequence


class LatentcoreError(Exception):
    """Base class of all errors raised by latentcore."""


class UserError(LatentcoreError):
    """Bad input: the message names what was found, what was expected and what to do."""


class _ProblemListError(UserError):
    """A user error that lists every problem found, not only the first."""

    problems: list[str]

    def __init__(self, problems: str | Sequence[str], *, where: str | None = None) -> None:
        """Collects `problems` (one text, or several, at least one).

        `where` names the file or folder that all of them concern; it stands once in front.
        """
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if not self.problems:
            raise ValueError("an error needs at least one problem")
        prefix = f"{where}: " if where else ""
        if len(self.problems) == 1:
            message = prefix + self.problems[0]
        else:
            shown = self.problems[:_MAX_SHOWN]
            lines = [f"{prefix}{len(self.problems)} problems:"]
            lines += [f"  - {problem}" for problem in shown]
            if len(shown) < len(self.problems):
                lines.append(f"  - and {len(self.problems) - len(shown)} more")
            message = "\n".join(lines)
        super().__init__(message)


_MAX_SHOWN = 20
"""Problems spelled out in an error's message; `problems` always holds all of them."""


class ConfigError(_ProblemListError):
    """A model's `config.json` or the engine's options make no sense. `.problems` has all."""


class UnsupportedModelError(ConfigError):
    """There is no model to speak of: no folder, no readable config, or another architecture."""


class CheckpointError(_ProblemListError):
    """A checkpoint's files are damaged, incomplete or not what its config promises.

    `.problems` has everything that was found.
    """


class NotReadyError(_ProblemListError):
    """Several things keep a model from being run here. `.problems` has all of them."""


class QuantizationError(UserError):
    """The weights cannot be run in the format that was asked for."""


class RequestError(UserError):
    """A prompt or its sampling parameters cannot be served."""


class InsufficientMemoryError(UserError):
    """What was asked for needs more memory than there is. The message says how much of each."""


class UnsupportedCpuError(UserError):
    """This processor, or the tier forced by LATENTCORE_FORCE_ISA, cannot run the native code."""
