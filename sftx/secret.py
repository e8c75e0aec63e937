"""An option that nobody may read in a file, in a report or on a terminal: a token, a password."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from sftx.errors import ConfigError, hide

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema

ENV: Final = "env:"
"""What begins an option that names an environment variable instead of holding the secret."""

SECRET_TYPE: Final = "secret"
"""pydantic's type of the error that a value is no secret; its message has no value."""

MASK: Final = "***"


class Secret:
    """A secret option of a plugin. `env:NAME` names an environment variable; any other text is the secret itself.

    Everything that is written or printed has `env:NAME`, or `***` in place of the text; so do errors and logs that are
    printed, also those of the plugin itself, once the secret is known. Only `reveal` gives it away.
    Two secrets are equal when they are written alike.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the secret. Raises ConfigError when the environment lacks it, or only its mask is known."""
        if self._text == MASK:
            raise ConfigError(f"the secret was masked when the run file was written; give it again, best as {ENV}NAME")
        if not self._text.startswith(ENV):
            hide(self._text)
            return self._text
        name = self._text.removeprefix(ENV)
        if not (value := os.environ.get(name, "").strip()):
            raise ConfigError(f"the environment variable {name!r} is not set; export it, or name another one")
        hide(value)
        return value

    def __str__(self) -> str:
        return self._text if self._text.startswith(ENV) else MASK

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other) if isinstance(other, Secret) else NotImplemented

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import PydanticCustomError, core_schema

        def read(value: Any) -> Secret:
            if isinstance(value, Secret):
                return value
            if not str(value).startswith(ENV):
                hide(str(value))  # before any error about this plugin's options can quote it
            if not isinstance(value, str) or not value.removeprefix(ENV):
                raise PydanticCustomError(SECRET_TYPE, "text, in quotes where it looks like a number, or env:NAME")
            return cls(value)

        return core_schema.no_info_plain_validator_function(
            read, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "writeOnly": True}
