"""Lets both tools make a batch of the same rows, and compares it token by token and label by label."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sftx.assembly.discovery import options_class
from sftx.config import loading
from sftx.errors import ConfigError
from sftx.migration.translation import Translation
from sftx.phases import phase

if TYPE_CHECKING:
    from sftx.types import Batch

_PACKAGES: Final = {"trl": "trl", "llama-factory": "llamafactory"}
"""The packages of the tools whose batches can be made; the others have no function that makes one."""
_SCRIPT: Final = Path(__file__).with_name("other_batch.py")

Document: TypeAlias = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids, and for each whether the model is trained to produce it."""


@dataclass
class Comparison:
    """The batches that two tools made of the same rows."""

    title: str
    num_documents: int = 0
    num_tokens: int = 0
    num_labels: int = 0
    """Of what is the same in both."""
    num_untrained: int = 0
    """Documents of the other tool in which no token is trained; such a row is left out here."""
    differences: list[str] = field(default_factory=list)
    """One line for each document that differs, with the first place."""

    @property
    def is_same(self) -> bool:
        return not self.differences

    def lines(self) -> list[str]:
        same = f"{self.num_documents} examples with {self.num_tokens:,} tokens, {self.num_labels:,} of them trained"
        if self.num_untrained:
            same += f"; {self.num_untrained} more train nothing there, and are left out here"
        if self.is_same:
            return [f"check: the same in {self.title} and sftx, token by token and label by label: {same}"]
        shown = self.differences[:5]
        more = [f"  and {len(self.differences) - 5} more"] if len(self.differences) > 5 else []
        differ = f"{len(self.differences)} examples differ" if self.differences[1:] else "1 example differs"
        return [
            f"check: {differ} between {self.title} and sftx; the same: {same}",
            *shown,
            *more,
        ]


def compare_batches(made: Translation, text: str, *, python: str | None = None, num_rows: int = 8) -> Comparison:
    """Compare the first rows of each source in both tools. `text` is the run file. Raises ConfigError.

    `python` is the interpreter of the environment that the other tool is installed in.
    """
    package = _PACKAGES.get(made.reading.tool)
    if package is None:
        raise ConfigError(
            f"--check: batches of {made.title} cannot be made here; `sftx inspect` shows those of the run file"
        )
    strategy = made.written.get("plugins.packed.strategy")
    if strategy is not None and strategy.value == "wrapped":
        raise ConfigError(
            f"--check: {made.title} joins texts and cuts them into rows, in which no document is told from the next, "
            "so there is nothing to compare; `sftx inspect` shows the rows of the run file"
        )
    _require(made, package, python)
    loaded = _limited(text, num_rows)
    theirs, version = _theirs(made, loaded.config.model, python, num_rows)
    ours, tokenizer = _ours(loaded)
    found = _compared(f"{made.title} {version}", theirs, ours, tokenizer, loaded.config.data.max_length)
    if found.is_same and not found.num_documents:
        raise ConfigError("--check: none of these rows trains anything in either; see more of them with --check-rows")
    return found


def _limited(text: str, num_rows: int) -> loading.LoadedConfig:
    """Return the run with its first rows only, none of them held out, however many are dropped."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        loaded = loading.load(path, plugin_class=options_class)
    data = loaded.config.data
    sources = tuple(dataclasses.replace(s, limit=min(num_rows, s.limit or num_rows), weight=1.0) for s in data.train)
    data = dataclasses.replace(
        data, train=sources, eval=(), eval_fraction=None, streaming=False, num_proc=1, max_dropped=1.0
    )
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, data=data))


def _theirs(made: Translation, model: str, python: str | None, num_rows: int) -> tuple[list[Document], str]:
    from sftx.model import names

    options = {name: option.value for name, option in made.reading.options.items()}
    request = {"tool": made.reading.tool, "options": options, "model": str(names.resolve(model)), "num_rows": num_rows}
    with tempfile.TemporaryDirectory() as directory, phase("asking", made.title):
        asked, answered = Path(directory) / "request.json", Path(directory) / "answer.json"
        asked.write_text(json.dumps(request, default=str), encoding="utf-8")
        command = [python or sys.executable, "-I", str(_SCRIPT), str(asked), str(answered)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if not answered.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
            raise ConfigError(f"--check: {made.title} made no batch: {last[0]}")
        answer = json.loads(answered.read_text(encoding="utf-8"))
    documents = [(tuple(ids), tuple(map(bool, trained))) for ids, trained in answer["documents"]]
    return [_first_untrained(document) for document in documents], str(answer["version"])


def _require(made: Translation, package: str, python: str | None) -> None:
    """Raise ConfigError unless the other tool is installed."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        done = subprocess.run([python or sys.executable, "-I", "-c", look], check=False, capture_output=True)
    except OSError as error:
        raise ConfigError(f"--check-python {python}: cannot be started: {error}") from None
    if done.returncode:
        where = f"in the environment of {python}" if python else "in this environment"
        advice = "" if python else "; name the interpreter of its environment with --check-python"
        raise ConfigError(f"--check: {made.title} is not installed {where} (no module {package}){advice}")


def _ours(loaded: loading.LoadedConfig) -> tuple[list[Document], Any]:
    from sftx.inspection.dataset_view import view_dataset

    view = view_dataset(loaded)
    examples = list(view.dataset("train").examples)
    if problems := view.problems("train"):
        raise ConfigError(f"--check: {problems[0]}")
    collator = view.pipeline.collator
    batch = collator.collate(sorted(examples, key=lambda example: example.group))
    return _documents(batch), view.pipeline.tokenizer


def _documents(batch: Batch) -> list[Document]:
    """Take a batch apart, and let labels stand at their own tokens: those of a batch are shifted."""
    from sftx.types import IGNORE_INDEX

    ids, labels = batch.input_ids_BT.tolist(), batch.labels_BT.tolist()
    spans: list[tuple[int, int, int]] = []
    if batch.cu_seqlens is not None:
        bounds = batch.cu_seqlens.tolist()
        spans = [(0, start, end) for start, end in itertools.pairwise(bounds)]
    elif batch.lengths_B is not None:
        spans = [(row, 0, length) for row, length in enumerate(batch.lengths_B.tolist())]
    return [
        (tuple(ids[row][start:end]), (False, *(label != IGNORE_INDEX for label in labels[row][start : end - 1])))
        for row, start, end in spans
    ]


def _first_untrained(document: Document) -> Document:
    """Nothing predicts the first token, so its label is never used."""
    ids, trained = document
    return ids, (False, *trained[1:])


def _compared(
    title: str, theirs: Sequence[Document], ours: Sequence[Document], tokenizer: Any, max_length: int | None = None
) -> Comparison:
    """Pair equal documents in any order, and the others in theirs."""
    with_labels = [document for document in theirs if any(document[1])]
    result = Comparison(title, num_untrained=len(theirs) - len(with_labels))
    theirs = with_labels
    common = Counter(theirs) & Counter(ours)
    for (ids, trained), count in common.items():
        result.num_documents += count
        result.num_tokens += count * len(ids)
        result.num_labels += count * sum(trained)
    left, right = _rest(theirs, common), _rest(ours, common)
    for there, here in zip(left, right, strict=False):
        is_cut = max_length in (len(there[0]), len(here[0]))
        cut = (
            f" (this row is cut to {max_length:,} tokens: docs/data.md says how data.long_rows cuts)" if is_cut else ""
        )
        result.differences.append(f"  {_difference(there, here, tokenizer)}{cut}")
    result.differences += [f"  only in {title}: {_text(ids[:20], tokenizer)}" for ids, _ in left[len(right) :]]
    result.differences += [f"  only in sftx: {_text(ids[:20], tokenizer)}" for ids, _ in right[len(left) :]]
    return result


def _rest(documents: Sequence[Document], common: Counter[Document]) -> list[Document]:
    remaining, rest = Counter(common), []
    for document in documents:
        if remaining[document]:
            remaining[document] -= 1
        else:
            rest.append(document)
    return rest


def _difference(there: Document, here: Document, tokenizer: Any) -> str:
    """Say where two documents first differ."""
    for at, (a, b) in enumerate(zip(there[0], here[0], strict=False)):
        if a != b:
            before = _text(there[0][max(0, at - 6) : at], tokenizer)
            return f"token {at}, after {before}: {_text([a], tokenizer)} there, {_text([b], tokenizer)} here"
    if len(there[0]) != len(here[0]):
        shared = min(len(there[0]), len(here[0]))
        longer, where = (there[0], "there") if len(there[0]) > shared else (here[0], "here")
        more = _text(longer[shared : shared + 8], tokenizer)
        return f"token {shared}: {len(longer) - shared} more follow {where}: {more}"
    places = [at for at, (a, b) in enumerate(zip(there[1], here[1], strict=True)) if a != b]
    first = places[0]
    is_there = there[1][first]
    return (
        f"the same {len(there[0])} tokens, and {len(places)} labels differ: token {first} "
        f"{_text(here[0][first : first + 1], tokenizer)} is trained {'there' if is_there else 'here'} only"
    )


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    return repr(str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))


def compare(made: Translation, text: str, *, python: str | None, num_rows: int) -> bool:
    """Print a comparison; return whether the batches are the same."""
    import click

    found = compare_batches(made, text, python=python, num_rows=num_rows)
    for line in found.lines():
        click.echo(line)
    return found.is_same
