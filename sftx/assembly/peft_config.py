"""Adapters on disk, by PEFT's adapter_config.json: which plugin computes them, and runs that go on from one.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sftx.assembly.discovery import load_class
from sftx.assembly.entry_points import discover, find
from sftx.config.loading import LoadedConfig
from sftx.errors import ConfigError, ModelError, SftxError, one_line
from sftx.stores import is_address, model_directory

log = logging.getLogger(__name__)

PEFT_CONFIG: Final = "adapter_config.json"
INIT_FROM: Final = "init_from"
"""The option of an adapter plugin that names the directory of an adapter to begin with."""
BASE_ADAPTERS: Final = "base_adapters"
"""The option of an adapter plugin that names the directories of adapters below it, which its own files hold too."""


@dataclass(frozen=True)
class PeftConfig:
    """The content of adapter_config.json as far as a run needs it."""

    plugin: str
    options: Mapping[str, Any]
    base: str
    token_ids: tuple[int, ...]


def read_peft_config(path: Path, plugin: str | None = None) -> PeftConfig:
    """Return which plugin's adapter PEFT saved, with its options, and what else its configuration says.

    The plugin has the name of PEFT's type, unless another is named, and a class method `options_of_peft`, which returns
    the options and the keys that it has none for. Raises ModelError when there is no such plugin, or it cannot compute
    the variant.
    """
    advice = "merge the adapter with PEFT (merge_and_unload, save_pretrained) and load the merged model"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        peft_type, base = str(values["peft_type"]), values["base_model_name_or_path"]
        plugin = plugin or peft_type.lower()
        installed = next((info for info in discover() if info.name == plugin), None)
        convert = getattr(load_class(installed), "options_of_peft", None) if installed is not None else None
        if convert is None:
            raise ModelError(f"{path}: has peft_type {peft_type}, which sftx cannot load; {advice}")
        options, others = convert(values)
        indices = values.get("trainable_token_indices") or ()
        token_ids = [index for ids in indices.values() for index in ids] if isinstance(indices, dict) else indices
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{path}: is no configuration of a PEFT adapter: {problem}") from error
    if others or not base:
        what = ", ".join(others) or "no base_model_name_or_path"
        raise ModelError(f"{path}: has {what}, which sftx cannot load; {advice}")
    return PeftConfig(plugin, options, str(base), tuple(sorted({*token_ids})))


def go_on_from_adapter(loaded: LoadedConfig) -> LoadedConfig:
    """Return the run with an adapter to begin with, where `model` names that or a run's result, or `init_from` does.

    `model` becomes the adapter's base. The adapter plugin gets the options of that adapter; giving others is a
    ConfigError. The paths of adapters below it become absolute. Any other run is returned as it is, also one whose
    model is an adapter and that has no adapter plugin: `names.check` says what is missing. Raises ModelError.
    """
    config, directory = loaded.config, _place(loaded.config.model)
    if (directory / "run.yaml").is_file() and (directory / "model").is_dir():
        # In a store, the result has an address of its own, which is recorded: the copy is this machine's alone.
        result = f"{config.model.rstrip('/')}/model" if is_address(config.model) else str(directory / "model")
        log.info("%s is the directory of a run: the model is its result, %s", config.model, result)
        return dataclasses.replace(loaded, config=dataclasses.replace(config, model=result))
    plugin = _adapter_plugin(config.plugins)
    if plugin is None:
        return loaded
    given = dict(config.plugins[plugin] or {})
    if isinstance(below := given.get(BASE_ADAPTERS), list | tuple) and all(isinstance(name, str) for name in below):
        given[BASE_ADAPTERS] = [str(_adapter_in(_place(name)).absolute()) for name in below]
        loaded = _with_options(loaded, plugin, given)
        config = loaded.config
    directory = _adapter_in(directory)
    is_adapter = (directory / PEFT_CONFIG).is_file() and not (directory / "config.json").is_file()
    if not is_adapter:
        if not isinstance(named := given.get(INIT_FROM), str):
            return loaded
        directory = _adapter_in(_place(named))
        if not directory.is_dir():
            return loaded  # a run that goes on from a checkpoint does not need it
    saved = read_peft_config(directory / PEFT_CONFIG, plugin)
    for name, value in saved.options.items():
        if name in given and json.loads(json.dumps(given[name])) != json.loads(json.dumps(value)):
            origin = loaded.origins.of(f"plugins.{plugin}.{name}") or f"option '{plugin}.{name}'"
            raise ConfigError(
                f"{origin}: the adapter {directory} has {name}={value!r}; leave it out, or begin a new adapter"
            )
    options = {**saved.options, **given, INIT_FROM: str(directory.absolute())}
    model = saved.base if is_adapter else config.model
    log.info("training goes on from the adapter %s of %s", directory, model)
    return _with_options(loaded, plugin, options, model=model)


def as_saved(plugin: Any, directory: Path) -> Any:
    """Return an adapter plugin with the options under which it loads what it has saved in a directory.

    What it began with is in its files, as are the adapters below it.
    """
    changes: dict[str, Any] = {}
    if getattr(plugin, INIT_FROM, None) is not None:
        changes[INIT_FROM] = None
    if getattr(plugin, BASE_ADAPTERS, ()):
        changes[BASE_ADAPTERS] = (str(directory.absolute()),)
    return dataclasses.replace(plugin, **changes) if changes else plugin


def adapter_directory(artefact: Path, name: str, *, num_adapters: int) -> Path:
    """Return where an adapter's files are: in the artefact itself, or in a directory each when there are several."""
    return artefact if num_adapters == 1 else artefact / name


def _place(name: str) -> Path:
    """Return the path of a model or an adapter; one in a store is copied into the cache. Raises ModelError."""
    try:
        return model_directory(name)
    except SftxError as error:
        raise ModelError(f"model {error}") from error


def _adapter_in(directory: Path) -> Path:
    """Return where the adapter is in the directory of a run; any other directory as it is."""
    return directory / "adapter" if (directory / "run.yaml").is_file() else directory


def _with_options(
    loaded: LoadedConfig, plugin: str, options: dict[str, Any], *, model: str | None = None
) -> LoadedConfig:
    plugins = {name: options if name == plugin else values for name, values in loaded.config.plugins.items()}
    config = dataclasses.replace(loaded.config, model=model or loaded.config.model, plugins=plugins)
    return dataclasses.replace(loaded, config=config)


def _adapter_plugin(named: Mapping[str, Any]) -> str | None:
    """Return the plugin of the run that can begin with a saved adapter."""
    installed = discover()
    for name in named:
        if any(info.name == name for info in installed):
            cls = load_class(find(name, installed))
            if INIT_FROM in {field.name for field in dataclasses.fields(cls)}:
                return name
    return None
