"""The plugin `tokenizer`: it renders the tokenizer's own chat template, or refuses it with the reason."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, JsonValue

from sftx import ConfigError, PluginError, Template, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class TokenizerTemplate:
    """The tokenizer's own chat template, in Jinja; the assistant's answers and their stop tokens are trained."""

    template: Annotated[
        str | None,
        Field(description="A .jinja file to use instead, or the name of one of the tokenizer's templates."),
    ] = None
    enable_thinking: Annotated[
        bool | None, Field(description="Passed to the template; many write empty reasoning if it is false.")
    ] = None
    template_kwargs: Annotated[
        dict[str, JsonValue], Field(description="Further variables of the template: {date_string: 26 Jul 2024}.")
    ] = field(default_factory=dict)
    date: Annotated[
        str | None,
        Field(description="The day, as YYYY-MM-DD, for a template that prints today's date."),
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

        source, is_file = self._source(tokenizer)
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return JinjaTemplate(
            source,
            tokenizer,
            variables=thinking | dict(self.template_kwargs),
            date=None if self.date is None else datetime.date.fromisoformat(self.date),
            controls=self.controls,
            chat_template=source if is_file else None,
        )

    def _source(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
        """Return the template, and whether it was read from a file. Raises ConfigError or PluginError."""
        own: Any = tokenizer.chat_template
        named = own if isinstance(own, dict) else {}
        if self.template is not None and self.template not in named:
            try:
                return Path(self.template).expanduser().read_text(encoding="utf-8"), True
            except (OSError, ValueError) as error:
                names = f", and not one of this tokenizer's templates ({', '.join(named)})" if named else ""
                raise ConfigError(f"option 'template': {self.template} is not a readable file{names}") from error
        if named:
            name = self.template or "default"
            if name not in named:
                raise PluginError(f"the tokenizer has several chat templates; set template to {' or '.join(named)}")
            return named[name], False
        if not isinstance(own, str):
            raise PluginError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template; choose another template plugin, such "
                "as chatml, or give a .jinja file with --set tokenizer.template=FILE"
            )
        return own, False
