"""Every built-in plugin keeps the contract that a third party's is checked against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contracts import HELPERS, QUESTIONS, REQUIRED
from sftx.assembly.discovery import hooks_of, instance, load_class
from sftx.assembly.entry_points import PluginInfo, discover
from sftx.config.run_file import Origins
from sftx.testing.clauses import Finding
from sftx.testing.contract import SUITES, check_plugin
from sftx.testing.runs import run_tiny

# Their own tests check their contract, with a task and a reward model that are small.
LEFT_OUT = ("lm-eval", "reward-model")
BUILT_IN = [info for info in discover() if info.package == "sftx" and info.name not in LEFT_OUT]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "sqlite": [{"json_columns": ["messages"]}],
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
    "vera": [{"vera_dropout": 0.3, "r": 8, "save_projection": False}, {"modules_to_save": ["lm_head", "embed_tokens"]}],
    "multiple-choice": [{"path": str(QUESTIONS), "template": True, "limit": 2}],
    "qlora": [{"load_in_8bit": True}, {"bnb_4bit_use_double_quant": False, "lora_dropout": 0.3}],
    "ppo": [
        {"kl_coef": 0.0, "num_generations": 2, "steps_per_rollout": 2, "whiten_rewards": True},
        {"kl_target": 0.1, "kl_estimator": "k3", "missing_eos_penalty": 1.0, "whiten_advantages": False, "top_p": 0.9},
    ],
    "reward-exact-match": [{"as_json": True}],
    "reward-function": [{"function": f"{HELPERS / 'reward_functions.py'}:longest"}],
    "reward-json": [{"required_keys": ["name"], "nonconforming": 0.5}],
    "reward-regex": [{"pattern": r"(?s).*?(\w+)\W*", "match": "last", "group": 1}],
    "dpo": [
        {"loss_type": "robust", "label_smoothing": 0.1, "rpo_alpha": 0.5},
        {"loss_type": "ipo", "ld_alpha": 0.5, "reference": "precompute"},
        {"loss_type": "hinge"},
        {"loss_type": "sigmoid_norm"},
    ],
    "kto": [{"desirable_weight": 2, "reference": "precompute"}],
    "simpo": [{"label_smoothing": 0.1, "cpo_alpha": 1}],
    "grpo": [
        {"num_generations": 2, "loss_type": "grpo", "num_iterations": 2, "epsilon": 1.0, "epsilon_high": 1e6},
        {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "temperature": 0.8},
    ],
    "distill": [
        {"divergence": "reverse", "alpha": 0.3, "workspace_mb": 1},
        {"divergence": "jsd", "beta": 0.2},
    ],
    "masked-ce": [{"label_smoothing": 0.1, "z_loss": 1e-3}, {"workspace_mb": 1}],
}
"""Options with which a plugin is checked besides its defaults."""


NEEDS_GPU = ("paged_adamw", "paged_adamw_8bit")
NOT_ELEMENTWISE = ("adafactor", "adamw_8bit", "adamw_bf16", "muon", *NEEDS_GPU)


def broken(findings: list[Finding], name: str) -> list[str]:
    """Return the clauses that are not kept, nor exempt where that is right for the plugin."""

    def is_exempt(finding: Finding) -> bool:
        needs_gpu = name in NEEDS_GPU and not torch.cuda.is_available() and finding.hook in ("optimizer", "run")
        return finding.status == "exempt" and (
            needs_gpu
            or (finding.hook == "run" and finding.message == "an exporter has no part in a run")
            or (finding.clause == "is-elementwise" and name in NOT_ELEMENTWISE)
            or (finding.clause == "right-gradient" and name == "grpo")  # the ratio to itself is 1
        )

    return [f"{f.hook} / {f.clause}: {f.message}" for f in findings if f.status != "ok" and not is_exempt(f)]


@pytest.mark.parametrize("info", BUILT_IN, ids=lambda info: info.name)
def test_a_built_in_plugin_keeps_the_contracts_of_its_hooks(info: PluginInfo) -> None:
    """The suite of each hook, in this process and with the default options; the slow test checks the rest."""
    cls = load_class(info)
    plugin = instance(info, cls, REQUIRED.get(info.name, {}), Origins())
    hooks = hooks_of(info, cls)
    assert hooks
    for hook in hooks:
        assert broken(SUITES[hook.removeprefix("sftx_")].findings(plugin), info.name) == []


def test_a_run_with_the_default_plugins_trains(tmp_path: Path) -> None:
    assert run_tiny(["lora"], tmp_path).summary["num_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("info", "options"),
    [
        pytest.param(info, options, id=f"{info.name}-{number}")
        for info in BUILT_IN
        for number, options in enumerate([REQUIRED.get(info.name, {}), *OPTIONS.get(info.name, [])])
    ],
)
def test_a_built_in_plugin_keeps_its_whole_contract(info: PluginInfo, options: dict[str, Any]) -> None:
    """The suites of its package and of its hooks, and a run of two steps."""
    findings = check_plugin(info, options, Origins())
    assert broken(findings, info.name) == []
    assert {finding.hook for finding in findings} > {"package", "run"}


def test_the_options_above_are_those_of_built_in_plugins() -> None:
    assert set(OPTIONS) <= {info.name for info in BUILT_IN}
