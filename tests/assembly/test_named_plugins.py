"""Options that name a plugin: `train.optim` and `train.lr_scheduler_type` choose it, and the run file repeats it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from optimizing import optimizer_stage
from sftx.assembly.registry import Assembly, activate
from sftx.config.loading import load
from sftx.config.named_plugins import ELEMENTWISE, OPTIM, PLUGIN_OPTIONS, leaner_than
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, PluginError

CODE = '''
from dataclasses import dataclass
from typing import ClassVar
import sftx

@dataclass(frozen=True, eq=False)
class Sign:
    """Moves by signs."""
    state_bytes: ClassVar = 0.0
    elementwise: ClassVar = True
    train_options: ClassVar = ("momentum",)
    dead_zone: float = 0.0

    @sftx.hookimpl
    def sftx_optimizer(self):
        return self

    def build(self, params):
        raise NotImplementedError

@dataclass(frozen=True, eq=False)
class Flat:
    """Stays."""
    @sftx.hookimpl
    def sftx_schedule(self):
        return self

    def factor(self, step, num_steps):
        return 1.0

@dataclass(frozen=True, eq=False)
class Wrong(Flat):
    train_options: ClassVar = ("lr_powr",)
'''


@pytest.fixture(autouse=True)
def strangers(install_plugin: Any) -> None:
    entries = {"sign": "Sign", "flat-schedule": "Flat", "even": "Flat", "wrong": "Wrong"}
    install_plugin("sftx-strange", CODE, entries)


def assemble(*plugins: str, **settings: Any) -> Assembly:
    given = [(name.replace("__", "."), value, f"--set {name}") for name, value in settings.items()]
    return activate(load(None, add=["chatml", *plugins], assignments=[("data.train", ["a.jsonl"], "--data"), *given]))


def chosen(assembly: Assembly) -> tuple[str, str]:
    (optimizer,), (schedule,) = assembly.providers("sftx_optimizer"), assembly.providers("sftx_schedule")
    return optimizer.info.name, schedule.info.name


@pytest.mark.parametrize(
    ("plugins", "settings", "names"),
    [
        ((), {}, ("adamw", "cosine-schedule")),
        ((), {"train__optim": "adamw_bnb_8bit"}, ("adamw_8bit", "cosine-schedule")),
        ((), {"train__lr_scheduler_type": "warmup_stable_decay"}, ("adamw", "warmup-stable-decay-schedule")),
        ((), {"train__lr_scheduler_type": "minimind"}, ("adamw", "minimind-schedule")),
        ((), {"train__lr_scheduler_type": "flat"}, ("adamw", "flat-schedule")),
        ((), {"train__lr_scheduler_type": "even"}, ("adamw", "even")),
        ((), {"train__optim": "sign"}, ("sign", "cosine-schedule")),
        (("sign", "even"), {}, ("sign", "even")),
        (("sign",), {"train__optim": "sign", "plugins__sign__dead_zone": 0.5}, ("sign", "cosine-schedule")),
        ((), {"train__optim": "sign", "plugins__sign__dead_zone": 0.5}, ("sign", "cosine-schedule")),
        (("sign",), {"train__momentum": 0.5}, ("sign", "cosine-schedule")),
    ],
)
def test_an_option_or_a_named_plugin_chooses_and_the_run_file_repeats_it(
    plugins: tuple[str, ...], settings: dict[str, Any], names: tuple[str, str], tmp_path: Path
) -> None:
    import yaml

    assembly = assemble(*plugins, **settings)
    assert chosen(assembly) == names
    written = assembly.run.config
    assert written["plugins"].get("sign") == (
        {"dead_zone": settings.get("plugins__sign__dead_zone", 0.0)} if names[0] == "sign" else None
    )
    assert "adamw" not in written["plugins"]
    assert written["train"]["optim"] == names[0]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dict(written)))
    again = activate(load(tmp_path / "run.yaml"))
    assert chosen(again) == names
    assert again.run.config == written


@pytest.mark.parametrize(
    ("plugins", "settings", "message"),
    [
        ((), {"train__optim": "adamm"}, "--set train__optim: option 'train.optim': got \"adamm\", expected 'adamw', "),
        ((), {"train__optim": "adamm"}, "'adamw_bf16', 'sign', or another plugin that implements sftx_optimizer; did "),
        ((), {"train__optim": "adamm"}, "; did you mean 'adamw'?"),
        ((), {"train__lr_scheduler_type": "cosin"}, "got \"cosin\", expected 'cosine', 'linear', 'constant', "),
        ((), {"train__lr_scheduler_type": "cosin"}, "'minimind', 'even', 'flat-schedule', 'wrong', or another plugin"),
        ((), {"train__optim": "chatml"}, "option 'train.optim': plugin 'chatml' (sftx "),
        ((), {"train__optim": "rouge"}, "does not implement sftx_optimizer"),
        (("lion",), {"train__optim": "sgd"}, "option 'train.optim': is 'sgd', and plugin 'lion' (sftx "),
        (("sign",), {"train__optim": "adamw"}, "is 'adamw', and plugin 'sign' (sftx-strange 1.0) is named too"),
        (("lion", "sign"), {}, "both implement sftx_optimizer, which takes one"),
        ((), {"without": ["adamw"]}, "option 'train.optim': is 'adamw', which --no-plugin adamw leaves out"),
        ((), {"train__optim": "lion", "train__momentum": 0.9}, "'train.momentum': optim lion has none; leave it out, "),
        ((), {"train__optim": "lion", "train__momentum": 0.9}, "or choose sgd or muon"),
        ((), {"train__lr_power": 2.0}, "option 'train.lr_power': lr_scheduler_type cosine has none; leave it out, or "),
        ((), {"train__lr_power": 2.0}, "choose polynomial"),
        (
            ("even",),
            {"train__min_lr_ratio": 0.1},
            "lr_scheduler_type even has none; leave it out, or choose ",
        ),
        (("wrong",), {}, "train_options is ('lr_powr',), expected a tuple of names of options of train"),
    ],
)
def test_what_cannot_be_chosen_is_told(plugins: tuple[str, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, PluginError), match=re.escape(message)):
        assemble(*plugins, **settings)


def test_built_in_names_are_those_of_plugins_and_what_is_said_of_them_is_what_they_declare() -> None:
    assert {name for option in PLUGIN_OPTIONS for alias in option.aliases.values() for name in [alias]} <= {
        name for option in PLUGIN_OPTIONS for name in option.built_in
    }
    stages = {name: optimizer_stage(TrainConfig(optim=name)) for name in OPTIM.built_in}
    assert tuple(name for name, stage in stages.items() if stage.elementwise) == ELEMENTWISE
    assert [name for name, stage in stages.items() if stage.bf16_weights] == ["adamw_bf16"]
    for name, stage in stages.items():
        leaner = leaner_than(stage.state_bytes)
        assert (leaner is None) == (name == "sgd")
        assert leaner is None or stages[leaner].state_bytes < min(1, stage.state_bytes)
