"""Built-in templates, collators and adapters train together, two steps each: every template and adapter with every
collator."""

from __future__ import annotations

from pathlib import Path

import pytest

from sftx.assembly.discovery import hooks_of, load_class
from sftx.assembly.entry_points import discover

FULL = "full fine-tuning"


def built_in(hook: str) -> list[str]:
    """The names of the built-in plugins that fill a hook."""
    return [info.name for info in discover() if info.package == "sftx" and hook in hooks_of(info, load_class(info))]


def combinations() -> list[object]:
    """Each template with each collator. Adapters take turns, so that each collator meets them all.

    That every template trains with the default collator is also what the tests of plugins' contracts show.
    """
    adapters = [FULL, *built_in("sftx_adapter")]
    chosen = [
        (template, collator, adapters[(t + c) % len(adapters)])
        for t, template in enumerate(built_in("sftx_template"))
        for c, collator in enumerate(built_in("sftx_collator"))
    ]
    pairs = {(collator, adapter) for _, collator, adapter in chosen}
    assert len(pairs) == len(adapters) * len(built_in("sftx_collator"))
    return [pytest.param(*names, marks=[pytest.mark.slow] if "padded" in names else []) for names in chosen]


@pytest.mark.parametrize(("template", "collator", "adapter"), combinations())
def test_every_pair_of_choices_trains(template: str, collator: str, adapter: str, tmp_path: Path) -> None:
    from sftx.testing.runs import run_tiny

    result = run_tiny([template, collator, *([] if adapter == FULL else [adapter])], tmp_path)
    assert result.summary["num_steps"] == 2
    assert 0 < result.summary["loss"]["last"] < 10
    assert list((result.output_dir / ("model" if adapter == FULL else "adapter")).glob("*.safetensors"))
