"""A reward by a Python function in the user's own file."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from sftx import Answer, ConfigError, PluginError, Reward, RunInfo, hookimpl

_FOR_ONE: Final = ("prompt", "answer", "row")
_FOR_ALL: Final = ("prompts", "answers", "rows")


@dataclass(frozen=True, eq=False)
class RewardFunction:
    """Scores answers by a function in a Python file of yours: `reward.py:score`.

    The function takes those of these parameters that it needs, by their names: `prompt` (the last turn before the
    answer) and `answer`, as text, and `row`, a `sftx.Question` with the reference and what the parser kept of the row.
    It returns a number, or None to decline the answer. A function whose parameters are `prompts`, `answers` and `rows`
    gets lists, and returns a list with as many numbers.
    """

    function: Annotated[
        str,
        Field(pattern=r"^.+\.py:[^\W\d]\w*$", description="The file and the name of the function: reward.py:score."),
    ]
    sha256: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9a-f]{64}$",
            description="SHA-256 of the file, which a run fills in and records, so that it is resumed with no other.",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Fill in the hash: options that a run records are those of this instance."""
        if self.sha256 is None and self._file.is_file():
            object.__setattr__(self, "sha256", self._hash())

    @property
    def _file(self) -> Path:
        return Path(self.function.rpartition(":")[0]).expanduser()

    def _hash(self) -> str:
        return hashlib.sha256(self._file.read_bytes()).hexdigest()

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if not self._file.is_file():
            raise ConfigError(f"option 'function': there is no file {self._file}; give FILE.py:FUNCTION")
        if (now := self._hash()) != self.sha256:
            raise ConfigError(
                f"option 'function': {self._file} is not the file that sha256 names ({now[:12]}..., not "
                f"{str(self.sha256)[:12]}...), so it would score answers in another way; bring that one back, or leave "
                "sha256 out and begin another run"
            )

    @hookimpl
    def sftx_reward(self) -> Reward:
        name = self.function.rpartition(":")[2]
        # Outside of a package, under a name that no import finds: two files may have the same one.
        spec = importlib.util.spec_from_file_location(f"_reward_{self.sha256}", self._file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            where = _line_of(error, self._file) or str(self._file)
            raise ConfigError(f"{where}: the file cannot be imported: {_shown(error)}; mend it") from error
        function = getattr(module, name, None)
        if not callable(function):
            defined = ", ".join(key for key, value in vars(module).items() if inspect.isfunction(value))
            raise ConfigError(
                f"option 'function': {self._file} defines no function {name!r}; it defines {defined or 'none'}"
            )
        parameters = list(inspect.signature(function).parameters)
        for takes, of_all in ((_FOR_ONE, False), (_FOR_ALL, True)):
            if parameters and set(parameters) <= set(takes):
                return _Function(self._file, name, function, parameters, of_all)
        raise ConfigError(
            f"option 'function': {name} in {self._file} has the parameters {', '.join(parameters) or 'none'}; give it "
            f"some of {', '.join(_FOR_ONE)}, or of {', '.join(_FOR_ALL)} to be called with lists"
        )


@dataclass(frozen=True)
class _Function:
    file: Path
    name: str
    function: Callable[..., Any]
    parameters: Sequence[str]
    of_all: bool
    """Whether it is called once with lists."""

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        if not answers:
            return []
        given: list[dict[str, Any]] = [
            {"prompt": answer.question.prompt, "answer": answer.text, "row": answer.question} for answer in answers
        ]
        if self.of_all:
            scores = self._call_with_lists(given)
        else:
            scores = [self._call(one, f"the answer to {one['row'].row_id}") for one in given]
        return [self._number(score, answer) for score, answer in zip(scores, answers, strict=True)]

    def _call_with_lists(self, given: Sequence[dict[str, Any]]) -> list[Any]:
        lists = {f"{name}s": [one[name] for one in given] for name in _FOR_ONE}
        scores = self._call(lists, f"answers to {_listed([one['row'].row_id for one in given])}")
        is_list = isinstance(scores, Iterable) and not isinstance(scores, str | Mapping)
        numbers = list(scores) if is_list else []
        if len(numbers) != len(given):
            got = f"{len(numbers)} values" if is_list else type(scores).__name__
            raise PluginError(
                f"{self.file}: {self.name} returned {got} for {len(given)} answers; return a list with a number or "
                "None for each"
            )
        return numbers

    def _call(self, given: dict[str, Any], what: str) -> Any:
        try:
            return self.function(**{name: given[name] for name in self.parameters})
        except Exception as error:
            where = _line_of(error, self.file) or f"{self.file}: {self.name}"
            raise PluginError(f"{where}: failed for {what}: {_shown(error)}") from error

    def _number(self, score: Any, answer: Answer) -> float | None:
        if score is None:
            return None
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(score, str) or not math.isfinite(number):
            raise PluginError(
                f"{self.file}: {self.name} returned {score!r:.60} for the answer to {answer.question.row_id}; return a "
                "finite number, or None"
            )
        return number


def _line_of(error: BaseException, file: Path) -> str | None:
    """Return the file and the line in it at which the error came about, if it went through that file."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename) == file:
        return f"{file}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f"{file}:{lines[-1]}" if lines else None


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no text'}"


def _listed(row_ids: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(row_ids))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")
