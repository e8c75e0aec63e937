"""Compare what two runs left: every byte except durations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from sftx.atomic_files import CHECKSUMS, find_damage

TIMES: Final = frozenset(
    {"seconds", "phase_seconds", "tokens_per_second", "peak_bytes", "wall_seconds", "eval_runtime"}
)
"""Keys of JSON values in which two equal runs may differ."""
_SHOWS_DURATIONS: Final = "report.html"


def compared_files(run: Path) -> set[str]:
    """Return the files of a run directory that `differences` looks at, by their paths within it."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - {_SHOWS_DURATIONS}


def differences(ours: Path, theirs: Path, *, ignore: frozenset[str] = frozenset()) -> list[str]:
    """Return one line for each file in which two run directories differ; values under the keys TIMES are ignored.

    `ignore`: further keys of JSON values that may differ.
    """
    files = {root: compared_files(root) for root in (ours, theirs)}
    found = [f"{name}: only in {ours}" for name in sorted(files[ours] - files[theirs])]
    found += [f"{name}: only in {theirs}" for name in sorted(files[theirs] - files[ours])]
    for name in sorted(files[ours] & files[theirs]):
        if Path(name).name == CHECKSUMS:  # files with durations differ: check each against its own files
            places = ((root / name).parent for root in (ours, theirs))
            found += [f"{place}: {what}" for place in places if (what := find_damage(place)) is not None]
            continue
        left, right = (_content(root / name, TIMES | ignore) for root in (ours, theirs))
        if left != right:
            found.append(f"{name}: {_where(left, right)}")
    return found


def _content(path: Path, drop: frozenset[str]) -> Any:
    if path.suffix == ".json":
        return _without(json.loads(path.read_text(encoding="utf-8")), drop)
    if path.suffix == ".jsonl":
        return [_without(json.loads(line), drop) for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_bytes()


def _without(value: Any, drop: frozenset[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, drop) for key, inner in value.items() if key not in drop}
    if isinstance(value, list):
        return [_without(inner, drop) for inner in value]
    return value


def _where(left: Any, right: Any, path: str = "") -> str:
    """Return the first place in which two values differ."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return next(_where(left[key], right[key], f"{path}.{key}") for key in left if left[key] != right[key])
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        at = next(at for at, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
        return _where(left[at], right[at], f"{path}[{at}]")
    if isinstance(left, bytes) and isinstance(right, bytes):
        pairs = zip(left, right, strict=False)
        at = next((at for at, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(left), len(right)))
        return f"{len(left)} and {len(right)} bytes, the same up to byte {at}"
    return f"{path.lstrip('.') or 'value'}: {left!r:.200} and {right!r:.200}"
