"""Built-in templates, collators and adapters train together, two steps each, in every pair of two of them."""

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
    """Each template with each collator. Adapters alternate, so that each template and each collator meets them all.

    That every template trains with the default collator is also what the tests of plugins' contracts show.
    """
    adapters = [FULL, *built_in("sftx_adapter")]
    collators = built_in("sftx_collator")
    assert len(adapters) == len(collators) == 2, "with more of them, alternating no longer makes every pair"
    return [
        pytest.param(
            template, collator, adapters[(t + c) % 2], marks=[pytest.mark.slow] if collator == "padded" else []
        )
        for t, template in enumerate(built_in("sftx_template"))
        for c, collator in enumerate(collators)
    ]


@pytest.mark.parametrize(("template", "collator", "adapter"), combinations())
def test_every_pair_of_choices_trains(template: str, collator: str, adapter: str, tmp_path: Path) -> None:
    from sftx.testing.runs import run_tiny

    result = run_tiny([template, collator, *([] if adapter == FULL else [adapter])], tmp_path)
    assert result.summary["num_steps"] == 2
    assert 0 < result.summary["loss"]["last"] < 10
    assert list((result.output_dir / ("model" if adapter == FULL else "adapter")).glob("*.safetensors"))
