"""The share of answers that are JSON, and fit a schema if one is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sftx import Metric, PluginError, hookimpl
from sftx_plugins.metrics._answers import library, parse_json


@dataclass(frozen=True, eq=False)
class JsonValid:
    """1 when the whole answer is one JSON value, which conforms to the schema if there is one; otherwise 0."""

    schema: Annotated[
        str | None,
        Field(min_length=1, description="File with a JSON schema that answers are to conform to; needs jsonschema."),
    ] = None

    @hookimpl
    def sftx_metric(self) -> Metric:
        return _Validity(_anything if self.schema is None else _validator(Path(self.schema).expanduser()))


@dataclass(frozen=True)
class _Validity:
    fits: Callable[[Any], bool]

    def __call__(self, prediction: str, reference: str) -> float:
        try:
            return float(self.fits(parse_json(prediction)))
        except (ValueError, RecursionError):  # nested deeper than a schema can be followed
            return 0.0


def _anything(value: Any) -> bool:
    return True


def _validator(path: Path) -> Callable[[Any], bool]:
    """Whether a value conforms to the schema in that file. Raises PluginError when it is none."""
    jsonschema = library("jsonschema", "jsonschema")
    try:
        schema = parse_json(path.read_text(encoding="utf-8"))
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        said = str(error).partition("\n")[0]
        raise PluginError(f"schema {path}: cannot be used: {said}; give a file with one JSON schema") from error
    # A registry of its own: by default a `$ref` to another host would be fetched from there.
    registry = library("referencing", "jsonschema").Registry()
    is_valid: Callable[[Any], bool] = kind(schema, registry=registry).is_valid
    return is_valid
