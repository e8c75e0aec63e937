"""The Python interface: `sftx.run`, `sftx.resume`, `sftx.inspect` and `sftx.plan`, for scripts and notebooks.

An option is a keyword with the name that it has in a run file, and its errors are those of the command line. Rows may
be given as they are: a list of dicts, a `datasets.Dataset`, or anything else that yields dicts.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import reprlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from sftx.assembly.discovery import options_class
from sftx.assembly.peft_config import go_on_from_adapter
from sftx.config import loading
from sftx.config.loading import LoadedConfig
from sftx.config.options import SECTION_CLASSES, DataConfig, Source
from sftx.display import shown_phases
from sftx.errors import ConfigError, DataError
from sftx.events import Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sftx.checkpoint.load_run import LoadedRun
    from sftx.inspection.memory_plan.planner import RunPlan
    from sftx.inspection.token_report.explained_rows import TokenReport

Data: TypeAlias = str | os.PathLike[str] | Iterable[Any]
"""A path, a list of paths, sources as a run file has them, or rows: dicts, a `datasets.Dataset`, a generator."""

_OPTIONS: Final = {"generation_batch_size": "generation.batch_size"} | {
    field.name: f"{section}.{field.name}"
    for section, cls in SECTION_CLASSES.items()
    for field in dataclasses.fields(cls)
    if (section, field.name) not in (("data", "train"), ("data", "eval"), ("generation", "batch_size"))
}
"""The dotted name of each keyword; as on the command line, a section need not be named."""

_running: Final = threading.Lock()
"""Held during a run: transformers cannot load two models at once, and both would draw from torch's one generator."""

_SOURCE_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(Source))


@dataclasses.dataclass(frozen=True)
class TrainedRun(Result):
    """The result of `sftx.run`: the run directory, its summary, and the model that was saved there."""

    @cached_property
    def loaded(self) -> LoadedRun:
        """The fine-tuned model with its tokenizer and template, read from the run directory at the first use."""
        from sftx.checkpoint.load_run import load_run

        return load_run(self.output_dir)

    @property
    def model(self) -> PreTrainedModel:
        """The model with its adapters, in eval mode; `generate` stops at the template's stop tokens."""
        return self.loaded.lm.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that the model was trained with."""
        return self.loaded.tokenizer

    @property
    def metrics(self) -> dict[str, float]:
        """The means over the held-out rows after training, by name (`loss`, `exact-match`, ...); empty without rows."""
        return dict(self.summary.get("held_out", {}).get("after", {}))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one for each step and each evaluation."""
        lines = (self.output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def answer(self, *questions: str, max_new_tokens: int = 256) -> list[str]:
        """Return the model's greedy answer to each question, asked as the user's first turn."""
        from sftx.types import Conversation, Message

        loaded = self.loaded
        prompts = [loaded.prompt(Conversation((Message("user", question),))) for question in questions]
        answers = loaded.answer(prompts, max_new_tokens=max_new_tokens)
        return [str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Rows of a run, token by token. A notebook shows it as a page, `print` as text."""

    report: TokenReport

    @cached_property
    def html(self) -> str:
        """The page of `sftx inspect --html`, complete in one text."""
        from sftx.inspection.token_report.token_page import token_page

        return token_page(self.report)

    def __str__(self) -> str:
        from rich.console import Console

        from sftx.inspection.token_report.terminal import print_report

        console = Console(highlight=False, width=120)
        with console.capture() as capture:
            print_report(self.report, console, ids=False)
        return capture.get()

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.html)}" style="width: 100%; height: 40em; border: 0"></iframe>'


def run(
    run_file: str | os.PathLike[str] | None = None,
    *,
    data: Data | None = None,
    eval_data: Data | None = None,
    plugins: Mapping[str, Mapping[str, Any] | None] | Iterable[str] = (),
    resume: bool = False,
    **options: Any,
) -> TrainedRun:
    """Fine-tune a model, and return the run directory with the model that was saved in it.

    `run_file`: a run file (YAML), whose values the keywords override; with neither it nor `data` it is the demo.
    `data`, `eval_data`: training and held-out rows. A mapping given as `data` is the section `data` of a run file.
    `plugins`: names of plugins, or a mapping of names to their options; they follow those of the run file.
    `resume`: go on from the newest checkpoint in `output_dir`, and begin when there is none.
    `options`: the options of a run file under their own names, such as `model`, `output_dir`, `learning_rate` or
    `max_length`; a section may also be given as a mapping, `train={"learning_rate": 1e-4}`.

    Raises SftxError: ConfigError, DataError, ModelError, OutputError, PluginError or TrainingError.
    """
    if not isinstance(resume, bool):
        raise ConfigError(
            f"resume={resume!r:.80}: expected True or False; the directory to go on in is output_dir, as in "
            "sftx.resume(output_dir)"
        )
    loaded = _load(run_file, data, eval_data, plugins, options)
    # Rows that were given as such lie in a file that is named after their hash, which is no name for a run.
    is_named = run_file is not None or data is None or isinstance(data, str | os.PathLike)
    name = loading.default_name(None if run_file is None else Path(run_file), loaded.config) if is_named else "run"
    from sftx.training import run as run_loaded

    if not _running.acquire(blocking=False):
        raise ConfigError("another run is at work in this process; wait for its end, or start another process")
    try:
        with shown_phases():
            result = run_loaded(loaded, name=name, resume=resume)
    finally:
        _running.release()
    return TrainedRun(result.output_dir, result.summary)


def resume(run_dir: str | os.PathLike[str], **options: Any) -> TrainedRun:
    """Continue an interrupted run from its newest checkpoint; a run that is complete is returned as it is.

    `options` are those of `run`; only such that do not change what the run computes may differ. Raises SftxError.
    """
    path = _path(run_dir, "run_dir", "the directory of a run")
    if not (path / "run.yaml").is_file():
        raise ConfigError(f"{path}: is no run directory, which has a run.yaml; give the output_dir of a run")
    for name in ("run_file", "output_dir", "resume"):
        if name in options:
            raise ConfigError(f"{name}: has no meaning for sftx.resume, which goes on in {path}; leave it out")
    return run(path / "run.yaml", output_dir=path, resume=True, **options)


def inspect(
    run_file: str | os.PathLike[str] | None = None,
    *,
    data: Data | None = None,
    eval_data: Data | None = None,
    plugins: Mapping[str, Mapping[str, Any] | None] | Iterable[str] = (),
    rows: int = 10,
    split: Literal["train", "eval"] = "train",
    **options: Any,
) -> Inspection:
    """Return the first `rows` rows of a run as tokens: which are trained, why, and what was dropped or truncated.

    The other arguments are those of `run`. No weights are read. Raises SftxError.
    """
    from sftx.inspection.dataset_view import view_dataset
    from sftx.inspection.token_report.explained_rows import RowSelection, inspect_rows

    if type(rows) is not int or rows < 0:
        raise ConfigError(f"rows={rows!r:.80}: expected a number of rows")
    if split not in ("train", "eval"):
        raise ConfigError(f"split={split!r:.80}: expected 'train' or 'eval'")
    loaded = _load(run_file, data, eval_data, plugins, options)
    if split == "eval" and not (loaded.config.data.has_eval):
        raise ConfigError("split='eval': the run has no held-out rows; give eval_data or eval_fraction")
    view = view_dataset(loaded)
    return Inspection(inspect_rows(view, split, RowSelection("first", rows, ())))


def plan(
    run_file: str | os.PathLike[str] | None = None,
    *,
    data: Data | None = None,
    eval_data: Data | None = None,
    plugins: Mapping[str, Mapping[str, Any] | None] | Iterable[str] = (),
    gpu: str = "cpu",
    nproc: int = 1,
    **options: Any,
) -> RunPlan:
    """Estimate the memory and time of a run; of the model, config.json is read and, for the time, the tokenizer.

    `gpu`: a GPU's memory (`24GB`), a card's name (`H100`), or `cpu`. `nproc`: processes, each on a device of its own.
    The other arguments are those of `run`. Raises SftxError.
    """
    from sftx.inspection.memory_plan import target_device
    from sftx.inspection.memory_plan.planner import plan_run

    if not isinstance(gpu, str):
        raise ConfigError(f"gpu={gpu!r:.80}: expected text, such as '24GB', 'H100' or 'cpu'")
    if type(nproc) is not int or nproc < 1:
        raise ConfigError(f"nproc={nproc!r:.80}: expected a number of processes")
    loaded = _load(run_file, data, eval_data, plugins, options)
    return plan_run(loaded, target_device.parse(gpu), num_processes=nproc)


def _load(
    run_file: str | os.PathLike[str] | None,
    data: Data | None,
    eval_data: Data | None,
    plugins: Mapping[str, Mapping[str, Any] | None] | Iterable[str],
    options: Mapping[str, Any],
) -> LoadedConfig:
    """Return the run that the arguments describe; an error names the keyword. Raises ConfigError, DataError."""
    file = None if run_file is None else _path(run_file, "run_file", "the path of a run file")
    options = dict(options)
    # A DatasetDict has splits, not options.
    if isinstance(data, Mapping) and not hasattr(data, "save_to_disk") and not _is_source(data):
        if data and not set(data) & set(DataConfig.__dataclass_fields__) and all(map(_is_column, data.values())):
            raise DataError(
                "data: is a dict of columns; give datasets.Dataset.from_dict(...) of it, or a list of dicts"
            )
        data, options["data"] = None, data
    named = _named_plugins(plugins)
    values: dict[str, tuple[Any, str]] = {}

    def add(option: str, value: Any, keyword: str) -> None:
        if option in values:
            raise ConfigError(f"{keyword}: {values[option][1]} sets the same option; leave one of them out")
        values[option] = (value, keyword)

    for name, value in options.items():
        if name in SECTION_CLASSES and isinstance(value, Mapping):
            for option, inner in value.items():
                add(f"{name}.{option}", inner, f"{name}[{option!r}]")
        else:
            # A name that does not exist is refused with what to write instead, as on the command line.
            add(_OPTIONS.get(name, name), value, name)
    for name, sources in (("data", data), ("eval_data", eval_data)):
        if sources is not None:
            add("data.train" if name == "data" else "data.eval", sources, name)
    for name in ("data.train", "data.eval"):
        if name in values:
            values[name] = (_sources(values[name][0], values[name][1]), values[name][1])
    for plugin, plugin_options in named.items():
        if plugin_options:
            values[f"plugins.{plugin}"] = (plugin_options, f"plugins[{plugin!r}]")
    without = values.pop("without", ((), ""))[0]
    return go_on_from_adapter(
        loading.load(
            file,
            add=list(named),
            remove=_names(without, "without"),
            assignments=[
                (name, plain := _json_value(value), f"{keyword}={reprlib.repr(plain)}")
                for name, (value, keyword) in values.items()
            ],
            plugin_class=options_class,
        )
    )


def _path(value: Any, name: str, what: str) -> Path:
    """Return a path that an argument gives. Raises ConfigError."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(
            f"{name}: is of type {type(value).__name__}, expected {what}; rows are given as data, options as keywords"
        )
    return Path(value)


def _named_plugins(plugins: Any) -> dict[str, Any]:
    """Return the options of plugins by their names. Raises ConfigError."""
    if isinstance(plugins, Mapping):
        return dict(zip(_names(list(plugins), "plugins"), plugins.values(), strict=True))
    return dict.fromkeys(_names(plugins, "plugins"))


def _names(value: Any, keyword: str) -> list[str]:
    """Return names of plugins, of which there may be one, several or none. Raises ConfigError."""
    given = [value] if isinstance(value, str) else () if value is None else value
    names = list(given) if isinstance(given, Iterable) else [given]
    if all(isinstance(name, str) for name in names):
        return names
    mapping = ", or a mapping of names to options" if keyword == "plugins" else ""
    raise ConfigError(f"{keyword}={reprlib.repr(value)}: expected names of plugins{mapping}")


def _is_column(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _sources(data: Any, name: str) -> Any:
    """Return data as a run file has it; rows are written to the cache directory first."""
    paths = [data] if _is_source(data) else data
    if isinstance(paths, Sequence) and paths and all(_is_source(item) for item in paths):
        if any(isinstance(path, str) and path.lstrip().startswith("{") for path in paths):
            raise DataError(
                f"{name}: is the text of rows, where paths are expected; give rows as dicts: json.loads(line)"
            )
        return str(data) if isinstance(data, str | os.PathLike) else list(paths)
    from sftx.data.python_rows import save_rows

    return str(save_rows(data, name))


def _is_source(item: Any) -> bool:
    """Return whether an item of a list is a source as in a run file, and no row."""
    return isinstance(item, str | os.PathLike) or (
        isinstance(item, Mapping) and "path" in item and _SOURCE_FIELDS.issuperset(item)
    )


def _json_value(value: Any) -> Any:
    """Return a Python value as a run file would hold it: a path as text, a scalar of numpy as a number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_value(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
