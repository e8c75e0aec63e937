"""The tokenizer's own chat template, in Jinja; its masks are found, or it is refused with the reason.

`_jinja_data` gives a template the conversation, once as it is and once with a letter for every text; `_jinja_text`
tells the template's own text from the conversation's; `_jinja_template` finds whose turn is where.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, JsonValue

from sftx import ConfigError, PluginError, Template, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenizerTemplate:
    """Writes what the tokenizer's own chat template writes, and trains the assistant's answers with their ends."""

    template: Annotated[
        str | None,
        Field(description="Path of a .jinja file to use instead, or the name of one of several that there are."),
    ] = None
    enable_thinking: Annotated[
        bool | None, Field(description="Passed on to the template; many write an empty thought when it is false.")
    ] = None
    template_kwargs: Annotated[
        dict[str, JsonValue], Field(description="Further values that the template reads: {date_string: 26 Jul 2024}.")
    ] = field(default_factory=dict)
    date: Annotated[
        str | None,
        Field(description="The day, as YYYY-MM-DD, that a template shall print which prints today's."),
    ] = None
    controls: Annotated[
        tuple[str, ...],
        Field(description="Control tokens that the template writes and the tokenizer lacks; see --add-tokens."),
    ] = ()

    def __post_init__(self) -> None:
        if self.date is not None:
            datetime.date.fromisoformat(self.date)

    @hookimpl
    def sftx_template(self, tokenizer: PreTrainedTokenizerBase) -> Template:
        from sftx_plugins.templates.jinja.template import JinjaTemplate

        source, from_file = self._source(tokenizer)
        return JinjaTemplate(
            source,
            tokenizer,
            variables=self._variables(),
            date=None if self.date is None else datetime.date.fromisoformat(self.date),
            controls=self.controls,
            chat_template=source if from_file else None,
        )

    def _variables(self) -> Mapping[str, Any]:
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return thinking | dict(self.template_kwargs)

    def _source(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
        """The template, and whether it is a file's and not the tokenizer's own. Raises ConfigError or PluginError."""
        own: Any = tokenizer.chat_template
        several = own if isinstance(own, dict) else {}
        if self.template is not None and self.template not in several:
            try:
                return Path(self.template).expanduser().read_text(encoding="utf-8"), True
            except (OSError, ValueError) as error:
                known = f", nor one of this tokenizer's templates ({', '.join(several)})" if several else ""
                raise ConfigError(f"option 'template': {self.template} is no file that can be read{known}") from error
        if several:
            name = self.template or "default"
            if name not in several:
                raise PluginError(f"the tokenizer has several chat templates; set template to {' or '.join(several)}")
            return several[name], False
        if not isinstance(own, str):
            raise PluginError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; choose another template plugin, such "
                "as chatml, or give a .jinja file with --set tokenizer.template=FILE"
            )
        return own, False
