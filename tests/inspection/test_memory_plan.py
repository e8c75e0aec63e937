"""`sftx plan` counts what real models and real steps need, finds the largest batch that fits, and rejects bad sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import model_configs as configs
from architectures import MIXTURES, write_model
from sftx.cli import main
from sftx.config import loading
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError
from sftx.inspection.memory_plan import target_device

GB = 10**9


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def planner(
    model: str, *plugins: str, device: target_device.TargetDevice = target_device.CPU, ranks: int = 1, **options: Any
) -> Any:
    from sftx.inspection.memory_plan.planner import Planner

    values = {"model": model, "data.train": "none.jsonl", "data.max_length": 32} | options
    assignments = [(name, value, name) for name, value in values.items()]
    return Planner(loading.load(None, add=plugins, assignments=assignments), device, ranks)


@pytest.fixture(scope="module")
def tiny() -> str:
    from sftx.model import tiny

    return str(tiny.model_dir())


# --- counts -------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_real_model(tiny: str) -> None:
    from transformers import AutoModelForCausalLM

    need = planner(tiny).estimate()
    assert need.num_parameters == need.num_trainable == AutoModelForCausalLM.from_pretrained(tiny).num_parameters()


def test_what_lora_trains_is_what_peft_trains(tiny: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    need = planner(tiny, "lora").estimate()
    assert need.num_trainable == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("options", [{}, {"qlora.load_in_8bit": True}, {"qlora.bnb_4bit_use_double_quant": False}])
def test_weights_of_a_quantised_base_are_those_of_the_loaded_model(tiny: str, options: dict[str, Any]) -> None:
    import torch

    from sftx.assembly.registry import activate
    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model, load_spec

    plan = planner(tiny, "qlora", **options)
    adapters = activate(plan.loaded).adapters(spec := load_spec(tiny))
    model = load_model(spec, list(adapters.values()), dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(model, None)  # type: ignore[arg-type]
    lm.attach(adapters)
    tensors = {t.data_ptr(): t.nbytes for t in [*lm.parameters(), *lm.buffers()] if t.numel()}
    need, plain = plan.estimate(), planner(tiny, "lora").estimate()
    assert need.kinds["weights"] == pytest.approx(sum(tensors.values()), rel=0, abs=64)  # scalars, such as the seed
    assert need.kinds["weights"] < plain.kinds["weights"]
    assert (need.num_parameters, need.num_trainable) == (plain.num_parameters, plain.num_trainable)


def test_gradients_and_state_are_those_of_the_layers_that_train(tmp_path: Path) -> None:
    directory = configs.write(configs.SMOLLM2 | {"num_hidden_layers": 6}, tmp_path)
    whole, named, part = (
        planner(directory, *plugins, **options).dry_runner
        for plugins, options in (((), {}), (("full",), {}), (("freeze",), {"freeze.trainable_layers": -2}))
    )
    assert named.size._replace(untrained_parts=()) == whole.size._replace(untrained_parts=())
    two_layers = 2 * (whole.size.num_parameters - whole.size.trained_outside_bytes // 4) // 6
    assert (part.size.num_trainable, part.size.num_parameters) == (two_layers, whole.size.num_parameters)
    assert (part.size.trainable_bytes, part.size.trained_outside_bytes) == (4 * two_layers, 0)
    assert not part.size.has_equal_layers, "a dry run of few layers would train all of these"
    train = TrainConfig()
    update, update_of_all = part.update_peak(train), whole.update_peak(train)
    assert update["weights"] == update_of_all["weights"]
    assert update["gradients"] == 4 * two_layers
    assert 2 * 4 * two_layers <= update["optimizer"] < 2.5 * 4 * two_layers


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_public_models_have_as_many_parameters_as_their_makers_say(name: str, tmp_path: Path) -> None:
    from sftx.model.load import load_spec

    spec = load_spec(configs.write(configs.CONFIGS[name], tmp_path))
    assert spec.skeleton.num_parameters() == configs.NUM_PARAMETERS[name]


@pytest.mark.parametrize("plugins", [(), slow(("lora",)), slow(("packed",)), ("lora", "packed"), ("freeze",)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_run_counts_what_a_real_step_allocates(tiny: str, plugins: tuple[str, ...], checkpointing: bool) -> None:
    """The same tracker is active around a real step, whose tensors have memory and values."""
    import torch

    from sftx.inspection.memory_plan.fake_tensors import StepTracker, make_batch
    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model, load_spec
    from sftx.trainer.layers import prepare_layers
    from sftx.trainer.parallel import TrainStep

    plan = planner(tiny, *plugins, **{"train.gradient_checkpointing": checkpointing, "train.optim": "sgd"})
    train, assembly = plan.config.train, plan.dry_runner.assembly
    planned = max(plan.dry_runner.step_peaks(train, rows=8, max_length=512), key=lambda peak: sum(peak.values()))
    spec = load_spec(tiny)
    adapters = assembly.adapters(spec)
    model = load_model(spec, list(adapters.values()), dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(model, None)  # type: ignore[arg-type]
    lm.attach(adapters, assembly.trainable(spec))
    prepare_layers(model, train)
    lm.train()
    batch, tracker = make_batch(assembly.collator(512), 8, 512), StepTracker()
    with tracker:
        tracker.track([*lm.parameters(), *lm.buffers()], "weights")
        TrainStep(lm, assembly.loss())(batch).sum.backward()
    assert sum(planned.values()) == pytest.approx(sum(tracker.peak.values()), rel=0.02)
    assert planned["weights"] == tracker.peak["weights"]


@pytest.mark.parametrize("plugins", [(), slow(("lora",)), slow(("packed",)), ("lora", "packed")])
@pytest.mark.parametrize("checkpointing", [slow(False), True])
def test_few_layers_are_extrapolated_to_many(plugins: tuple[str, ...], checkpointing: bool, tmp_path: Path) -> None:
    """The result has the same bytes of every kind as a dry run of all layers."""
    directory = configs.write(configs.SMOLLM2 | {"num_hidden_layers": 6}, tmp_path)
    runner = planner(directory, *plugins).dry_runner
    train = TrainConfig(gradient_checkpointing=checkpointing)
    assert runner.size.has_equal_layers
    few = runner.step_peaks(train, rows=4, max_length=256)
    runner.size = runner.size._replace(has_equal_layers=False)
    every = runner.step_peaks(train, rows=4, max_length=256)
    assert max(few, key=lambda peak: sum(peak.values())) == max(every, key=lambda peak: sum(peak.values()))


@pytest.mark.parametrize("plugins", [(), ("lora",)])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_counted_like_any_model(name: str, plugins: tuple[str, ...], tmp_path: Path) -> None:
    """Its products of grouped matrices have no fake implementation for fp32."""
    import torch

    from sftx.inspection.memory_plan.fake_tensors import StepTracker, make_batch
    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model, load_spec
    from sftx.trainer.parallel import TrainStep

    model = str(write_model(MIXTURES[name](), tmp_path))
    plan = planner(model, *plugins, **{"train.optim": "sgd"})
    assembly, train = plan.dry_runner.assembly, plan.config.train
    planned = max(plan.dry_runner.step_peaks(train, rows=4, max_length=32), key=lambda peak: sum(peak.values()))
    spec = load_spec(model)
    adapters = assembly.adapters(spec)
    loaded = load_model(spec, list(adapters.values()), dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(loaded, None)  # type: ignore[arg-type]
    lm.attach(adapters)
    lm.train()
    batch, tracker = make_batch(assembly.collator(32), 4, 32), StepTracker()
    with tracker:
        tracker.track([*lm.parameters(), *lm.buffers()], "weights")
        TrainStep(lm, assembly.loss())(batch).sum.backward()
    assert sum(planned.values()) == pytest.approx(sum(tracker.peak.values()), rel=0.02)
    untrained = plan.dry_runner.size.untrained_parts
    assert any("parameters of" in line and "Router" in line for line in untrained) == bool(plugins)
    assert not any("experts" in line for line in untrained)


# --- what follows from the counts ---------------------------------------------------------------


def test_more_rows_longer_rows_and_no_checkpointing_need_more(tiny: str) -> None:
    plan = planner(tiny)
    base = plan.estimate(rows=2).total
    assert base < plan.estimate(rows=4).total
    assert base < plan.estimate(rows=2, max_length=64).total
    assert plan.estimate(rows=8, gradient_checkpointing=True).total < plan.estimate(rows=8).total


def test_shares_of_fsdp2_are_smaller_and_gradients_of_ddp_are_always_there(tiny: str) -> None:
    one = planner(tiny).estimate(rows=1)
    ddp = planner(tiny, ranks=2).estimate(rows=1)
    fsdp2 = planner(tiny, ranks=2, **{"train.distributed": "fsdp2"}).estimate(rows=1)
    assert ddp.kinds["gradients"] == 4 * one.num_trainable
    assert ddp.total - ddp.kinds["process"] >= one.total - one.kinds["process"]
    assert fsdp2.kinds["weights"] == pytest.approx(one.kinds["weights"] / 2, abs=1)
    assert fsdp2.kinds["optimizer"] == pytest.approx(one.kinds["optimizer"] / 2, abs=1)


def test_a_large_model_is_planned_from_its_config_alone(tmp_path: Path) -> None:
    directory = configs.write(configs.CONFIGS["llama-3-8b"], tmp_path)
    need = planner(
        directory, "lora", device=target_device.parse("24GB"), **{"train.gradient_checkpointing": True}
    ).estimate(rows=1, max_length=512)
    # 8.03e9 weights of 2 bytes, and LoRA's 4.2e7 of 4.
    assert need.kinds["weights"] == pytest.approx(2 * 8.03e9 + 4 * 4.19e7, rel=0.001)
    assert need.total < 24 * GB


@given(st.integers(0, 10_000), st.integers(0, 500), st.integers(0, 3), st.integers(2, 5_000))
def test_the_largest_that_fits_is_found_to_a_hundredth(base: int, slope: int, bend: int, limit: int) -> None:
    from sftx.inspection.memory_plan.planner import find_largest

    def total(number: int) -> int:
        asked.append(number)
        return base + slope * number + bend * number**2 // 100

    asked: list[int] = []
    most = find_largest(total, limit, 1, 2, at_most=3_000)
    assert most == 0 or total(most) <= limit
    beyond = most + max(1, most // 100)
    assert beyond > 3_000 or total(beyond) > limit
    assert len(asked) < 40


# --- the command --------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", "--data", "none.jsonl", "--max-length", "32", *arguments])


def test_it_exits_with_0_when_it_fits_and_with_1_when_not(tiny: str) -> None:
    fits = invoke("--model", tiny, "--gpu", "2GB", "--num-tokens", "3600000", "--tokens-per-second", "1000", "--json")
    values = json.loads(fits.stdout)
    assert fits.exit_code == 0
    assert values["fits"] is True
    assert values["seconds"] == 3600
    too_large = invoke("--model", tiny, "--gpu", "0.8GB", "--per-device-train-batch-size", "4")
    assert too_large.exit_code == 1
    assert "does not fit" in too_large.output
    assert "no change was found with which it fits" in too_large.output
    assert "try" not in too_large.output
    uneven = invoke("--model", tiny, "--nproc", "3", "--train-batch-size", "4")
    assert uneven.exit_code == 1
    assert "train_batch_size" in uneven.output
    assert "3 processes cannot divide 4 rows" in uneven.output
    each_gpu = invoke("--model", tiny, "--nproc", "gpu")
    assert each_gpu.exit_code == 2
    assert "a plan needs their number, such as 8" in each_gpu.output


def test_processes_that_share_a_step_have_fewer_rows_at_once(tiny: str) -> None:
    step = {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2}
    needs = [planner(tiny, ranks=ranks, **step).estimate() for ranks in (1, 2, 4, 8)]
    assert [need.rows for need in needs] == [4, 4, 2, 1]
    totals = [need.total for need in needs[1:]]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.slow
def test_what_is_advised_is_planned_to_fit(tmp_path: Path) -> None:
    """A full fine-tune on a small card: nothing alone is enough, several processes with checkpointing are."""
    model = configs.write(configs.SMOLLM2 | {"num_hidden_layers": 6}, tmp_path)
    options = ["--model", model, "--gpu", "1.5GB", "--max-length", "2048", "--per-device-train-batch-size", "8"]
    first = json.loads(invoke(*options, "--json").stdout)["advice"][0]
    assert first.endswith(" GB, fits")
    advised = first.partition(",")[0].split()
    result = invoke(*options, *advised, "--json")
    assert result.exit_code == 0, result.output
    assert f"{json.loads(result.stdout)['need']['total'] / 1e9:.1f} GB, fits" in first


@pytest.mark.parametrize(("text", "num_bytes"), [("24GB", 24 * GB), ("22.5GiB", int(22.5 * 2**30)), ("80 gb", 80 * GB)])
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert target_device.parse(text).num_bytes == num_bytes


@pytest.mark.parametrize("text", ["24", "GB", "0GB", "-1GB", "24MB", "24GB more", ""])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a GPU's memory, such as 24GB"):
        target_device.parse(text)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(
            (option, value)
            for option in ("--tokens-per-second", "--price-per-hour")
            for value in ("nan", "inf", "1e300")
        ),
        ("--tokens-per-second", "0"),
        ("--gpu", ""),
    ],
)
def test_a_number_that_no_plan_can_use_is_refused(tiny: str, option: str, value: str) -> None:
    refused = invoke("--model", tiny, option, value)
    assert refused.exit_code in (1, 2)
    assert option in refused.stderr.splitlines()[-1]


def test_only_advice_that_fits_is_given(tiny: str) -> None:
    from sftx.inspection.memory_plan.planner import plan_run

    options = {"data.max_length": 512, "train.per_device_train_batch_size": 16}
    plan = planner(tiny, device=target_device.parse("1GB"), **options)
    base, less = plan.estimate().total, plan.estimate(gradient_checkpointing=True).total
    assert less < base
    device = target_device.TargetDevice("a GPU", is_gpu=True, num_bytes=(base + less) // 2)
    made = plan_run(plan.loaded, device)
    assert made.fits is False
    assert 1 <= len(made.advice) <= 2
    assert made.advice[0].startswith("--gradient-checkpointing: ")
    assert all(line.endswith(" GB, fits") for line in made.advice)


# --- from the data ------------------------------------------------------------------------------


def write_rows(path: Path, num: int = 6) -> Path:
    rows = [{"prompt": f"what is {n} plus one", "completion": f"{n + 1} " * (n + 1)} for n in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tokens_are_those_of_the_data_in_all_epochs(tiny: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl")
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {tiny}\ndata: {{train: {data}, eval: {data}, max_length: 64}}\n"
        "train: {num_train_epochs: 3, per_device_train_batch_size: 2}\nplugins: {chatml: {}, exact-match: {}}\n"
    )

    def plan_with(*arguments: str) -> Any:
        result = CliRunner().invoke(main, ["plan", str(run), *arguments, "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    from sftx.data.pipeline import build_pipeline

    loaded = loading.load(run)
    assembly = planner(tiny, "chatml").dry_runner.assembly
    examples = build_pipeline(loaded.config, assembly, loaded.origins).load_train().examples
    named = plan_with("--gpu", "h100")
    assert named["num_tokens"] == 3 * examples.num_input_tokens
    assert named["seconds"] > named["num_tokens"] / named["tokens_per_second"], "evaluations take time too"
    assert plan_with()["tokens_per_second"] > 0
    unknown = plan_with("--gpu", "24GB")
    assert unknown["tokens_per_second"] is unknown["seconds"] is None
    assert "no rate is known for a GPU of 24GB" in " ".join(unknown["assumptions"])
    without = CliRunner().invoke(main, ["plan", str(run), "--data", "none.jsonl", "--json"])
    assert "no time without data or --num-tokens (none.jsonl: " in without.stdout


def test_a_batch_has_the_extras_of_the_data_or_of_a_sample(tiny: str, tmp_path: Path) -> None:
    """A preference loss takes pairs alone."""
    pair = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"conversations": [{"from": "human", "value": "c"}], **pair}) + "\n")
    totals = []
    for path in (data, tmp_path / "none.jsonl"):
        plan = planner(tiny, "lora", "chatml", "dpo", **{"data.train": str(path)})
        assert [dict(one.extras) for one in plan.dry_runner.group] == [
            {"preference": "chosen"},
            {"preference": "rejected"},
        ]
        totals.append(plan.estimate(rows=3).num_tokens)
    assert totals == [2 * 3 * 32] * 2


@pytest.mark.parametrize("plugins", [("lora", "kto"), ("kto",), ("dpo",), ("lora", "packed", "kto")])
def test_a_loss_with_statistics_and_precomputed_values_is_planned(
    tiny: str, tmp_path: Path, plugins: tuple[str, ...]
) -> None:
    plan = planner(tiny, "chatml", *plugins, **{"data.train": str(tmp_path / "none.jsonl")})
    assert 0 < plan.estimate(rows=1).total < plan.estimate(rows=4).total


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("plugins", [(), ("lora",)])
def test_answers_are_counted_as_generation_allocates_them(tiny: str, tmp_path: Path, plugins: tuple[str, ...]) -> None:
    """The same tracker is active while real answers are generated; the last token needs the longest cache."""
    import torch

    from sftx.inspection.memory_plan.fake_tensors import StepTracker
    from sftx.model.generation import generate_greedy
    from sftx.model.language_model import CausalLM
    from sftx.model.load import load_model, load_spec

    plan = planner(tiny, *plugins, **{"train.optim": "sgd"})
    runner, train = plan.dry_runner, plan.config.train
    peaks = runner.answer_peaks(train, rows=16, prompt_length=96, max_new_tokens=160)
    planned = max(sum(peak[kind] for kind in ("weights", "activations", "head")) for peak in peaks)
    spec = load_spec(tiny)
    adapters = runner.assembly.adapters(spec)
    loaded = load_model(spec, list(adapters.values()), dtype=torch.float32, device=torch.device("cpu"))
    lm = CausalLM(loaded, None)  # type: ignore[arg-type]
    lm.attach(adapters)
    tracker = StepTracker()
    with tracker, torch.no_grad():
        tracker.track([*lm.parameters(), *lm.buffers()], "weights")
        prompts = [[1 + n % 7 for n in range(96 - row)] for row in range(16)]
        list(generate_greedy(lm, prompts, max_new_tokens=160, stop_ids=(), batch_size=16))
    assert planned == pytest.approx(sum(tracker.peak.values()), rel=0.1)


def test_an_evaluation_that_needs_the_most_is_the_peak(tiny: str, tmp_path: Path) -> None:
    data = str(write_rows(tmp_path / "rows.jsonl"))
    large = {"data.eval": data, "train.per_device_eval_batch_size": 512, "train.per_device_train_batch_size": 1}
    need = planner(tiny, "lora", "chatml", "exact-match", **large).estimate()
    assert need.when in ("the evaluation", "the answers")
    assert need.total > planner(tiny, "lora", "chatml", **large | {"data.eval": []}).estimate().total


# --- against a real run -------------------------------------------------------------------------

CASES = [
    slow(("--plugin", "lora", "--gradient-checkpointing", "--per-device-train-batch-size", "2")),
    slow(("--per-device-train-batch-size", "1")),
    slow(
        (
            "--plugin",
            "lora",
            "--gradient-checkpointing",
            "--per-device-train-batch-size",
            "1",
            "--eval-data",
            "DATA",
            "--max-overlap",
            "1",
        )
    ),
    slow(("--distributed", "fsdp2", "--nproc", "2", "--gradient-checkpointing", "--per-device-train-batch-size", "2")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_planned_within_a_tenth_of_the_peak_of_a_real_run(
    case: tuple[str, ...], real_model_dir: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    lines = [{"input_ids": [100 + at % 4000 for at in range(128 - row % 2)]} for row in range(32)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    options = ["--model", str(real_model_dir), "--data", str(data), "--max-length", "128", "--use-cpu"]
    options += [str(data) if option == "DATA" else option for option in case]
    # Large blocks go back to the system when they are freed; glibc would keep them.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    sftx = [sys.executable, "-m", "sftx"]
    subprocess.run([*sftx, "run", *options, "--max-steps", "2", "--output-dir", str(out)], env=environment, check=True)
    planned = subprocess.run([*sftx, "plan", *options, "--json"], env=environment, check=True, capture_output=True)
    measured = json.loads((out / "summary.json").read_text())["peak_bytes"]
    assert json.loads(planned.stdout)["need"]["total"] == pytest.approx(measured, rel=0.1)


def test_products_in_bfloat16_on_a_cpu_keep_their_kernels(tiny: str) -> None:
    def kernels(**options: Any) -> int:
        steps = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 3}
        return int(planner(tiny, **steps, **options).estimate().kinds.get("kernels", 0))

    assert kernels() == 0
    assert kernels(**{"train.bf16": True, "train.max_steps": 2}) == 6 * 19 * 10**6  # six micro-batches
    assert kernels(**{"train.bf16": True}) == kernels(**{"train.bf16": True, "train.max_steps": 1000}) == 740 * 10**6
    on_gpu = planner(tiny, device=target_device.TargetDevice("h100", is_gpu=True), **{"train.bf16": True})
    assert "kernels" not in on_gpu.estimate().kinds
