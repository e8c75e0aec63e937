"""All options that do not exist are answered by one error, and following it to the letter gives a run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import assets
from sftx.cli import main
from sftx.config import loading, run_file
from sftx.config.unknown_options import UnknownOptionsError
from sftx.errors import ConfigError

ROW = {"messages": [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture(autouse=True)
def _in_a_directory_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 8, encoding="utf-8")


def sftx(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def lines_of(result: Result, code: int = 1) -> list[str]:
    """Return the lines below the heading of the error, which is the only one."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.count("sftx: error: ") == 1
    heading, *lines = result.stderr.splitlines()
    number = len(lines) - lines[-1].startswith("  these")
    hint = "`sftx migrate run.yaml` writes a run file that says the same; " * ("run.yaml" in heading)
    assert heading == f"sftx: error: {number} options do not exist here; {hint}what to write instead of each:"
    return lines


def followed(text: str, lines: list[str]) -> str:
    """Return a run file in which each line that the error names is replaced by what it says, to the letter.

    A key whose value goes over several lines is replaced with all of them.
    """
    instead: dict[int, list[str]] = {}
    for line in lines:
        found = re.fullmatch(r"  (?:run\.yaml):(\d+): \S+: (?:write (.*?)(?: \(.*\))?|leave it out.*)", line)
        if found:
            instead[int(found[1])] = found[2].split(" and ") if found[2] else []
        else:
            assert line.startswith("  these may stay, as they ask for nothing here: "), line
    kept: list[str] = []
    replaced = False
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith((" ", "-")):
            replaced = number in instead
        kept += instead.get(number, []) if replaced else [line]
    return "\n".join(kept) + "\n"


def test_examples_of_llama_factory_are_answered_and_can_be_followed() -> None:
    """Each example file as it is: supervised ones of text models give a run file that is read, without a word left."""
    examples = sorted(assets.path("llamafactory_options").glob("*.yaml"))
    assert len(examples) > 15
    for example in examples:
        text = example.read_text(encoding="utf-8")
        Path("run.yaml").write_text(text, encoding="utf-8")
        result = sftx("run", "run.yaml")
        assert "`sftx migrate run.yaml` writes a run file" in result.stderr.splitlines()[0]
        lines = lines_of(result)
        theirs = yaml.safe_load(text)
        named = {found[1] for line in lines if (found := re.match(r"  run\.yaml:\d+: (\S+):", line))}
        harmless = set(lines[-1].partition(": ")[2].split(", ")) if lines[-1].startswith("  these") else set()
        assert not set(theirs) - named - harmless - {"trust_remote_code", "output_dir"}, example.name
        assert not [line for line in lines if "did you mean" in line], example.name
        Path("run.yaml").write_text(followed(text, lines), encoding="utf-8")
        config = loading.load(Path("run.yaml")).config
        assert config.model == theirs["model_name_or_path"]
        assert config.train.learning_rate == theirs.get("learning_rate", 2e-4)
        adapter = "qlora" if "quantization_bit" in theirs else "lora"
        assert (adapter in config.plugins) == (theirs["finetuning_type"] == "lora")
        assert config.train.warmup_steps == theirs.get("warmup_ratio", 0)
        assert len(config.data.train) == len(theirs["dataset"].split(","))


LLAMA_FACTORY = """\
### model
model_name_or_path: sftx:tiny
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 4
lora_target: all
dataset: hello
dataset_dir: sets
template: qwen3_nothink
cutoff_len: 128
max_samples: 4
overwrite_cache: true
preprocessing_num_workers: 1
output_dir: saves
overwrite_output_dir: true
save_strategy: steps
save_steps: 500
plot_loss: true
report_to: none
per_device_train_batch_size: 2
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
max_steps: 1
lr_scheduler_type: cosine
warmup_ratio: 0.0
bf16: false
ddp_timeout: 180000000
"""

AXOLOTL = """\
base_model: sftx:tiny
model_type: LlamaForCausalLM
load_in_4bit: false
chat_template: chatml
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: messages
output_dir: out
sequence_len: 128
sample_packing: true
adapter: lora
lora_r: 4
lora_alpha: 8
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 1
micro_batch_size: 2
max_steps: 1
optimizer: adamw_torch_fused
lr_scheduler: constant
learning_rate: 2e-4
bf16: false
gradient_checkpointing: true
flash_attention: true
fsdp_config:
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
  pad_token: <|endoftext|>
"""

TRL = """\
model_name_or_path:
  sftx:tiny
dataset_name:
  rows.jsonl
chat_template_path:
report_to:
  none
completion_only_loss: true
packing: false
max_length: 128
learning_rate:
  0.0001
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
max_steps: 1
per_device_train_batch_size: 2
use_peft: true
lora_r: 4
lora_target_modules:
  - q_proj
  - v_proj
dtype: float32
gradient_checkpointing: true
eos_token: <|im_end|>
output_dir: out
"""


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL, f"{TRL}plugins: [chatml]\n"], ids=["lf", "axolotl", "trl"])
def test_the_answer_followed_to_the_letter_gives_a_run(text: str) -> None:
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text('{"hello": {"file_name": "hello.jsonl"}}', encoding="utf-8")
    Path("sets/hello.jsonl").write_text(Path("rows.jsonl").read_text())
    Path("run.yaml").write_text(text, encoding="utf-8")
    lines = lines_of(sftx("run", "run.yaml"))
    Path("run.yaml").write_text(followed(text, lines), encoding="utf-8")
    result = sftx("run", "run.yaml", "--use-cpu")
    assert result.exit_code == 0, result.output
    notes = [line for line in result.stderr.splitlines() if "ask for nothing here" in line]
    assert len(notes) == 1
    directory = Path(yaml.safe_load(text)["output_dir"])
    values, _ = run_file.read(directory / "run.yaml")
    assert values["plugins"]["lora"]["r"] == 4
    assert values["data"]["max_length"] == 128
    assert values["train"]["learning_rate"] == yaml.safe_load(text.replace("2e-4", "2.0e-4"))["learning_rate"]
    assert not {"do_train", "report_to", "special_tokens"} & set(values)


def test_a_command_line_of_trl_followed_to_the_letter_gives_a_run() -> None:
    typed = [
        "--model_name_or_path",
        "sftx:tiny",
        "--dataset_name",
        "rows.jsonl",
        "--learning_rate",
        "2.0e-4",
        "--max_steps",
        "1",
        "--packing",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--eos_token",
        "<|im_end|>",
        "--use_peft",
        "--lora_r",
        "4",
        "--lora_alpha",
        "8",
        "--lora_target_modules",
        "q_proj",
        "v_proj",
        "--bf16",
        "False",
        "--gradient_checkpointing=true",
        "--report_to",
        "none",
        "--output_dir",
        "out",
        "--load-in-4bit",
        "--max_length",
        "128",
    ]
    lines = lines_of(sftx("run", *typed), 2)
    known = [
        "--learning_rate",
        "2.0e-4",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "1",
        "--bf16",
        "False",
        "--gradient_checkpointing=true",
        "--output_dir",
        "out",
        "--max_length",
        "128",
    ]
    advised = []
    for line in lines[:-1]:
        found = re.fullmatch(r"  --\S+.*?: (?:write (.*?)(?: \(.*\))?|leave it out.*)", line)
        assert found, line
        advised += shlex.split(found[1] or "")
    assert lines[-1] == "  these may stay, as they ask for nothing here: eos_token, report_to"
    result = sftx("run", *known, *advised, "--report_to", "none", "--plugin", "chatml", "--use-cpu")
    assert result.exit_code == 0, result.output
    values, _ = run_file.read(Path("out/run.yaml"))
    assert values["plugins"]["qlora"]["target_modules"] == ["q_proj", "v_proj"]
    assert "lora" not in values["plugins"]
    assert values["train"]["bf16"] is False
    assert values["train"]["gradient_checkpointing"] is True


# --- messages -------------------------------------------------------------------------------------


def load_error(text: str, *assignments: tuple[str, Any, str], **options: Any) -> list[str]:
    Path("run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        loading.load(Path("run.yaml"), assignments=assignments, **options)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutoff_len: 128", "run.yaml:1: option 'cutoff_len' does not exist; write data.max_length: 128"),
        (
            "train: {max_length: 128}",
            "run.yaml:1: option 'train.max_length' does not exist; write data.max_length: 128",
        ),
        (
            "data: {learning_rate: 1e-4}",
            "option 'data.learning_rate' does not exist; write train.learning_rate: 0.0001",
        ),
        ("deepspeed: a.json", "does not exist; write train.distributed: fsdp2 (shards of every layer, with sftx run"),
        ("train: {deepspeed: a.json}", "does not exist; write train.distributed: fsdp2 (shards"),
        ("torch_dtype: bfloat16", "option 'torch_dtype' does not exist; write train.bf16: true"),
        (
            "load_in_4bit: true",
            "does not exist; write plugins.qlora: {} (lora on a base in four bits)",
        ),
        ("packing: true", "option 'packing' does not exist; write plugins.packed: {} (documents"),
        ("lora: {r: 8}", "option 'lora' does not exist; write plugins.lora: {r: 8} (plugins stand under `plugins:`)"),
        ("template: [1]", "option 'template' does not exist; write plugins.tokenizer: {}"),
        ("warmup_ration: 0.1", "did you mean 'warmup_ratio'? write train.warmup_steps: 0.1"),
        ("torch_dtyp: auto", "did you mean 'torch_dtype'? leave it out: bfloat16 is the default"),
        ("seeed: 1", "option 'seeed' does not exist; did you mean 'train.seed'?"),
        ("train: {max_lenght: 1}", "option 'train.max_lenght' does not exist; did you mean 'data.max_length'?"),
        ("generation: {zzz: 1}", "does not exist; known are max_new_tokens, max_rows, num_samples, batch_size"),
        ("max-steps: 5", "option 'max-steps' does not exist; write train.max_steps: 5"),
        ("train: {max_steps: -1}", "got -1, expected a number greater than or equal to 1; leave it out"),
        ("train: {bf16: auto}", 'got "auto", expected true or false; leave it out'),
        (
            "plugins: [axolotl.integrations.kd.KDPlugin]",
            "run.yaml:1: option 'axolotl.integrations.kd.KDPlugin' does not exist; leave it out: it is a plugin of Ax",
        ),
        ("deepspeed: {zero_optimization: 3}", 'leave it out: {"zero_optimization": 3} is not understood'),
        ("lr_scheduler_type: [cosine]", "leave it out: schedules here are cosine"),
        ("datasets: [{path: a, type: {field: b}}]", "option 'datasets' does not exist; write data.train: [a]"),
        ("args: {lora_dropout: 0.1}", "run.yaml:1: option 'args.lora_dropout' does not exist; write plugins.lora"),
        ("max_samples: 5", "does not exist; write data.train: [{path: ..., limit: 5}] (of each source)"),
    ],
)
def test_one_option_is_answered_in_one_line(text: str, message: str) -> None:
    (line,) = load_error(text)
    assert message in line


def test_the_options_of_sections_plugins_and_command_line_are_in_one_error() -> None:
    from sftx.assembly.discovery import options_class

    text = (
        "data: {train: rows.jsonl, lr: 1}\nplugins:\n  lora: {lora_r: 8, fan_in_fan_out: false}\n  packed: {size: 3}\n"
    )
    typed = (("per_gpu_train_batch_size", 2, "--per_gpu_train_batch_size 2"), ("deepspeed", "x", "--set deepspeed=x"))
    lines = load_error(text, *typed, plugin_class=options_class)
    assert lines == [
        "5 options do not exist here; what to write instead of each:",
        "  run.yaml:1: data.lr: write train.learning_rate: 1",
        "  --per_gpu_train_batch_size 2: write --per-device-train-batch-size 2",
        "  --set deepspeed=x: write --distributed fsdp2 (shards of every layer, with sftx run --nproc N)",
        "  run.yaml:3: plugins.lora.lora_r: write plugins.lora.r: 8",
        "  run.yaml:4: plugins.packed.size: there is nothing like it",
        "  these may stay, as they ask for nothing here: fan_in_fan_out",
    ]


def test_a_slip_in_a_plugins_own_option_is_no_option_of_another_tool() -> None:
    from sftx.config.unknown_options import UnknownOption, answered

    option = UnknownOption("plugins.adan.beta", 0.9, "--set adan.beta=0.9", ("betas", "eps"))
    (found,) = answered([option], {})
    assert found.advice() == "did you mean 'betas'?"
    (found,) = answered([UnknownOption("beta", 0.1, "--beta 0.1", ())], {})
    assert found.advice() == "write --plugin dpo --set dpo.beta=0.1"


def test_the_options_of_several_plugins_are_in_one_error() -> None:
    result = sftx("run", "--plugin", "lora", "--plugin", "packed", "--set", "lora.rank=8", "--set", "packed.lenght=3",
                  "--data", "rows.jsonl")  # fmt: skip
    assert lines_of(result) == [
        "  --set lora.rank=8: write --plugin lora --set lora.r=8",
        "  --set packed.lenght=3: did you mean 'length'?",
    ]


def test_what_two_options_write_is_written_once() -> None:
    lines = load_error("cutoff_len: 128\nmax_seq_length: 64\n")
    assert lines[1:] == [
        "  run.yaml:1: cutoff_len: write data.max_length: 128",
        "  run.yaml:2: max_seq_length: leave it out: it contradicts cutoff_len, which says another value",
    ]
    assert load_error("cutoff_len: 128\nmax_seq_length: 128\n")[2].endswith(": leave it out: cutoff_len says it")
    lines = load_error("fsdp: full_shard\nfsdp_config: {fsdp_version: 2, offload_params: true}\n")
    assert lines[1].endswith("fsdp: write train.distributed: fsdp2 (shards of every layer, with sftx run --nproc N)")
    assert lines[2].endswith("fsdp_config: write train.fsdp_offload: true")


def test_what_asks_for_nothing_is_left_out_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    Path("run.yaml").write_text("do_train: true\ndata: {train: [{path: a, max_samples: }]}\ntrain: {fsdp: ''}\n")
    with caplog.at_level("INFO", logger="sftx"):
        config = loading.load(Path("run.yaml")).config
    assert config == loading.load(None, assignments=[("data.train", ["a"], "")]).config
    assert caplog.messages == ["options of other tools that ask for nothing here: max_samples, fsdp, do_train"]


def test_the_plugins_of_axolotl_are_no_plugins_of_sftx(caplog: pytest.LogCaptureFixture) -> None:
    Path("run.yaml").write_text("plugins: [axolotl.integrations.liger.LigerPlugin, chatml]\n")
    with caplog.at_level("INFO", logger="sftx"):
        assert loading.load(Path("run.yaml")).config.plugins == {"chatml": {}}
    assert caplog.messages == ["options of other tools that ask for nothing here: LigerPlugin"]


def test_what_is_no_run_file_gives_no_endless_list() -> None:
    lines = load_error("".join(f"zz{n}: 1\n" for n in range(1000)))
    assert len(lines) < 300
    assert lines[-1] == "  and 800 more"


def test_options_may_stand_under_their_dotted_names() -> None:
    text = "train.seed: 3\nplugins.qwen2.5: {}\ndata:\n  max_length: 64\nplugins.lora.r: 8\nplugins.lora: {}\n"
    Path("run.yaml").write_text(f"{text}train: {{max_steps: 5}}\n")
    loaded = loading.load(Path("run.yaml"))
    assert (loaded.config.train.seed, loaded.config.train.max_steps, loaded.config.data.max_length) == (3, 5, 64)
    assert loaded.config.plugins == {"qwen2.5": {}, "lora": {"r": 8}}
    assert loaded.origins.of("train.seed") == "run.yaml:1"
    assert load_error("train.seed: x\n") == ["run.yaml:1: option 'train.seed': got \"x\", expected a valid integer"]
    assert (
        load_error("plugins.lora: 3\n")[0] == "run.yaml:1: option 'plugins.lora': got 3, expected a mapping of options"
    )
    for twice in ("train: {seed: 1}\ntrain.seed: 2\n", "plugins: {lora: {r: 1}}\nplugins.lora.r: 2\n"):
        assert load_error(twice)[0].endswith("is set twice; leave one of them out")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            "--lerning-rate 1",
            2,
            "--lerning-rate 1: option 'lerning_rate' does not exist; did you mean --learning-rate?",
        ),
        ("--frobnicate", 2, "--frobnicate: option 'frobnicate' does not exist; see --help"),
        (
            "--load-in-4bit run.yaml",
            2,
            "--load-in-4bit: option 'load_in_4bit' does not exist; write --plugin qlora",
        ),
        ("--packing=true", 2, "--packing=true: option 'packing' does not exist; write --plugin packed"),
        ("--set seed=3", 1, "--set seed=3: option 'seed' does not exist; write --seed 3"),
        ("--lora.r 8", 1, "--lora.r 8: plugin 'lora' is not in this run; add --plugin lora"),
        ("--bf16 maybe", 1, "maybe: no such run file"),
        ("learning_rate=1e-4", 1, "sftx: error: argument learning_rate=1e-4: write --learning-rate 1e-4\n"),
        ("run.yaml data.train=x", 1, "sftx: error: argument data.train=x: write --data x\n"),
        ("lora.r=8 --set a.b=1", 1, "sftx: error: argument lora.r=8: write --set lora.r=8\n"),
        ("resume=true nproc=2", 1, "sftx: error: argument resume=true: write --resume\n"),
        ("cutoff_len=64", 2, "argument cutoff_len=64: option 'cutoff_len' does not exist; write --max-length 64\n"),
    ],
)
def test_flags_of_other_tools_are_answered_like_run_files(arguments: str, code: int, message: str) -> None:
    Path("run.yaml").write_text("data: {train: rows.jsonl}\n")
    result = sftx("run", *arguments.split())
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.parametrize("command", ["run", "plan", "inspect", "doctor", "data export --output x"])
def test_every_command_that_reads_a_run_answers(command: str) -> None:
    result = sftx(*command.split(), "--cutoff_len", "64")
    assert result.exit_code == 2
    assert "--cutoff_len 64: option 'cutoff_len' does not exist; write --max-length 64" in result.stderr


def test_the_answers_to_python_are_keywords() -> None:
    import sftx as package

    with pytest.raises(ConfigError) as caught:
        package.run(data="rows.jsonl", plugins={"lora": {"rank": 2}}, lora_alpha=4, num_epochs=2, packing=True, seeed=1)
    assert str(caught.value).splitlines()[1:] == [
        "  lora_alpha=4: write plugins={'lora': {'lora_alpha': 4}}",
        "  num_epochs=2: write num_train_epochs=2",
        "  packing=True: write plugins={'packed': {}} (documents of a packed row never attend to one another)",
        "  seeed=1: did you mean 'seed'?",
        "  plugins['lora']={'rank': 2}: write plugins={'lora': {'r': 2}}",
    ]


def test_the_error_is_there_for_programs_too() -> None:
    Path("run.yaml").write_text("cutoff_len: 128\nstage: sft\n")
    with pytest.raises(UnknownOptionsError) as caught:
        loading.load(Path("run.yaml"))
    options = {option.name: option.answer for option in caught.value.unknown}
    assert {name: (made.kind, made.write) for name, made in options.items() if made} == {
        "cutoff_len": ("write", {"data.max_length": 128}),
        "stage": ("leave out", {}),
    }
