"""This module checks an installed plugin against the contract of its package and of each hook that it implements."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from sftx.assembly.discovery import hooks_of, instance, load_class
from sftx.assembly.entry_points import PluginInfo
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, PluginError, SftxError, one_line
from sftx.model.load import load_spec
from sftx.testing import (
    adapter,
    collator,
    control,
    evaluator,
    exporter,
    loss,
    metric,
    observer,
    optimizer,
    package,
    parser,
    reward,
    rollout,
    schedule,
    source,
    template,
    trainable,
)
from sftx.testing.clauses import MADE, Finding, Suite
from sftx.testing.kit import make_stage
from sftx.testing.runs import run_tiny

SUITES: Final[Mapping[str, Suite[Any]]] = {
    module.SUITE.hook: module.SUITE
    for module in (
        package, source, parser, template, collator, adapter, trainable, loss, rollout, reward,
        optimizer, schedule, metric, evaluator, control, observer, exporter,
    )
}  # fmt: skip
"""The suite of the package, and of each hook in the order of the stages of a run."""


def check_plugin(
    info: PluginInfo,
    options: Mapping[str, Any],
    origins: Origins,
    *,
    model: Path | None = None,
    skip: Collection[str] = (),
) -> list[Finding]:
    """Return the findings about an installed plugin: its package, each of its hooks, and a run of two steps.

    The hooks in `skip`, such as `observer`, are not checked, and then no run is made either. Raises
    ConfigError when `options` are invalid, ModelError when `model` is not a model directory.
    """
    findings = SUITES["package"].findings(info)
    if findings[0].status == "failed":
        return findings
    if model is not None:
        load_spec(str(model))  # raises ModelError here, since this is not the plugin's fault
    cls = load_class(info)
    hooks = hooks_of(info, cls)
    suites = [SUITES[hook.removeprefix("sftx_")] for hook in hooks]
    try:
        plugin = instance(info, cls, options, origins)
    except (ConfigError, PluginError):
        if options or not any(finding.status == "failed" for finding in findings):
            raise
        # A finding of the package says that its own defaults are invalid.
        reason = "not checked, because its own defaults are refused"
        return findings + [Finding(suite.hook, MADE, suite.made, "skipped", reason) for suite in suites]
    left_out = f"left out with --skip {' --skip '.join(skip)}"
    for suite in suites:
        if suite.hook in skip:
            findings.append(Finding(suite.hook, MADE, suite.made, "skipped", left_out))
        else:
            findings += suite.findings(plugin, model=model)

    # The run uses lora unless the plugin says what trains: most runs have one, and some losses need one.
    builder: Any = None
    if hasattr(plugin, "sftx_optimizer"):
        with contextlib.suppress(Exception):  # which a finding tells
            builder = make_stage(plugin, "sftx_optimizer")
    says = any(hasattr(plugin, hook) for hook in ("sftx_adapter", "sftx_trainable"))
    trains_all = getattr(builder, "bf16_weights", False)
    needs_gpu = bool(getattr(builder, "needs_gpu", False))
    names = [info.name] if says or trains_all else ["lora", info.name]
    settings = {f"{info.name}.{option}": value for option, value in options.items()} | {"train.use_cpu": not needs_gpu}
    rule = "A run with it trains two steps, evaluates and saves, as `sftx run` does."
    if hooks == ["sftx_exporter"]:
        return [*findings, Finding("run", "trains", rule, "exempt", "an exporter has no part in a run")]
    if needs_gpu and not torch.cuda.is_available():
        return [*findings, Finding("run", "trains", rule, "exempt", "it needs a GPU, and this machine has none")]
    if skip:
        return [*findings, Finding("run", "trains", rule, "skipped", left_out)]
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        try:
            run_tiny(names, Path(directory), model=model, settings=settings)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including SystemExit
            message = one_line(error).replace(f"{directory}/rows.jsonl", "samples")
            if not isinstance(error, SftxError):
                message = f"{type(error).__name__}: {message}"
            return [*findings, Finding("run", "trains", rule, "failed", message)]
    return [*findings, Finding("run", "trains", rule, "ok")]
