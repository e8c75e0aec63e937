"""Every built-in plugin keeps the contract that a stranger's is held against, and is found as that one is."""

from __future__ import annotations

from typing import Any

import pytest

from sftx.assembly.discovery import PluginInfo, discover
from sftx.config.run_file import Origins

BUILT_IN = [info for info in discover() if info.package == "sftx"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "chatml": [{"default_system": "You are terse."}],
    "sharegpt": [{"role_key": "speaker", "content_key": "said", "roles": {"bot": "assistant"}}],
    "qwen3": [{"thinking": "strip"}, {"thinking": "empty"}],
    "deepseek3": [{"earlier_reasoning": "drop"}],
    "llama3": [{"dates": True}],
    "qwen2.5": [{"default_system": None}],
    "tokenizer": [{"enable_thinking": False}],
    "padded": [{"group_by_length": False, "pad_to_multiple_of": 8}, {"padding_free": True}],
    "packed": [{"length": 40, "attention": "mask"}, {"attention": "mask4d"}],
    "bleu": [{"tokenize": "char", "lowercase": True}],
    "rouge": [{"tokenizer": "unicode"}],
    "exact-match": [{"as_json": True}],
    "lora": [{"lora_dropout": 0.3, "loraplus_lr_ratio": 16}, {"modules_to_save": ["lm_head", "embed_tokens"]}],
    "masked-ce": [{"label_smoothing": 0.1, "z_loss": 1e-3}, {"workspace_mb": 1}],
}
"""Options under which a plugin is checked too; with its defaults it always is."""


@pytest.mark.parametrize("info", BUILT_IN, ids=lambda info: info.name)
def test_a_built_in_plugin_keeps_its_contract(info: PluginInfo) -> None:
    from sftx.testing.contract import check_plugin

    for options in [{}, *OPTIONS.get(info.name, [])]:
        findings = check_plugin(info, options, Origins())
        broken = [f"{f.hook} / {f.clause}: {f.message}" for f in findings if f.status != "ok"]
        assert broken == [], f"with {options}"
        assert {finding.hook for finding in findings} > {"package", "run"}


def test_the_options_above_are_those_of_built_in_plugins() -> None:
    assert set(OPTIONS) <= {info.name for info in BUILT_IN}
