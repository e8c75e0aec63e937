"""Several runs side by side: what they are called, what differs between their run files, and between their versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

from sftx.inspection.run_report.run_record import RunRecord

NOT_SET: Final = "–"
_MOST_CHARS: Final = 200
_OF_THIS_PLACE: Final = ("output_dir",)
"""What differs between any two runs and says nothing."""

Table = list[tuple[str, list[str]]]
"""Names, each with its value in every run."""


def names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many of those before it as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    deepest = max(map(len, parts))

    def called(own: tuple[str, ...]) -> str:
        for depth in range(1, deepest):
            if sum(other[-depth:] == own[-depth:] for other in parts) == 1:
                return "/".join(own[-depth:])
        return str(Path(*own))

    return [called(own) for own in parts]


def options(records: Sequence[RunRecord]) -> Table:
    """The options, by dotted names, that are not the same in all run files; `plugins` is their order."""
    return _differing([_options(record) for record in records])


def versions(records: Sequence[RunRecord]) -> Table:
    """What is not the same in all manifests: versions, device, model and data."""
    return _differing([dict(facts(record.manifest)) for record in records])


def facts(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a manifest says of the host, the libraries and what was read; its plugins have a table of their own."""
    found = [
        (name.replace("_", " "), manifest.get(name))
        for name in ("sftx", "python", "platform", "device", "num_threads", "dtype")
    ]
    found += list(mapping(manifest.get("libraries")).items())
    found += [(f"plugin {one.get('plugin')}", one.get("version")) for one in mappings(manifest.get("plugins"))]
    model = mapping(manifest.get("model"))
    found += [("model", model.get("name")), ("model revision", model.get("revision"))]
    found += [("model sha256", model.get("sha256"))]
    for what, key in (("training data", "data"), ("held-out data", "eval_data")):
        found += [(f"{what} {source.get('path')}", source.get("fingerprint")) for source in mappings(manifest.get(key))]
    return [(name, value) for name, value in found if value is not None]


def shown(value: Any) -> str:
    """One short line: text as it is, everything else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, _MOST_CHARS, placeholder=" ...") if len(text) > _MOST_CHARS else text


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` where it is what it should be; empty otherwise."""
    return {str(name): inner for name, inner in value.items()} if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """Those of a list that are objects."""
    return [mapping(one) for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _options(record: RunRecord) -> dict[str, Any]:
    values = {name: value for name, value in record.config.items() if name not in _OF_THIS_PLACE}
    flat = _flat(values)
    plugins = mapping(values.get("plugins"))
    # A plugin without options is on where its name stands in the order.
    flat = {name: value for name, value in flat.items() if name.removeprefix("plugins.") not in plugins or value}
    return {"plugins": ", ".join(plugins), **flat} if record.config else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return found


def _differing(values: Sequence[Mapping[str, Any]]) -> Table:
    """A run of which nothing is known differs in nothing, and has no value."""
    known = [one for one in values if one]
    every = dict.fromkeys(name for one in known for name in one)
    texts = {name: [json.dumps(one.get(name), sort_keys=True, default=str) for one in known] for name in every}
    return [
        (name, [shown(one[name]) if name in one else NOT_SET for one in values])
        for name in every
        if len(set(texts[name])) > 1 or len({name in one for one in known}) > 1
    ]
