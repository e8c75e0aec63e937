"""Every suite by its hook, and all that concern an installed plugin held against it."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sftx.assembly.discovery import PluginInfo, hooks_of, instance, load_class
from sftx.config.run_file import Origins
from sftx.errors import ConfigError, PluginError, SftxError, one_line
from sftx.model.load import load_spec
from sftx.testing import adapter, collator, loss, metric, observer, package, parser, template
from sftx.testing.clauses import Finding, Suite
from sftx.testing.runs import run_tiny

SUITES: Final[Mapping[str, Suite[Any]]] = {
    suite.hook: suite
    for suite in (
        package.SUITE,
        parser.SUITE,
        template.SUITE,
        collator.SUITE,
        adapter.SUITE,
        loss.SUITE,
        metric.SUITE,
        observer.SUITE,
    )
}
"""The contract: of the package, and of each hook in the order of the stages."""

RUNS: Final = "A run with it trains two steps, evaluates and saves, as `sftx run` does."


def check_plugin(
    info: PluginInfo, options: Mapping[str, Any], origins: Origins, *, model: Path | None = None
) -> list[Finding]:
    """The findings on an installed plugin: its package, each hook that it fills, and a run of two steps.

    Raises ConfigError when `options` are not the plugin's, ModelError when `model` is none.
    """
    findings = SUITES["package"].findings(info)
    if findings[0].status == "failed":
        return findings
    if model is not None:
        load_spec(str(model))  # a directory that is no model is not the plugin's fault
    cls = load_class(info)
    try:
        plugin = instance(info, cls, options, origins)
    except (ConfigError, PluginError):
        if options or not any(finding.status == "failed" for finding in findings):
            raise
        return findings  # which say that its own defaults cannot be
    for hook in hooks_of(info, cls):
        findings += SUITES[hook.removeprefix("sftx_")].findings(plugin, model=model)
    return [*findings, _run(info, options, plugin, model)]


def _run(info: PluginInfo, options: Mapping[str, Any], plugin: object, model: Path | None) -> Finding:
    # With an adapter, as most runs have one and some losses need one.
    names = [info.name] if hasattr(plugin, "sftx_adapter") else ["lora", info.name]
    settings = {f"{info.name}.{option}": value for option, value in options.items()}
    with tempfile.TemporaryDirectory() as name:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_tiny(names, Path(name), model=model, settings=settings)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = "" if isinstance(error, SftxError) else f"{type(error).__name__}: "
            return Finding(
                "run", "trains", RUNS, "failed", what + one_line(error).replace(f"{name}/rows.jsonl", "samples")
            )
    return Finding("run", "trains", RUNS, "ok")
