"""Several runs side by side: short names, and the options and versions in which the runs differ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Final, TypeAlias

from sftx.config.flatten import flatten
from sftx.inspection.run_report.run_record import RunRecord, as_mapping, as_mappings

NOT_SET: Final = "–"
_MAX_CHARS: Final = 200
_CONTEXT_CHARS: Final = 40
"""At most so many characters that long texts share are shown before the first difference."""

Table: TypeAlias = list[tuple[str, list[str]]]
"""Names, each with its value in every run."""


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last part of each path, with as many parent directories as make it unique."""
    all_parts = [Path(os.path.realpath(path)).parts for path in paths]
    max_depth = max(map(len, all_parts))

    def short_name(parts: tuple[str, ...]) -> str:
        for depth in range(1, max_depth):
            if sum(other[-depth:] == parts[-depth:] for other in all_parts) == 1:
                return "/".join(parts[-depth:])
        return str(Path(*parts))

    return [short_name(parts) for parts in all_parts]


def differing_options(records: Sequence[RunRecord]) -> Table:
    """Return the options, by dotted names, that differ between run files; `plugins` is the plugins' order."""
    return _differing([_options(record) for record in records])


def differing_versions(records: Sequence[RunRecord]) -> Table:
    """Return the versions, devices, models and data that differ between manifests."""
    return _differing([dict(versions(record.manifest)) for record in records])


def versions(manifest: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return names and values of a manifest: the host, libraries, plugin versions, model and data."""
    names = ("sftx", "python", "platform", "device", "num_threads", "dtype")
    pairs = [(name.replace("_", " "), manifest.get(name)) for name in names]
    pairs += list(as_mapping(manifest.get("libraries")).items())
    pairs += [(f"plugin {line.get('plugin')}", line.get("version")) for line in as_mappings(manifest.get("plugins"))]
    model = as_mapping(manifest.get("model"))
    pairs += [("model", model.get("name")), ("model revision", model.get("revision"))]
    pairs += [("model sha256", model.get("sha256"))]
    for title, key in (("training data", "data"), ("held-out data", "eval_data")):
        sources = as_mappings(manifest.get(key))
        pairs += [(f"{title} {source.get('path')}", source.get("fingerprint")) for source in sources]
    return [(name, value) for name, value in pairs if value is not None]


def as_text(value: Any) -> str:
    """Return one short line: a string as it is, any other value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, _MAX_CHARS, placeholder=" ...") if len(text) > _MAX_CHARS else text


def _options(record: RunRecord) -> dict[str, Any]:
    if not record.config:
        return {}
    # The output directory differs between any two runs.
    values = {name: value for name, value in record.config.items() if name != "output_dir"}
    plugins = as_mapping(values.get("plugins"))
    # A plugin without options has an empty mapping; its name in `plugins` shows that it is used.
    flat = {
        name: value for name, value in flatten(values).items() if value or name.removeprefix("plugins.") not in plugins
    }
    return {"plugins": list(plugins), **flat}


def _differing(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Return the names whose values differ. A run without any values is not compared, and has NOT_SET everywhere."""
    known = [values for values in runs if values]
    table = []
    for name in dict.fromkeys(name for values in known for name in values):
        texts = {json.dumps(values.get(name), sort_keys=True, default=str) for values in known}
        if len(texts) > 1 or len({name in values for values in known}) > 1:
            table.append((name, _difference([values.get(name, NOT_SET) for values in runs])))
    return table


def _difference(values: Sequence[Any]) -> list[str]:
    """Return the values as short texts that show where they differ.

    Of lists, what all of them have is left out; of long texts, all but a little of the beginning that they share.
    """
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) > 1:
        items = [[as_text(item) for item in value] for value in lists]
        common = [item for item in items[0] if all(item in other for other in items[1:])]
        if len(common) > 1 and any(len(item) > len(common) for item in items):
            same = f"{len(common)} that all have"
            return [
                ", ".join([*(text for text in map(as_text, value) if text not in common), same])
                if isinstance(value, list)
                else as_text(value)
                for value in values
            ]
        return [", ".join(map(as_text, value)) if isinstance(value, list) else as_text(value) for value in values]
    texts = [value for value in values if isinstance(value, str) and value != NOT_SET]
    if len(texts) < 2 or max(map(len, texts)) <= _MAX_CHARS:
        return [as_text(value) for value in values]
    first = next((at for at, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1), 0)
    if (shared := first - _CONTEXT_CHARS) > 0:
        return [as_text(f"... {value[shared:]}" if value in texts else value) for value in values]
    return [as_text(value) for value in values]
