"""A run file gives the same run in one, two and four processes: losses, norms, weights, held-out rows, answers.

Each run has ten steps of 8 rows of very unequal lengths. The last step of an epoch has 3: one of four ranks has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from ranked import Prepare, Starter
from same_run import DDP, FSDP2, compare, of_kind

REWARDS: Final = Path(__file__).parents[1] / "helpers" / "reward_functions.py"
RUNS: Final[Mapping[str, str]] = {
    "full": "--plugin rouge --plugin exact-match",
    "lora": "--plugin lora --set lora.r=4 --plugin rouge",
    "qlora": "--plugin qlora --set qlora.r=4",
    "packed": "--plugin packed --set packed.length=96",
    "stream": "--plugin lora --plugin packed --set packed.length=96 --streaming --plan-window 16",
    "saved": "--plugin lora --set lora.modules_to_save=[embed_tokens,lm_head]",
    "tokens": "--plugin lora --plugin llama3 --add-tokens",
    "untied": "--model {untied}",
    "experts": "--model {experts} --plugin lora",
    "quantised-experts": "--model {experts} --plugin qlora --set qlora.r=4 --plugin packed --set packed.length=96",
    "dora": "--plugin lora --set lora.r=4 --set lora.use_dora=true",
    "pissa": "--plugin lora --set lora.r=4 --set lora.init_lora_weights=pissa",
    "ppo": "--plugin lora --plugin ppo --set ppo.response_length=6 --set ppo.num_ppo_epochs=2 --set ppo.kl_target=0.1 "
    "--set ppo.kl_horizon=50 --plugin reward-regex --set reward-regex.pattern=.*e.* --set reward-regex.match=search "
    "--plugin exact-match",
    "ppo-full": "--plugin packed --plugin ppo --set ppo.response_length=6 --plugin reward-regex "
    "--set reward-regex.pattern=.*e.* --set reward-regex.match=search --plugin exact-match",
    "vera": "--plugin vera --set vera.r=8",
    "distill": "--plugin distill --set distill.teacher={untied} --set distill.divergence=jsd --set distill.alpha=0.3",
    "grpo": "--plugin lora --plugin exact-match --plugin grpo --set grpo.num_generations=3 "
    "--set grpo.max_completion_length=6 --set grpo.steps_per_generation=2 --set grpo.beta=0.1 --plugin reward-function "
    "--learning-rate 1e-3 "
    f"--set reward-function.function={REWARDS}:letters",
    "grpo-full": "--plugin packed --plugin exact-match --plugin grpo --set grpo.num_generations=3 "
    "--set grpo.max_completion_length=6 "
    f"--plugin reward-function --learning-rate 1e-3 --set reward-function.function={REWARDS}:letters",
}
"""The arguments of each run, which is compared with the same run in one process."""


@dataclass(frozen=True)
class Case:
    run: str
    size: int
    more: str
    prepare: Prepare | None = None

    def __str__(self) -> str:
        words = [self.run, str(self.size), *self.more.replace("--distributed", "").replace("--", "").split()]
        return "-".join(words)


def compile_quickly(rank: int) -> None:
    """Compile with the backend `eager`, which runs the traced graphs in torch; inductor takes a minute a case."""
    from sftx.trainer import layers

    assert layers.compile_layers.__kwdefaults__ == {"backend": "inductor"}
    layers.compile_layers.__kwdefaults__["backend"] = "eager"


CASES: Final = (
    Case("full", 4, DDP + "--gradient-checkpointing"),
    Case("full", 2, FSDP2 + "--fsdp-offload"),
    Case("lora", 4, FSDP2),
    Case("qlora", 2, FSDP2),
    Case("packed", 2, DDP + "--gradient-checkpointing"),
    Case("stream", 4, DDP),
    Case("tokens", 2, FSDP2),
    Case("experts", 2, DDP),
    Case("distill", 2, DDP),
    Case("grpo", 2, DDP),
    Case("ppo", 2, DDP),
)
"""Cases that cover each run, size and strategy at least once, and most pairs of them."""

MORE_CASES: Final = (
    Case("full", 2, FSDP2 + "--compile", compile_quickly),
    Case("full", 2, DDP),
    Case("full", 2, FSDP2),
    Case("full", 4, FSDP2 + "--gradient-checkpointing"),
    Case("lora", 2, DDP + "--gradient-checkpointing"),
    Case("lora", 4, DDP),
    Case("lora", 2, FSDP2 + "--gradient-checkpointing"),
    Case("full", 2, DDP + "--compile --gradient-checkpointing", compile_quickly),
    Case("qlora", 4, DDP + "--gradient-checkpointing"),
    Case("packed", 4, FSDP2),
    Case("stream", 2, FSDP2),
    Case("saved", 2, DDP),
    Case("saved", 2, FSDP2),
    Case("untied", 2, FSDP2),
    Case("ppo", 2, FSDP2),
    Case("ppo-full", 2, DDP),
    Case("ppo-full", 2, FSDP2),
    Case("grpo", 2, FSDP2),
    Case("grpo-full", 2, FSDP2),
    Case("experts", 2, FSDP2 + "--gradient-checkpointing"),
    Case("distill", 2, FSDP2),
    *(Case(run, 2, how) for run in ("quantised-experts", "dora", "pissa", "vera") for how in (DDP, FSDP2)),
)


def arguments(text: str, models: Mapping[str, Path], common: str) -> list[str]:
    """Return the arguments of a run; one that names its own template gets no chatml."""
    common = common.replace("--plugin chatml", "") if "llama3" in text else common
    return (common + text).format(**models).split()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return tiny models with untied weights and with experts, beside the common tokenizer.

    The router's auxiliary loss is off: it is no sum over tokens, so it depends on which rows share a micro-batch.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from sftx.model.tiny import model_dir

    config = AutoConfig.from_pretrained(model_dir())
    values = {
        name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures", "dtype")
    }
    untied = type(config)(**values | {"tie_word_embeddings": False})
    experts = MixtralConfig(
        **values | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
    )
    made = {"untied": LlamaForCausalLM(untied), "experts": MixtralForCausalLM(experts)}
    found = {}
    for name, model in made.items():
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
        AutoTokenizer.from_pretrained(model_dir()).save_pretrained(found[name])
    return found


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_the_run_is_that_of_one_process(case: Case, starter: Starter, models: Mapping[str, Path], common: str) -> None:
    alone = starter.alone(arguments(RUNS[case.run], models, common))
    group = starter.run(arguments(f"{RUNS[case.run]} {case.more}", models, common), case.size, prepare=case.prepare)
    out = group.succeed()
    compare(out, alone)
    assert [group.printed(rank) for rank in range(1, case.size)] == [""] * (case.size - 1)


@pytest.mark.slow
def test_bfloat16_is_as_close_as_its_rounding(starter: Starter, models: Mapping[str, Path], common: str) -> None:
    """Other micro-batches round differently in bf16: a loss of 6 by some thousandths."""
    alone = of_kind(starter.alone(arguments("--bf16", models, common)), "step")
    for more in (DDP, FSDP2):
        steps = of_kind(starter.run(arguments(f"--bf16 {more}", models, common), 2).succeed(), "step")
        for step, reference in zip(steps, alone, strict=True):
            assert step["loss"] == pytest.approx(reference["loss"], rel=0, abs=6 * 2**-9)
            assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=2**-5)
