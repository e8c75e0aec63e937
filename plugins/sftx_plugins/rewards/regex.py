"""1 for an answer that a regular expression matches, or in which it finds the reference's result."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sftx import Answer, ConfigError, Reward, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class RewardRegex:
    """1 if the pattern matches the answer, or if what its group finds there is what the reference has; otherwise 0.

    With `group`, the same pattern is applied to the reference, as in GSM8K, whose references end in `#### 42`; where it
    does not match, the whole reference is what the group must have found. White space at both ends does not count.
    An answer to a prompt without a reference is declined then.
    """

    pattern: Annotated[
        str, Field(min_length=1, description="Python's regular expression; (?s) at its start lets . match line ends.")
    ]
    match: Annotated[
        Literal["full", "search", "last"],
        Field(
            description="full: the whole answer must match; search: the first place that matches; last: the last one."
        ),
    ] = "full"
    group: Annotated[
        Annotated[int, Field(ge=0, le=2**24)] | str | None,
        Field(description="Number or name of the group that is compared with the reference; by default none is."),
    ] = None

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"option 'pattern': {self.pattern!r} is no regular expression: {error}") from None
        groups = [*range(compiled.groups + 1), *compiled.groupindex]
        if self.group is not None and self.group not in groups:
            raise ConfigError(
                f"option 'group': {self.pattern!r} has no group {self.group!r}; its groups are "
                f"{', '.join(map(repr, groups))}"
            )

    @hookimpl
    def sftx_reward(self) -> Reward:
        return self

    def __call__(self, answers: Sequence[Answer]) -> list[float | None]:
        compiled = re.compile(self.pattern)
        return [self._score(compiled, answer.text, answer.question.reference) for answer in answers]

    def _score(self, pattern: re.Pattern[str], text: str, reference: str) -> float | None:
        if self.group is None:
            return float(self._find(pattern, text) is not None)
        if not reference:
            return None
        found = self._find(pattern, text)
        expected = self._find(pattern, reference)
        return float(found is not None and found == (reference.strip() if expected is None else expected))

    def _find(self, pattern: re.Pattern[str], text: str) -> str | None:
        """Return the text of the group, or of the whole match; None where there is none."""
        if self.match == "full":
            match = pattern.fullmatch(text.strip())
        elif self.match == "search":
            match = pattern.search(text)
        else:
            match = None
            for match in pattern.finditer(text):  # noqa: B007
                pass
        found: str | None = None if match is None else match.group(0 if self.group is None else self.group)
        return None if found is None else found.strip()
