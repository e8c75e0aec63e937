"""This module trains the tiny model for two steps with named plugins, which takes about a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftx.assembly.discovery import hooks_of, load_class
from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import activate
from sftx.config.loading import load
from sftx.events import Result
from sftx.model import tiny
from sftx.testing.kit import CONVERSATIONS, Kit, make_stage
from sftx.testing.source import TEXTS
from sftx.training import run
from sftx.types import Record


def run_tiny(
    names: Sequence[str],
    directory: Path,
    *,
    rows: Sequence[Record] = (),
    model: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Result:
    """Train two steps with these plugins; the run directory is `directory`/run. Raises SftxError as `sftx run` does.

    `rows` are trained and evaluated on; by default the example of a named source, the samples of the named parsers, or
    a few conversations. ChatML is added when none of the plugins is a template, kto when one reads answers that are not
    to be imitated and none is a loss, grpo (two answers of 4 tokens) to a reward without a rollout, and
    reward-exact-match to a rollout without a reward. `settings` maps dotted names, such as `lora.r`, to values.
    """
    settings = {
        "model": str(model or directory / "model"),
        "data.train": [str(directory / "rows.jsonl")],
        "data.eval": [str(directory / "rows.jsonl")],
        "data.max_overlap": 1,
        "output_dir": str(directory / "run"),
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 2,
        "train.use_cpu": True,
        "generation.max_rows": 2,
        "generation.max_new_tokens": 4,
        **(settings or {}),
    }
    named = [find(name, discover()) for name in names]
    hooks = {hook for info in named for hook in hooks_of(info, load_class(info))}
    if "sftx_reward" in hooks and "sftx_rollout" not in hooks:
        names = [*names, "grpo"]
        settings = {"grpo.num_generations": 2, "grpo.max_completion_length": 4, **settings}
    if "sftx_rollout" in hooks and "sftx_reward" not in hooks:
        names = [*names, "reward-exact-match"]
    assignments = [(name, value, f"{name}={value}") for name, value in settings.items()]
    loaded = load(None, add=names, assignments=assignments)
    assembly = activate(loaded)
    templates = assembly.providers("sftx_template")
    directory.mkdir(parents=True, exist_ok=True)
    sources = [a.plugin for a in assembly.providers("sftx_source") if a.info.name in names and not rows]
    for source in [source for plugin in sources if hasattr(source := make_stage(plugin, "sftx_source"), "example")]:
        address = f"{source.scheme}:{source.example(directory, TEXTS)}"
        assignments += [(name, [address], name) for name in ("data.train", "data.eval")]
    if not templates:
        names = [*names, "chatml"]
    parsers = [make_stage(a.plugin, "sftx_parser") for a in assembly.providers("sftx_parser") if a.info.name in names]
    has_loss = any(a.info.name in names for a in assembly.providers("sftx_loss"))
    if not has_loss and any(getattr(parser, "has_rejected", False) for parser in parsers):
        names = [*names, "kto"]
    loaded = load(None, add=names, assignments=assignments)
    if model is None:
        shutil.copytree(tiny.model_dir(), directory / "model")
        # Overwrites the tokenizer with one that has the control tokens of the plugin's template.
        Kit(templates[0].plugin if templates else None).tokenizer.save_pretrained(directory / "model")
    if not rows:
        rows = [record for parser in parsers for record in parser.samples] or [
            {"messages": [{"role": turn.role, "content": turn.content} for turn in conversation.messages]}
            for conversation in CONVERSATIONS
        ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run(loaded, name="tiny")
