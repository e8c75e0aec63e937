"""The share of answers that are valid JSON, and conform to a schema if one is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sftx import Metric, PluginError, hookimpl
from sftx_plugins.metrics._answers import import_library, parse_json


@dataclass(frozen=True, eq=False)
class JsonValid:
    """1 if the whole answer is one JSON value that conforms to the schema, if there is one; otherwise 0."""

    schema: Annotated[
        str | None,
        Field(min_length=1, description="File with a JSON schema for the answers; needs jsonschema."),
    ] = None

    @hookimpl
    def sftx_metric(self) -> Metric:
        check = JsonCheck.of(self.schema)
        return lambda prediction, reference: float(bool(check(prediction)[1]))


@dataclass(frozen=True)
class JsonCheck:
    """Reads answers as JSON, and checks them against a schema if there is one."""

    is_valid: Callable[[Any], bool] | None

    @classmethod
    def of(cls, schema: str | None) -> JsonCheck:
        """Return the check by a file with a JSON schema. Raises PluginError for one that cannot be used."""
        return cls(None if schema is None else _validator(Path(schema).expanduser()))

    def __call__(self, text: str) -> tuple[Any, bool | None]:
        """Return the value of the text and whether it conforms; None for the latter when it is no JSON value."""
        try:
            value = parse_json(text)
        except ValueError:
            return None, None
        try:
            return value, self.is_valid is None or self.is_valid(value)
        except RecursionError:  # nested too deeply for the schema
            return value, False


def _validator(path: Path) -> Callable[[Any], bool]:
    """Return a function that checks a value against the schema in a file. Raises PluginError for a bad schema."""
    jsonschema = import_library("jsonschema", "jsonschema")
    try:
        schema = parse_json(path.read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(f"schema {path}: cannot be used: {reason}; give a file with one JSON schema") from error
    # With an empty registry, a `$ref` to another host is not fetched.
    registry = import_library("referencing", "jsonschema").Registry()
    is_valid: Callable[[Any], bool] = kind(schema, registry=registry).is_valid
    return is_valid
