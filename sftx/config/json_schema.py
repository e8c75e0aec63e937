"""Makes the JSON schema of a run file with given plugins, for editors and for programs that write run files.

https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic import TypeAdapter

from sftx.config.named_plugins import PLUGIN_OPTIONS
from sftx.config.options import SECTION_CLASSES, RunConfig

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def run_file_schema(classes: Mapping[str, type]) -> dict[str, Any]:
    """Return the schema of a run file with the plugins `classes`: the options dataclass of each, by its name.

    As in `sftx run`, a section or a plugin without options may be null, and plugins may be a list of names.
    """
    adapters: list[tuple[Any, Any, TypeAdapter[Any]]] = [
        (name, "validation", TypeAdapter(cls)) for name, cls in {"": RunConfig, **classes}.items()
    ]
    schemas, shared = TypeAdapter.json_schemas(adapters)
    definitions: dict[str, Any] = shared.get("$defs", {})
    run = definitions[schemas["", "validation"]["$ref"].rpartition("/")[2]]
    for definition in definitions.values():
        if definition.get("type") == "object" and "properties" in definition:
            definition.setdefault("additionalProperties", False)
    train = definitions[run["properties"]["train"]["$ref"].rpartition("/")[2]]["properties"]
    for option in PLUGIN_OPTIONS:
        of_plugins = [name for name, cls in classes.items() if hasattr(cls, option.hook)]
        train[option.name]["enum"] = list(dict.fromkeys((*option.built_in, *option.aliases, *of_plugins)))
    groups = {section: run["properties"][section] for section in SECTION_CLASSES}
    groups |= {f"plugins.{name}": schemas[name, "validation"] for name in classes}
    # The same options under their dotted names. As patterns they are checked, and no editor proposes them twice.
    run["patternProperties"] = {
        f"^{re.escape(f'{group}.{name}')}$": option
        for group, schema in groups.items()
        for name, option in definitions[schema["$ref"].rpartition("/")[2]].get("properties", {}).items()
    }
    for section in SECTION_CLASSES:
        run["properties"][section] = {"anyOf": [run["properties"][section], {"type": "null"}]}
    options = {name: {"anyOf": [schemas[name, "validation"], {"type": "null"}]} for name in classes}
    run["patternProperties"] |= {f"^{re.escape(f'plugins.{name}')}$": option for name, option in options.items()}
    run["properties"]["plugins"] = {
        "description": run["properties"]["plugins"]["description"],
        "anyOf": [
            {"type": "object", "properties": options, "additionalProperties": False},
            {"type": "array", "items": {"enum": sorted(classes)}},
            {"type": "null"},
        ],
    }
    return {"$schema": _DIALECT, **run, "title": "sftx run file", "$defs": definitions}
