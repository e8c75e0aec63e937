"""The configuration of the short runs of `sftx verify`: the user's own, with few steps and few held-out rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sftx.assembly.registry import Assembly
from sftx.config.default_plugins import DEFAULT_PLUGINS
from sftx.config.loading import LoadedConfig
from sftx.config.options import RunConfig, TrainConfig
from sftx.model import names

MIN_STEPS: Final = 3
"""One before the checkpoint, one after it that is lost, and one in which the run is killed."""
_HELD_OUT_ROWS: Final = 16
_ANSWERS: Final = 4
_NEW_TOKENS: Final = 16


@dataclass(frozen=True)
class ShortRun:
    """A run of a few steps in a temporary directory."""

    loaded: LoadedConfig
    changes: tuple[str, ...]
    """What it does otherwise than the user's run, for the report."""
    steps: int
    output_dir: Path
    plan_window: int
    """That of the user's run, when it is a stream."""

    @property
    def saved_step(self) -> int:
        """The step after which the first checkpoint is saved."""
        return max(1, self.steps // 2)

    @property
    def killed_step(self) -> int:
        """The step within which the process is killed; the step before it is done and not saved, where there is one."""
        return min(self.steps, self.saved_step + 2)

    def for_splits(self, rows_at_once: int) -> LoadedConfig:
        """Return the same run for comparisons of gradients: it may start as one process or as two."""
        train = dataclasses.replace(
            self.loaded.config.train,
            train_batch_size=None,
            per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=None,
            torch_compile=False,
        )
        data = dataclasses.replace(self.loaded.config.data, plan_window=self.plan_window)
        return dataclasses.replace(self.loaded, config=dataclasses.replace(self.loaded.config, train=train, data=data))


def shorten(loaded: LoadedConfig, assembly: Assembly, *, steps: int, num_held_out: int, output_dir: Path) -> ShortRun:
    """Return the short run of a configuration. `num_held_out`: the held-out rows that the run itself has."""
    config = assembly.complete(loaded.config)
    short = ShortRun(loaded, (), steps, output_dir, config.data.plan_window)
    changes = [f"{steps} steps, a checkpoint after every {short.saved_step}"]
    left_out = _left_out(config, assembly)
    kinds = {"sftx_observer": "what it would send elsewhere", "sftx_evaluator": "which may take long"}
    changes += [f"without {name} ({kinds[hook]})" for name, hook in left_out.items()]
    train = _train(config.train, short, assembly, set(left_out.values()))
    data, generation = config.data, config.generation
    if num_held_out > _HELD_OUT_ROWS:
        changes.append(f"{_HELD_OUT_ROWS} held-out rows")
        limit = -(-_HELD_OUT_ROWS // max(1, len(data.eval)))
        data = dataclasses.replace(
            data,
            eval=tuple(dataclasses.replace(s, limit=min(limit, s.limit or limit)) for s in data.eval),
            eval_fraction=None if data.eval_fraction is None else _HELD_OUT_ROWS,
            # Of so few rows a single one may be a large share; shares are judged on all rows.
            max_dropped=1.0,
        )
    if data.has_eval:
        data = dataclasses.replace(data, max_overlap=1.0)
    rows_per_step = config.train.resolve_batch_size(1).rows_per_step
    if data.streaming and data.plan_window > rows_per_step:
        # Otherwise the checkpoint would be in the first window, which is read from the beginning of the source.
        data = dataclasses.replace(data, plan_window=rows_per_step)
        changes.append(f"a plan_window of {rows_per_step}")
    if assembly.providers("sftx_metric") and data.has_eval:
        generation = dataclasses.replace(
            generation,
            max_rows=min(_ANSWERS, generation.max_rows or _ANSWERS),
            max_new_tokens=min(_NEW_TOKENS, generation.max_new_tokens),
        )
        changes.append(f"{generation.max_rows} answers of {generation.max_new_tokens} tokens")
    shortened = dataclasses.replace(
        config,
        model=names.resolve(config.model),  # sftx:tiny is another directory in each process
        plugins={name: options for name, options in config.plugins.items() if name not in left_out},
        train=train,
        data=data,
        generation=generation,
        output_dir=str(output_dir),
    )
    return dataclasses.replace(short, loaded=dataclasses.replace(loaded, config=shortened), changes=tuple(changes))


def _left_out(config: RunConfig, assembly: Assembly) -> dict[str, str]:
    """Return the plugins of the run that only observe or only evaluate, with their hook."""
    own = DEFAULT_PLUGINS["sftx_observer"]
    return {
        active.info.name: hook
        for hook in ("sftx_observer", "sftx_evaluator")
        for active in assembly.providers(hook)
        if active.info.name in config.plugins
        and active.info.name not in own
        and not assembly.has_other_hooks(active.info.name, hook)
    }


def _train(train: TrainConfig, short: ShortRun, assembly: Assembly, left_out: Collection[str]) -> TrainConfig:
    """Return the options of the short run. `left_out`: the hooks of plugins that it does without."""
    changed = dataclasses.replace(
        train,
        max_steps=short.steps,
        save_steps=short.saved_step,
        save_minutes=None,
        eval_steps=None if train.eval_steps is None else min(train.eval_steps, short.saved_step),
        logging_steps=1,
        # A warm-up over the whole short run would update by next to nothing.
        warmup_steps=train.warmup_steps if train.warmup_steps < short.steps else 1,
    )
    scores = {"loss", "perplexity", *(active.info.name for active in assembly.providers("sftx_metric"))}
    if "sftx_evaluator" in left_out and train.best_metric not in (None, *scores):
        changed = dataclasses.replace(
            changed,
            metric_for_best_model=None,
            greater_is_better=None,
            load_best_model_at_end=False,
            early_stopping_patience=None,
            early_stopping_threshold=0.0,
        )
    return changed
