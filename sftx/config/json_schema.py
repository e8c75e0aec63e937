"""The JSON schema of a run file with certain plugins: for editors, and for whoever writes run files by program.

https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter

from sftx.config.options import RunConfig

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_SECTIONS: Final = ("data", "train", "generation")


def run_file_schema(classes: Mapping[str, type]) -> dict[str, Any]:
    """The schema of a run file whose plugins are these: the name of each and the dataclass of its options.

    Like `sftx run`, it takes a section or a plugin without options as null, and plugins as a list of names.
    """
    adapters: list[tuple[Any, Any, TypeAdapter[Any]]] = [
        (name, "validation", TypeAdapter(cls)) for name, cls in {"": RunConfig, **classes}.items()
    ]
    made, shared = TypeAdapter.json_schemas(adapters)
    definitions: dict[str, Any] = shared.get("$defs", {})
    run = definitions[made["", "validation"]["$ref"].rpartition("/")[2]]
    for definition in definitions.values():
        if definition.get("type") == "object" and "properties" in definition:
            definition.setdefault("additionalProperties", False)
    for section in _SECTIONS:
        run["properties"][section] = _or_null(run["properties"][section])
    options = {name: _or_null(made[name, "validation"]) for name in classes}
    run["properties"]["plugins"] = {
        "description": run["properties"]["plugins"]["description"],
        "anyOf": [
            {"type": "object", "properties": options, "additionalProperties": False},
            {"type": "array", "items": {"enum": sorted(classes)}},
            {"type": "null"},
        ],
    }
    return {"$schema": _DIALECT, **run, "title": "sftx run file", "$defs": definitions}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}
