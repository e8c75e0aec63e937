"""The plugins and options with which the run of a trained model reads rows and scores answers.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sftx import stores
from sftx.assembly.discovery import options_class
from sftx.assembly.registry import Assembly, activate
from sftx.checkpoint import layout
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config.loading import LoadedConfig, load
from sftx.config.options import DataConfig, RunConfig, Source, TrainConfig
from sftx.config.run_file import Origins
from sftx.data import sources
from sftx.errors import ConfigError

if TYPE_CHECKING:
    from sftx.checkpoint.load_run import LoadedRun
    from sftx.data.pipeline import DataPipeline

_STAGES: Final = frozenset({"source", "parser", "collator", "loss", "metric", "evaluator"})
"""What is taken over from a run. Template and adapters come with its model; other plugins need not be installed."""

_TRAIN_OPTIONS: Final = ("per_device_eval_batch_size", "tf32")
"""What an evaluation takes of the options of training."""


@dataclass(frozen=True)
class RunPlugins:
    """The options of a run and its plugins that read and score; those of a model without a run are the default ones."""

    config: RunConfig
    origins: Origins
    assembly: Assembly

    def check(self, rows: Sequence[Source]) -> None:
        """Check that the sources are there and their formats known, before anything heavy is imported.

        Raises ConfigError, DataError.
        """
        from sftx.data.pipeline import check_formats

        check_formats(self.config.data, self.origins, list(self.assembly.parsers()))
        stores.refresh()
        for source in rows:
            sources.check(source, self.assembly.row_sources)

    def pipeline(self, loaded: LoadedRun) -> DataPipeline:
        """Return the data pipeline of the run, with the tokenizer and the template of its model."""
        from sftx.data.pipeline import DataPipeline
        from sftx.data.row_encoder import RowEncoder

        # Without the cache, whose key would have to know the template.
        data = dataclasses.replace(self.config.data, cache=False)
        return DataPipeline(
            config=data,
            assembly=self.assembly,
            model=str(loaded.directory),
            tokenizer=loaded.tokenizer,
            encode=RowEncoder(self.assembly.parsers(), loaded.encoder, data),
            collator=self.assembly.collator(data.max_length),
            added_tokens=(),
            own_chat_template=None,
        )


def plugins_of(
    model: str,
    *,
    rows: Sequence[str] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    assignments: Sequence[tuple[str, Any, str]] = (),
) -> RunPlugins:
    """Return the plugins of MODEL with those that are added and without those that are removed.

    `rows`: held-out rows instead of the run's own. `assignments`: options as the command line has them. Raises
    ConfigError, PluginError.
    """
    run = layout.run_of(Path(model).expanduser())
    given: list[tuple[str, Any, str]] = []
    if rows:
        given += [("data.eval", list(rows), "rows"), ("data.eval_fraction", None, "rows")]
    if run is None:
        given.append(("data.train", list(rows), "rows"))  # without any, it would be the embedded run
    path = None if run is None else run / layout.RUN
    loaded = load(path, add=add, remove=remove, assignments=[*given, *assignments], plugin_class=options_class)
    stages = _stages_of(run)
    plugins = {
        name: options
        for name, options in loaded.config.plugins.items()
        if name in add or stages.get(name, _STAGES) & _STAGES
    }
    typed = {name: f"--plugin {name}" for name in add}
    typed |= {name: f"--no-plugin {name}" for name in remove if not stages.get(name, _STAGES) & _STAGES}
    for dotted, _, option in assignments:
        first, _, rest = dotted.removeprefix("plugins.").partition(".")
        if first in loaded.config.plugins:
            typed[first] = option
        elif first == "train" and rest not in _TRAIN_OPTIONS:
            raise ConfigError(f"{option}: is an option of training, and nothing is trained here; leave it out")
    before = loaded.config.train
    train = TrainConfig(**{name: getattr(before, name) for name in _TRAIN_OPTIONS})
    config = dataclasses.replace(loaded.config, plugins=plugins, train=train, without=tuple(remove))
    assembly = activate(LoadedConfig(config, loaded.origins))
    active = {one.info.name for stage in _STAGES for one in assembly.providers(f"sftx_{stage}")}
    for name in typed.keys() - active:
        raise ConfigError(
            f"{typed[name]}: {name} neither reads nor scores rows; leave it out: template and adapters are those of "
            "the model"
        )
    return RunPlugins(config, loaded.origins, assembly)


def _stages_of(run: Path | None) -> Mapping[str, frozenset[str]]:
    """Return the stages that each plugin of a run had."""
    manifest = None if run is None else RunDirectory(run).read_json(layout.MANIFEST)
    stages: dict[str, set[str]] = {}
    for line in (manifest or {}).get("plugins", ()):
        stages.setdefault(line["plugin"], set()).add(line["stage"])
    return {name: frozenset(of) for name, of in stages.items()}


def check_has_rows(data: DataConfig, model: str) -> None:
    """Raise ConfigError when neither the options nor the run of the model have held-out rows."""
    if not data.has_eval:
        raise ConfigError(f"{model}: has no held-out rows of its own; give some with --eval-data")
