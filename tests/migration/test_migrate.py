"""`sftx migrate` on real configurations of other tools: all in them is accounted for, and the result is a run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

import assets
import real_files
from migrating_pages import annotated
from real_files import made_of, trl_commands
from sftx.assembly.discovery import options_class
from sftx.cli import main
from sftx.config import loading, run_file
from sftx.config.other_tools import TOOLS
from sftx.migration.reading import Reading, read
from sftx.migration.translation import Translation
from sftx.migration.writing import run_file_text

HERE = Path(__file__).parent
LLAMA_FACTORY = {
    "qwen3_full_sft": set(),
    "qwen3_lora_dpo": set(),
    "qwen3_lora_kto": set(),
    "qwen3_lora_pretrain": set(),
    "qwen3_lora_sft": set(),
    "qwen3_lora_sft_ds3": set(),
    "qwen3_lora_sft_otfq": set(),
    "qwen3_lora_sft_ray": {"ray_num_workers", "dataset"},
    "llama3_lora_sft_gptq": {"model_name_or_path"},
    "deepseek_v3_lora_sft_kt": {"use_kt"},
    "qwen3_lora_reward": {"stage"},
}
"""Examples of LLaMA-Factory, with the options that are not carried over."""
AXOLOTL = {
    "lora-1b.yml": {"evals_per_epoch", "saves_per_epoch"},
    "instruct-lora-8b.yml": {"evals_per_epoch", "saves_per_epoch"},
    "dpo.yaml": {"evals_per_epoch", "saves_per_epoch"},
    "qlora-fsdp.yaml": {"evals_per_epoch", "saves_per_epoch"},
    "qlora-1b-kto.yaml": {"evals_per_epoch", "saves_per_epoch"},
}


@pytest.fixture(autouse=True)
def _in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sftx(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def accounted(made: Translation) -> set[str]:
    """Return the options that are in the run file, or of which the summary speaks."""
    not_needed = {name for names in made.not_needed.values() for name in names}
    return {*made.carried, *not_needed, *(re.split(r"[ :]", lost.name)[0] for lost in made.lost)}


def lost(made: Translation) -> set[str]:
    return {re.split(r"[ :]", found.name)[0] for found in made.lost}


def loaded(made: Translation) -> loading.LoadedConfig:
    Path("made.yaml").write_text(run_file_text(made), encoding="utf-8")
    return loading.load(Path("made.yaml"), plugin_class=options_class)


def installed(package: str, file: str) -> dict[str, Any]:
    """Return the options of the classes in a module of an installed package, with their defaults."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return annotated(Path(spec.submodule_search_locations[0]) / file)


# --- real files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LLAMA_FACTORY))
def test_examples_of_llama_factory(name: str) -> None:
    Path("data").symlink_to(assets.path("llamafactory"))
    file = assets.path("llamafactory_options") / f"{name}.yaml"
    theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    made = made_of(str(file))
    assert set(theirs) - accounted(made) == set()
    assert lost(made) == LLAMA_FACTORY[name]
    if "stage" in lost(made):
        assert made.problem.startswith("stage: rm")
        return
    config = loaded(made).config
    assert config.model == theirs["model_name_or_path"]
    assert [source.limit for source in config.data.train] == [theirs["max_samples"]] * len(config.data.train)
    assert "dataset" in lost(made) or all(Path(source.path).is_file() for source in config.data.train)
    assert config.train.warmup_steps == theirs["warmup_ratio"]
    lora = config.plugins.get("lora") or config.plugins.get("qlora")
    assert (lora == {"r": 8, "lora_alpha": 16}) == (theirs["finetuning_type"] == "lora")
    assert ("qlora" in config.plugins) == ("quantization_bit" in theirs)
    assert theirs["stage"] in ("sft", "pt") or theirs["stage"] in config.plugins
    assert config.data.long_rows == ("cut_end" if theirs["stage"] == "pt" else "cut_proportional")
    assert config.plugins.get("packed") == ({"strategy": "wrapped"} if theirs["stage"] == "pt" else None)


@pytest.mark.parametrize("name", list(AXOLOTL))
def test_examples_of_axolotl(name: str) -> None:
    theirs = yaml.safe_load((HERE / "axolotl" / name).read_text(encoding="utf-8"))
    made = made_of(str(HERE / "axolotl" / name))
    assert set(theirs) - accounted(made) == set()
    assert lost(made) == AXOLOTL[name]
    config = loaded(made).config
    assert config.model == theirs["base_model"]
    assert config.train.learning_rate == float(theirs["learning_rate"])
    assert config.data.max_length == theirs["sequence_len"]
    assert config.data.long_rows == "drop"
    bits = theirs.get("load_in_4bit") or theirs.get("load_in_8bit")
    adapter = (config.plugins.get("qlora" if bits else "lora") or {}) if theirs.get("adapter") else None
    assert adapter is None or {"r": 16, "lora_alpha": 32, **adapter}["r"] == theirs["lora_r"]
    assert theirs.get("rl") is None or theirs["rl"] in config.plugins
    assert ("packed" in config.plugins) == bool(theirs.get("sample_packing"))


def test_commands_of_trl() -> None:
    commands = trl_commands()
    assert len(commands) >= 5
    for command in commands.values():
        typed = {word[2:].removeprefix("no_").partition("=")[0] for word in command.split() if word.startswith("--")}
        made = made_of(command)
        assert typed - accounted(made) == set(), command
        assert lost(made) <= {"push_to_hub"}
        config = loaded(made).config
        stage = re.findall(r"(sft|dpo|kto)\.py", command)[0]
        assert stage == "sft" or stage in config.plugins
        assert ("lora" in config.plugins or "qlora" in config.plugins) == ("use_peft" in typed)
        assert ("packed" in config.plugins) == ("packing" in typed)
        assert config.data.max_length == 1024
        assert config.train.learning_rate == float(command.split("--learning_rate ")[1].split()[0])


FILES = [(tool, name) for tool, files in real_files.all_files().items() for name in files]


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "name"), FILES)
def test_run_files_of_real_configurations_are_planned(tool: str, name: str) -> None:
    """With a small model and real rows in place of those of a hub."""
    Path("data").symlink_to(assets.path("llamafactory"))
    made = made_of(real_files.all_files()[tool][name])
    made.written["model"].value = "sftx:smollm2-135m-instruct"
    made.written.pop("trust_remote_code", None)
    config = loaded(made).config
    objective = next((plugin for plugin in ("dpo", "kto") if plugin in config.plugins), "alpaca")
    for section, sources in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if not all(Path(source.path).exists() for source in sources):
            made.written[section].value = [f"data/{objective}_en_demo.json"]
    Path("made.yaml").write_text(run_file_text(made), encoding="utf-8")
    # Templates of other models need control tokens that this tokenizer lacks.
    result = sftx("plan", "made.yaml", "--add-tokens", "--max-overlap", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["need"]["total"] > 1e8


def test_a_run_file_of_llama_factorys_data_trains() -> None:
    Path("data").symlink_to(assets.path("llamafactory"))
    text = (assets.path("llamafactory_options") / "qwen3_lora_sft.yaml").read_text(encoding="utf-8")
    text = re.sub("Qwen/.*", "sftx:tiny", text).replace("max_samples: 1000", "max_samples: 8")
    Path("lora.yaml").write_text(text, encoding="utf-8")
    assert sftx("migrate", "lora.yaml").exit_code == 0
    typed = "--max-steps 1 --use-cpu --no-bf16 --num-proc 1 --max-length 64 --warmup-steps 0 --output-dir out"
    result = sftx("run", "lora.sftx.yaml", *typed.split())
    assert result.exit_code == 0, result.output
    assert (Path("out") / "adapter" / "adapter_model.safetensors").exists()


# --- defaults -----------------------------------------------------------------------------------------


def test_defaults_are_those_that_the_tools_have() -> None:
    """Those of TRL and transformers are of what is installed, the others of the sources that `make assets` fetched."""
    training = installed("transformers", "training_args.py")
    trainers = {name: installed("trl", f"trainer/{name}_config.py") for name in ("base", "sft", "dpo", "grpo")}
    stages = {name: {**training, **trainers["base"], **options} for name, options in trainers.items() if name != "base"}
    peft_options = installed("peft", "tuners/lora/config.py")
    commands = installed("trl", "trainer/model_config.py")
    for default in TOOLS["trl"].defaults:
        for name, theirs in stages.items():
            given = {"stage": name}
            if default.when({**given, "use_peft": True, "source": "script"}) and default.option in peft_options:
                assert default.value == peft_options[default.option], default.option
            elif default.when({**given, "use_peft": True}) and default.option in commands:
                assert default.value == commands[default.option], default.option
            elif default.when(given) and default.option in theirs:
                assert default.value == theirs[default.option], (default.option, name)
    factory = {**training, **{k: v for file in sorted(assets.path("llamafactory_options").glob("*_args.py"))
                              for k, v in annotated(file).items()}}  # fmt: skip
    axolotl: dict[str, Any] = {}
    for file in sorted(assets.path("axolotl_options").glob("*.py")):
        axolotl |= {name: value for name, value in annotated(file).items() if value is not None}
    for tool, options in (("llama-factory", factory), ("axolotl", axolotl)):
        known = [default for default in TOOLS[tool].defaults if options.get(default.option) is not None]
        assert len(known) >= 3
        assert [(d.option, d.value) for d in known if d.value != options[d.option]] in ([], [("learning_rate", 5e-5)])


def options_of(text: str) -> dict[str, Any]:
    """Return what a YAML file of LLaMA-Factory, or a command, becomes, but for the data and what every run has."""
    if not text.startswith("trl "):
        Path("given.yaml").write_text(f"model_name_or_path: m\ndataset: a\n{text}", encoding="utf-8")
        text = "llamafactory-cli train given.yaml"
    written = made_of(text).written
    return {name.removeprefix("plugins."): w.value for name, w in written.items() if name.startswith("plugins.")}


@pytest.mark.parametrize("given", [
    "stage: sft\npref_beta: 0.2\npref_loss: simpo\nppo_epochs: 4\n",
    "stage: kto\npref_loss: sigmoid\nsimpo_gamma: 1.0\n",
    "stage: kto\npref_ftx: 0.5\n", "stage: dpo\nkto_chosen_weight: 2.0\n", "stage: dpo\npref_loss: kto_pair\n",
    "stage: dpo\npref_loss: orpo\nsimpo_gamma: 1.0\nppo_target: 3.0\n", "trl dpo --epsilon 0.1 --model_name_or_path m",
])  # fmt: skip
def test_an_option_of_another_objective_adds_no_second_loss(given: str) -> None:
    losses = {name.partition(".")[0] for name in options_of(given)} & {"dpo", "kto", "orpo", "simpo", "grpo", "ppo"}
    wanted = "kto" if "kto_pair" in given else "orpo" if "orpo" in given else re.findall("sft|kto|dpo", given)[0]
    assert losses == {wanted} - {"sft"}


def test_simpo_has_the_defaults_of_the_tool_that_trained_it() -> None:
    found = options_of("stage: dpo\npref_loss: simpo\n")
    assert (found["simpo.beta"], found["simpo.gamma"], "simpo.cpo_alpha" in found) == (0.1, 0.5, False)
    found = options_of("trl cpo --loss_type simpo --model_name_or_path m")
    theirs = installed("trl", "experimental/cpo/cpo_config.py")
    assert (found["simpo.beta"], found["simpo.gamma"], found["simpo.cpo_alpha"]) == (
        theirs["beta"], theirs["simpo_gamma"], theirs["cpo_alpha"])  # fmt: skip


def test_dropout_is_left_out_where_the_other_trainer_turns_it_off() -> None:
    for name in ("dpo", "kto"):
        assert installed("trl", f"trainer/{name}_config.py")["disable_dropout"] is True
        lora = f"trl {name} --use_peft --lora_dropout 0.1 --model_name_or_path m"
        assert "lora.lora_dropout" not in options_of(lora)
        assert options_of(f"{lora} --no_disable_dropout")["lora.lora_dropout"] == 0.1
    assert options_of("trl sft --use_peft --model_name_or_path m")["lora.lora_dropout"] == 0.05
    assert "lora.lora_dropout" not in options_of("stage: dpo\nlora_dropout: 0.1\n")
    assert options_of("stage: sft\nlora_dropout: 0.1\n")["lora.lora_dropout"] == 0.1


def test_texts_of_pretraining_are_joined_and_cut_when_packing_is_named_too() -> None:
    assert [options_of(f"stage: pt\n{given}").get("packed.strategy") for given in ("", "packing: true\n")] == [
        "wrapped", "wrapped"]  # fmt: skip
    assert not {"packed", "packed.strategy"} & set(options_of("stage: pt\npacking: false\n"))
    assert options_of("stage: sft\npacking: true\n")["packed"] == {}


def test_what_the_tool_does_without_being_asked_and_cannot_be_done_here_is_named() -> None:
    made = made_of("trl gkd --model_name_or_path m --teacher_model_name_or_path t --dataset_name a/b")
    assert [(found.name, found.place) for found in made.lost] == [("lmbda: 0.5", "TRL's default")]
    assert made.written["plugins.distill.divergence"].value == "jsd"
    made = made_of("trl sft --model_name_or_path m --dataset_name a/b --eval_strategy steps --eval_steps 5")
    assert made.written["data.eval"].value == [{"path": "a/b", "split": "test"}]
    Path("given.yaml").write_text("model_name_or_path: m\ndataset_name: a/b\nmax_length: null\n", encoding="utf-8")
    made = made_of("trl sft --config given.yaml")
    assert "data.max_length" not in made.written
    assert lost(made) == {"max_length"}


def test_the_line_of_what_is_to_be_corrected_is_that_of_the_written_file() -> None:
    command = "trl sft --model_name_or_path m --dataset_name rows.jsonl --learning_rate fast"
    result = sftx("migrate", command)
    number = int(
        re.findall(r"to be corrected before it runs: line (\d+): option 'train.learning_rate'", result.stdout)[0]
    )
    assert Path("run.yaml").read_text(encoding="utf-8").splitlines()[number - 1] == "  learning_rate: fast"
    assert "everything was carried over" not in result.stdout


# --- data ---------------------------------------------------------------------------------------------


def test_columns_and_tags_of_dataset_info_are_carried_over() -> None:
    info = {
        "qa": {"file_name": "qa.jsonl", "columns": {"prompt": "q", "response": "a", "history": "before"}},
        "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
                 "tags": {"role_tag": "speaker", "content_tag": "text", "user_tag": "Q", "assistant_tag": "A"}},
        "openai": {"file_name": "openai.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
                   "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                            "assistant_tag": "assistant"}},
        "hub": {"hf_hub_url": "a/b", "subset": "c", "split": "train_sft", "num_samples": 7},
        "seen": {"file_name": "seen.jsonl", "columns": {"prompt": "p", "images": "pictures"}},
    }  # fmt: skip
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    Path("lora.yaml").write_text("finetuning_type: lora\nmodel_name_or_path: m\ndataset: qa,chat,openai,hub,seen\n")
    made = made_of("lora.yaml")
    assert made.written["data.train"].value == [
        {"path": "data/qa.jsonl", "columns": {"instruction": "q", "output": "a", "history": "before"}},
        {"path": "data/chat.jsonl", "columns": {"conversations": "turns"}},
        "data/openai.jsonl",
        {"path": "a/b", "subset": "c", "split": "train_sft", "limit": 7},
        {"path": "data/seen.jsonl", "columns": {"instruction": "p"}},
    ]
    assert made.written["plugins.sharegpt.role_key"].value == "speaker"
    assert made.written["plugins.sharegpt.roles"].value == {"Q": "user", "A": "assistant"}
    assert [(found.name, found.advice) for found in made.lost] == [
        ("dataset: images of seen", "text models only; leave such rows out")
    ]


def test_fields_that_llama_factory_does_not_read_are_not_read_here() -> None:
    """Rows of alpaca with a system text that dataset_info.json does not name: LLaMA-Factory leaves it out."""
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text('{"a": {"file_name": "a.json"}}', encoding="utf-8")
    row = {"instruction": "i", "input": "", "output": "o", "system": "s"}
    Path("data/a.json").write_text(json.dumps([row]), encoding="utf-8")
    Path("lora.yaml").write_text("cutoff_len: 64\nmodel_name_or_path: m\ndataset: a\n")
    columns = {"instruction": "instruction", "input": "input", "output": "output"}
    assert made_of("lora.yaml").written["data.train"].value == [{"path": "data/a.json", "columns": columns}]


@pytest.mark.parametrize(
    ("row", "trains_all", "has_template"),
    [
        ({"messages": []}, True, True), ({"text": "a"}, False, False),
        ({"prompt": "a", "completion": "b"}, False, True), ({"prompt": [], "completion": []}, False, True),
    ],
)  # fmt: skip
def test_trl_trains_every_token_of_rows_with_messages(row: Any, trains_all: bool, has_template: bool) -> None:
    Path("rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    made = made_of("trl", "sft", "--model_name_or_path", "m", "--dataset_name", "rows.jsonl")
    assert ("data.train_on_prompt" in made.written) == trains_all
    assert ("plugins.tokenizer" in made.written) == has_template
    made = made_of("trl sft --model_name_or_path m --dataset_name rows.jsonl --assistant_only_loss")
    assert "data.train_on_prompt" not in made.written


# --- what is given --------------------------------------------------------------------------------------

SCRIPT = """
import sys
from trl import SFTConfig, SFTTrainer
from peft import LoraConfig
raise SystemExit("this script must not run")
RATE = 3e-4
args = SFTConfig(output_dir="out", learning_rate=RATE, max_length=int(sys.argv[1]), **more, max_steps=5)
peft_config = LoraConfig(r=4, target_modules=["q_proj"])
trainer = SFTTrainer("sftx:tiny", args=args, train_dataset=load_dataset("json", data_files="rows.jsonl"),
                     peft_config=peft_config, formatting_func=lambda row: row["text"], callbacks=[Mine()])
"""


def test_a_script_is_read_and_not_run() -> None:
    Path("train.py").write_text(SCRIPT, encoding="utf-8")
    made = made_of("train.py")
    written = {name: option.value for name, option in made.written.items()}
    assert written["train.learning_rate"] == 3e-4
    assert written["plugins.lora.r"] == 4
    assert written["plugins.lora.lora_alpha"] == 8  # PEFT's default
    assert written["data.train"] == ["rows.jsonl"]
    assert written["train.max_steps"] == 5
    assert "train.num_train_epochs" not in written
    said = {found.name: (found.place, found.advice) for found in made.lost}
    assert set(said) == {"model", "max_length", "**more", "formatting_func", "callbacks"}
    assert said["max_length"][0] == "line 7"
    assert said["max_length"][1].startswith("int(sys.argv[1]) is no literal value; write what it stands for")
    assert made.problem.startswith("model: no model is named")


@pytest.mark.parametrize(
    ("words", "tool", "options"),
    [
        ("A=0 accelerate launch --num_processes 2 trl/scripts/dpo.py --beta 0.2 --bf16 \\\n --no_fp16", "trl",
         {"stage": "dpo", "beta": 0.2, "bf16": True, "fp16": False}),
        ("torchrun --nproc_per_node 2 sft.py --lora_target_modules q_proj v_proj --model_name_or_path a/b", "trl",
         {"stage": "sft", "lora_target_modules": ["q_proj", "v_proj"], "model_name_or_path": "a/b"}),
        ("trl grpo --reward_funcs=my.rewards.score --report_to none | tee log", "trl",
         {"stage": "grpo", "reward_funcs": "my.rewards.score", "report_to": "none"}),
        ("swift rlhf --rlhf_type kto --dataset 'a/b#5' --lr_scheduler_kwargs '{\"min_lr\": 1e-6}'", "ms-swift",
         {"rlhf_type": "kto", "dataset": "a/b#5", "lr_scheduler_kwargs": {"min_lr": 1e-6}}),
        ("llamafactory-cli train given.yaml learning_rate=1e-5 cutoff_len=8", "llama-factory",
         {"stage": "dpo", "learning_rate": 1e-5, "cutoff_len": 8}),
        ("axolotl train given.yaml --learning-rate 1e-5", "axolotl", {"stage": "dpo", "learning_rate": 1e-5}),
        ("python train_full_sft.py --epochs 3 --use_wandb", "minimind", {"epochs": 3, "use_wandb": True}),
    ],
)  # fmt: skip
def test_command_lines_are_read(words: str, tool: str, options: dict[str, Any]) -> None:
    Path("given.yaml").write_text("stage: dpo\nlearning_rate: 1.0e-4\n")
    found: Reading = read([words])
    assert found.tool == tool
    assert {name: option.value for name, option in found.options.items()} == options
    assert not found.lost


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.yaml"], "nothing.yaml: no such file; give"),
        (["empty.yaml"], "empty.yaml: has no options"),
        (["unknown.yaml"], "unknown.yaml: none of its options is known as one of TRL, LLaMA-Factory"),
        (["list.yaml"], "list.yaml: got a list"),
        (["twice.yaml"], "twice.yaml:2: not valid YAML: duplicate key 'stage'"),
        (["bytes.yaml"], "bytes.yaml:1: is not UTF-8"),
        (["bytes.py"], "bytes.py: cannot be read"),
        (["bytes.sh"], "bytes.sh: cannot be read"),
        (["nul.py"], "nul.py: is not valid Python"),
        (["broken.py"], "broken.py:1: is not valid Python"),
        (["plain.py"], "plain.py: calls none of SFTConfig"),
        (["folder"], "folder: is a directory; name the file in it"),
        ([""], "nothing is given"),
        (["trl", "vllm-serve", "--model", "x"], "trl vllm-serve: trains nothing"),
        (["trl", "sft"], "trl sft: is given no options"),
        (["trl", "sft", "--config", "nothing.yaml"], "nothing.yaml: no such file"),
        (["axolotl", "train"], "axolotl: is given no options"),
        (["axolotl", "train", "nothing.yaml"], "nothing.yaml: no such file"),
        (["python", "mine.py", "--x"], "mine.py: no such script"),
        (["make", "it"], "make it: is no command of"),
        (["trl sft --x 'a"], "the command line cannot be read: No closing quotation"),
        (["fine.yaml", "--into", "empty.yaml"], "empty.yaml: exists already"),
        (["fine.yaml", "--into", "no/such/run.yaml"], "no/such/run.yaml: cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_line(words: list[str], message: str) -> None:
    files = {
        "empty.yaml": b"", "unknown.yaml": b"zzz: 1\n", "list.yaml": b"- a\n", "twice.yaml": b"stage: sft\nstage: pt\n",
        "bytes.yaml": b"\xff\xfe\x00", "bytes.py": b"\xff\xfe", "bytes.sh": b"\xff\xfe", "nul.py": b"a\0b",
        "broken.py": b"def (\n", "plain.py": b"print(1)\n",
        "fine.yaml": b"finetuning_type: lora\nmodel_name_or_path: m\ndataset_name: rows.jsonl\n",
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    before = set(Path().iterdir())
    result = sftx("migrate", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.fullmatch(rf"sftx: error: {re.escape(message)}.*\n", result.stderr)
    assert set(Path().iterdir()) == before


def test_the_command_writes_a_file_and_never_over_one() -> None:
    words = [
        "trl",
        "sft",
        "--model_name_or_path",
        "sftx:tiny",
        "--dataset_name",
        "rows.jsonl",
        "--neftune_noise_alpha",
        "5",
    ]
    result = sftx("migrate", *words, "--zzz", "7")
    assert result.exit_code == 0
    assert "neftune_noise_alpha: 5 (--neftune_noise_alpha 5): no noise is added to embeddings" in result.stdout
    assert "zzz (--zzz 7): there is nothing like it here" in result.stdout
    assert run_file.read(Path("run.yaml"))[0]["train"]["learning_rate"] == 2e-5
    assert "#   - neftune_noise_alpha: 5" in Path("run.yaml").read_text(encoding="utf-8")
    again = sftx("migrate", *words)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "run.yaml: exists already; remove it, or name another file with --into" in again.stderr
    shown = sftx("migrate", *words, "--into", "-")
    assert yaml.safe_load(shown.stdout)["model"] == "sftx:tiny"
    assert "carried over into the run file above" in shown.stderr


def test_a_run_file_that_means_nothing_yet_says_so() -> None:
    result = sftx("migrate", "trl", "reward", "--model_name_or_path", "sftx:tiny", "--dataset_name", "rows.jsonl")
    assert "to be corrected before it runs: stage: rm: a reward model is trained elsewhere" in result.stdout
    assert "# To be corrected before it runs: stage: rm" in Path("run.yaml").read_text(encoding="utf-8")
    assert "next:" not in result.stdout


# --- comparing ------------------------------------------------------------------------------------------


class Letters:
    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(96 + token) for token in ids)


def test_differences_of_batches_are_named_with_their_place() -> None:
    from sftx.migration.comparison import _compared

    a, b = ((1, 2, 3), (False, False, True)), ((4, 5), (False, True))
    same = _compared("TRL", [a, b, b], [b, a, b], Letters())
    assert same.is_same
    assert (same.num_documents, same.num_tokens, same.num_labels) == (3, 7, 3)
    for theirs, ours, line in (
        ([a], [((1, 9, 3), a[1])], "token 1, after 'a': 'b' there, 'i' here"),
        ([a], [((1, 2, 3, 4), (*a[1], True))], "token 3: 1 more follow here: 'd'"),
        (
            [a],
            [(a[0], (False, True, True))],
            "the same 3 tokens, and 1 labels differ: token 1 'b' is trained here only",
        ),
        ([a, b], [b], "only in TRL: 'abc'"),
        ([], [b], "only in sftx: 'de'"),
    ):
        found = _compared("TRL", theirs, ours, Letters())
        assert found.differences == [f"  {line}"]
        assert not found.is_same
    cut = _compared("TRL", [a], [((1, 9, 3), a[1])], Letters(), 3)
    assert cut.differences[0].endswith("(this row is cut to 3 tokens: docs/data.md says how data.long_rows cuts)")
    assert cut.lines()[0].startswith("check: 1 example differs between TRL and sftx; the same: 0 examples")
    untrained = _compared("TRL", [a, ((1, 2), (False, False))], [a], Letters())
    assert untrained.is_same
    assert "1 more train nothing there, and are left out here" in untrained.lines()[0]
    assert not _compared("TRL", [a, b, ((1, 2), (False, False))], [a], Letters()).is_same


def test_a_tool_that_is_not_installed_is_named() -> None:
    Path("rows.jsonl").write_text('{"text": "a"}\n')
    Path("lora.yaml").write_text("cutoff_len: 64\nmodel_name_or_path: sftx:tiny\ndataset: rows.jsonl\ntemplate: qwen\n")
    result = sftx("migrate", "lora.yaml", "--check")
    assert result.exit_code == 1
    assert "LLaMA-Factory is not installed in this environment (no module llamafactory)" in result.stderr
    assert "--check-python" in result.stderr
    result = sftx("migrate", str(HERE / "axolotl" / "dpo.yaml"), "--check", "--into", "-")
    assert "batches of Axolotl cannot be made here" in result.stderr


def demo(name: str) -> Any:
    return json.loads((assets.path("llamafactory") / f"{name}_en_demo.json").read_text(encoding="utf-8"))[:8]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 8, texts, strict=False)]


def rows_of_sft() -> Iterator[dict[str, Any]]:
    """In the shape of trl-lib/Capybara."""
    for row in demo("alpaca"):
        yield {"messages": turns(row["instruction"], row["output"])}


def rows_of_dpo() -> Iterator[dict[str, Any]]:
    """In the shape of trl-lib/ultrafeedback_binarized, whose answers have the prompt in them."""
    for row in demo("dpo"):
        asked = row["conversations"][-1]["value"]
        yield {side: turns(asked, row[side]["value"]) for side in ("chosen", "rejected")}


def rows_of_kto() -> Iterator[dict[str, Any]]:
    """In the shape of trl-lib/kto-mix-14k."""
    for row in demo("kto"):
        prompt, completion = row["messages"][:-1], row["messages"][-1:]
        yield {"prompt": prompt, "completion": completion, "label": row["label"]}


def compared_line(result: Result) -> str:
    """Return what was found the same, and what was not, in the words of the table in docs/migrating.md."""
    found = re.search(r"check: .*: (\d+ examples) with ([\d,]+ tokens), [\d,]+ of them trained(.*)", result.stdout)
    assert found is not None, result.output
    others = result.stdout[found.end() :].strip().splitlines()
    cut = [line for line in others if "(this row is cut to " in line]
    assert (result.exit_code, len(others)) == (bool(cut), len(cut)), result.output
    more = found[3].replace("there, and are left out here", "in either")
    return f"{found[1]}, {found[2]}{more}" + (
        f"; {len(cut)} longer than `cutoff_len` is cut another way" if cut else ""
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft.py, full", "sft.py, full, without packing", "dpo.py, full", "kto.py, full"])
def test_batches_are_those_of_trl(name: str, real_model_dir: Path) -> None:
    """Of the commands in its documentation, with local rows in the shape of those that they name."""
    command = trl_commands()[name.removesuffix(", without packing")]
    command = command if name == "sft.py, full" else command.replace("--packing", "")
    rows = {"sft": rows_of_sft, "dpo": rows_of_dpo, "kto": rows_of_kto}[name[:3]]()
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for option, value in (("model_name_or_path", str(real_model_dir)), ("dataset_name", "rows.jsonl")):
        command, number = re.subn(rf"--{option}[ =]\S+", f"--{option} {value}", command)
        assert number == 1
    line = compared_line(sftx("migrate", command, "--check"))
    assert line == real_files.COMPARED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_lora_sft.yaml", "qwen3_lora_dpo.yaml", "qwen3_lora_kto.yaml"])
def test_batches_are_those_of_llama_factory(name: str, real_model_dir: Path) -> None:
    """It needs older versions of the same libraries: `pip install llamafactory==0.9.5` in an environment of its own."""
    python = os.environ.get("LLAMA_FACTORY_PYTHON")
    if python is None:
        pytest.skip("LLaMA-Factory is not installed: LLAMA_FACTORY_PYTHON names the interpreter of its environment")
    Path("data").symlink_to(assets.path("llamafactory"))
    text = (assets.path("llamafactory_options") / name).read_text(encoding="utf-8")
    Path("theirs.yaml").write_text(re.sub("Qwen/.*", str(real_model_dir), text), encoding="utf-8")
    result = sftx("migrate", "theirs.yaml", "--check-python", python)
    assert compared_line(result) == real_files.COMPARED[name]
    assert "LLaMA-Factory 0.9.5 and sftx" in result.stdout


def test_rows_that_are_joined_and_cut_are_not_compared() -> None:
    Path("lora.yaml").write_text("stage: pt\nmodel_name_or_path: sftx:tiny\ndataset: rows.jsonl\n", encoding="utf-8")
    Path("rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    result = sftx("migrate", "lora.yaml", "--check")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "--check: LLaMA-Factory joins texts and cuts them into rows" in result.stderr
