"""Reads what was given to another tool: a YAML file, a command line, or a Python script, which is never executed."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sftx.config import run_file
from sftx.config.other_tools import TOOLS
from sftx.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """An option of another tool."""

    name: str
    value: Any
    place: str
    """`line 7`, or the argument as it was typed."""


@dataclass
class Reading:
    """The options that were given to another tool."""

    tool: str
    """A key of TOOLS."""
    title: str
    """What was read, for people: `trl sft`, or a file's name."""
    options: dict[str, Option] = field(default_factory=dict)
    lost: list[tuple[str, str, str]] = field(default_factory=list)
    """What could not be read: name, place, and what to do."""

    implied: set[str] = field(default_factory=set)
    """Options that stand for something else, such as the command `trl dpo`, and that nobody wrote."""

    def add(self, name: str, value: Any, place: str) -> None:
        self.options[name] = Option(name, value, place)

    def imply(self, name: str, value: Any, place: str) -> None:
        self.add(name, value, place)
        self.implied.add(name)


def read(words: Sequence[str]) -> Reading:
    """Read `words`, a file or a command line. Raises ConfigError."""
    words = list(words)
    if len(words) == 1 and not Path(words[0]).is_file() and re.search(r"\s", words[0].strip()):
        words = _split(words[0])
    if not any(words):
        raise ConfigError("nothing is given; give a YAML file, a Python script, or a command line")
    reading = _read_file(Path(words[0])) if len(words) == 1 else _read_command(words)
    if not set(reading.options) - reading.implied and not reading.lost:
        raise ConfigError(f"{reading.title}: is given no options; nothing to carry over")
    return reading


def _split(text: str) -> list[str]:
    """Split a command line as a shell does; a backslash before a line's end continues it."""
    try:
        return shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ConfigError(f"the command line cannot be read: {error}; check its quotes") from None


def _check_is_there(path: Path) -> None:
    """Raise ConfigError unless there is something at the path that is no directory."""
    if not path.exists():
        raise ConfigError(
            f"{path}: no such file; give a YAML file, a Python script, or a command line such as 'trl sft --...'"
        )
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name the file in it")


def _read_file(path: Path) -> Reading:
    _check_is_there(path)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        return _read_yaml(path)
    if path.suffix == ".py":
        return _read_script(path)
    if path.suffix in (".sh", ".bash", ".txt", ""):
        return _read_shell_file(path)
    raise ConfigError(f"{path}: is no YAML file (.yaml), Python script (.py) or shell script (.sh)")


# --- YAML --------------------------------------------------------------------------------------------

_SIGNS: Final[Mapping[str, tuple[str, ...]]] = {
    "llama-factory": (
        "finetuning_type", "stage", "cutoff_len", "template", "lora_rank", "lora_target", "dataset_dir", "pref_loss",
        "pref_beta", "neat_packing", "preprocessing_num_workers", "overwrite_output_dir",
    ),
    "axolotl": (
        "base_model", "sequence_len", "datasets", "adapter", "micro_batch_size", "sample_packing", "val_set_size",
        "num_epochs", "lora_target_linear", "rl", "chat_template", "output_dir", "lora_r",
    ),
    "ms-swift": (
        "tuner_type", "train_type", "torch_dtype", "split_dataset_ratio", "rlhf_type", "model", "truncation_strategy",
        "attn_impl", "lazy_tokenize", "loss_scale",
    ),
    "trl": (
        "dataset_name", "use_peft", "lora_r", "dataset_text_field", "assistant_only_loss", "completion_only_loss",
        "max_length", "packing_strategy", "lora_target_modules", "model_init_kwargs", "dtype",
    ),
}  # fmt: skip
"""Options by which a YAML file is recognised as one tool's."""


def tool_of(names: Iterable[str]) -> str | None:
    """Return the tool that most of the options point to; None if none does."""
    found = set(names)
    counts = {tool: sum(sign in found for sign in signs) for tool, signs in _SIGNS.items()}
    best = max(counts, key=lambda tool: counts[tool])
    return best if counts[best] else None


def _read_yaml(path: Path, tool: str | None = None) -> Reading:
    _check_is_there(path)
    values, origins = run_file.read(path)
    if not values:
        raise ConfigError(f"{path}: has no options")
    tool = tool or tool_of(values)
    if tool is None:
        titles = ", ".join(known.title for known in TOOLS.values())
        raise ConfigError(f"{path}: none of its options is known as one of {titles}; got {', '.join(list(values)[:5])}")
    reading = Reading(tool, f"{TOOLS[tool].title}'s {path}")
    for name, value in values.items():
        reading.add(name, value, origins.of(name).replace(f"{path}:", "line "))
    return reading


# --- command lines -----------------------------------------------------------------------------------

_TRL_STAGES: Final = ("sft", "dpo", "kto", "grpo", "rloo", "reward", "orpo", "cpo", "gkd", "ppo")
_STAGE_NAMES: Final = {"reward": "rm"}


def _read_shell_file(path: Path) -> Reading:
    """The first command in a shell script that starts a known tool."""
    try:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    for line in text.splitlines():
        if re.search(r"\b(trl|swift|megatron|llamafactory-cli|axolotl|(\w+/)*\w+\.py)\b", line.partition("#")[0]):
            return _read_command(_split(line))
    raise ConfigError(f"{path}: has no command of trl, llamafactory-cli, axolotl or swift")


def _read_command(words: list[str]) -> Reading:
    """A command line of trl, llamafactory-cli, axolotl or swift, or of a script such as sft.py."""
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("env", "sudo", "nohup", "!")):
        words = words[1:]
    for at, word in enumerate(words):
        name = Path(word).name
        rest = words[at + 1 :]
        if name in ("trl", "swift", "megatron") and rest:
            return _of_trl(rest[0], rest[1:]) if name == "trl" else _of_swift(rest[0], rest[1:])
        if name in ("llamafactory-cli", "lmf", "axolotl", "llamafactory.cli", "axolotl.cli.train") and rest:
            tool = "axolotl" if name.startswith("axolotl") else "llama-factory"
            rest = rest[1:] if rest[0] in ("train", "preprocess", "sft") else rest
            return _with_file(tool, name, rest)
        if name.endswith(".py"):
            return _of_script(word, rest)
    raise ConfigError(
        f"{shlex.join(words[:3])}: is no command of trl, llamafactory-cli, axolotl or swift, and names no Python script"
    )


def _of_trl(stage: str, arguments: list[str]) -> Reading:
    if stage not in _TRL_STAGES:
        raise ConfigError(f"trl {stage}: trains nothing; commands that do are {', '.join(_TRL_STAGES)}")
    reading = _with_arguments("trl", f"trl {stage}", arguments)
    reading.imply("stage", _STAGE_NAMES.get(stage, stage), f"trl {stage}")
    return reading


def _of_swift(command: str, arguments: list[str]) -> Reading:
    if command not in ("sft", "pt", "rlhf"):
        raise ConfigError(f"swift {command}: trains nothing; commands that do are sft, pt, rlhf")
    reading = _with_arguments("ms-swift", f"swift {command}", arguments)
    if command == "rlhf" and "rlhf_type" not in reading.options:
        reading.imply("rlhf_type", "dpo", f"swift {command}")
    if command == "pt":
        reading.imply("stage", "pt", f"swift {command}")
    return reading


def _of_script(script: str, arguments: list[str]) -> Reading:
    """A script of TRL's, such as trl/scripts/sft.py, by its name; any other is read itself."""
    if Path(script).stem == "train_full_sft":
        return _with_arguments("minimind", f"MiniMind's {Path(script).name}", arguments)
    stage = Path(script).stem.split("_")[0]
    if stage in _TRL_STAGES and arguments:
        return _of_trl(stage, arguments)
    if Path(script).is_file():
        reading = _read_script(Path(script))
        if arguments:
            reading.lost.append(
                (
                    shlex.join(arguments[:4]),
                    "the command line",
                    f"what it means is in {script}; write it into the run file",
                )
            )
        return reading
    raise ConfigError(
        f"{script}: no such script, and none of TRL's ({', '.join(f'{name}.py' for name in _TRL_STAGES)})"
    )


def _with_file(tool: str, program: str, arguments: list[str]) -> Reading:
    """A YAML file, and options after it that win over the file's: `key=value` or `--key value`."""
    files = [word for word in arguments if word.endswith((".yaml", ".yml", ".json")) and "=" not in word]
    if files and arguments[0] == files[0]:
        reading = _read_yaml(Path(files[0]), tool)
        more = _with_arguments(tool, program, arguments[1:])
        reading.options |= more.options
        return reading
    return _with_arguments(tool, program, arguments)


def _with_arguments(tool: str, title: str, arguments: list[str]) -> Reading:
    """`--name value`, `--name=value`, `--flag`, `--no_flag`, `name=value`; several values are a list."""
    reading = Reading(tool, title)
    at = 0
    while at < len(arguments):
        word = arguments[at]
        at += 1
        if word in ("|", "&&", ";", "&", ">", "2>&1"):
            break
        assigned = re.fullmatch(r"(?:--)?([\w.\-]+)=(.*)", word, re.DOTALL)
        if assigned:
            reading.add(_name(assigned[1]), _value(assigned[2]), word)
            continue
        if not word.startswith("--"):
            reading.lost.append((word, "the command line", "what it stands for is not known"))
            continue
        values = []
        while (
            at < len(arguments)
            and not re.match(r"--[A-Za-z]", arguments[at])
            and arguments[at] not in ("|", "&&", ";", "&")
        ):
            values.append(arguments[at])
            at += 1
        name = _name(word[2:])
        if not values and name.startswith("no_") and name != "no_cuda":
            reading.add(name.removeprefix("no_"), False, word)
        else:
            typed = [_value(value) for value in values]
            reading.add(
                name, True if not typed else typed[0] if len(typed) == 1 else typed, shlex.join([word, *values])
            )
    if (config := reading.options.pop("config", None)) is not None:
        below = _read_yaml(Path(str(config.value)), tool)
        reading.options = {**below.options, **reading.options}
    return reading


def _name(text: str) -> str:
    return text.strip("-").replace("-", "_")


def _value(text: str) -> Any:
    """The value of an argument: JSON, a number, a switch, or text."""
    if text[:1] in "[{":
        try:
            return json.loads(text)
        except ValueError:
            return text
    parsed, _ = run_file.parse(text) if re.fullmatch(r"[\w.+\-]+", text) else (text, None)
    return text if parsed is None or isinstance(parsed, dict | list) else parsed


# --- scripts -----------------------------------------------------------------------------------------

_CONFIGS: Final = {
    "SFTConfig": "sft", "DPOConfig": "dpo", "KTOConfig": "kto", "ORPOConfig": "orpo", "CPOConfig": "cpo",
    "GRPOConfig": "grpo", "RewardConfig": "rm", "GKDConfig": "gkd", "PPOConfig": "ppo", "TrainingArguments": None,
    "Seq2SeqTrainingArguments": None, "UnslothTrainingArguments": None,
}  # fmt: skip
"""Classes whose keyword arguments are options, with the stage that they stand for."""
_TRAINERS: Final = {
    "SFTTrainer": "sft", "DPOTrainer": "dpo", "KTOTrainer": "kto", "ORPOTrainer": "orpo", "CPOTrainer": "cpo",
    "GRPOTrainer": "grpo", "RewardTrainer": "rm", "GKDTrainer": "gkd", "Trainer": None, "UnslothTrainer": "sft",
}  # fmt: skip
_MODELS: Final = ("AutoModelForCausalLM", "FastLanguageModel", "FastModel", "AutoPeftModelForCausalLM")
_OF_MODEL: Final = (
    "load_in_4bit", "load_in_8bit", "max_seq_length", "trust_remote_code", "full_finetuning", "dtype", "torch_dtype",
    "device_map", "attn_implementation", "fast_inference", "max_lora_rank",
)  # fmt: skip


class _UnreadableError(Exception):
    """An expression that is no literal."""


def _read_script(path: Path) -> Reading:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except SyntaxError as error:
        place = path if error.lineno is None else f"{path}:{error.lineno}"
        raise ConfigError(f"{place}: is not valid Python: {error.msg}") from None
    reading = _Script(path, tree).read()
    if not set(reading.options) - reading.implied and not reading.lost:
        known = ", ".join([*list(_CONFIGS)[:4], "LoraConfig"])
        raise ConfigError(f"{path}: calls none of {known} or the like with keyword arguments")
    return reading


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Script:
    """Finds calls of known classes in a script, and the literal values of their keyword arguments."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self._path, self._tree = path, tree
        self._reading = Reading("trl", str(path))
        self._reading.imply("source", "script", str(path))
        self._names = self._assigned()

    def _assigned(self) -> dict[str, Any]:
        """Variables that are assigned once, to a literal."""
        found: dict[str, Any] = {}
        several: set[str] = set()
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and node.value is not None:
                    several |= {target.id} & set(found)
                    try:
                        found[target.id] = ast.literal_eval(node.value)
                    except ValueError:
                        found[target.id] = node.value
        return {name: value for name, value in found.items() if name not in several}

    def read(self) -> Reading:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call):
                self._call(node)
        return self._reading

    def _call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        owner = (
            function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        )
        if name in _CONFIGS:
            self._stage(_CONFIGS[name], node)
            if name.endswith("TrainingArguments"):
                self._reading.imply("class", "TrainingArguments", self._place(node))
            self._keywords(node)
        elif name in ("LoraConfig", "BitsAndBytesConfig"):
            if name == "LoraConfig":
                self._reading.imply("use_peft", True, self._place(node))
            self._keywords(node)
        elif name in _TRAINERS:
            self._trainer(node, _TRAINERS[name])
        elif name == "from_pretrained" and owner in _MODELS:
            if owner.startswith("Fast"):
                self._reading.imply("unsloth", True, self._place(node))
            self._positional(node, "model_name_or_path", "model_name", "pretrained_model_name_or_path")
            self._keywords(node, only=_OF_MODEL)
        elif name == "get_peft_model" and owner in _MODELS:
            self._reading.imply("use_peft", True, self._place(node))
            self._keywords(node, but=("model",))
        elif name == "get_peft_model":
            self._reading.imply("use_peft", True, self._place(node))
        elif name == "load_dataset":
            self._load_dataset(node)
        elif name == "get_chat_template":
            self._keywords(node, only=("chat_template",))
        elif name == "train_on_responses_only":
            self._reading.imply("train_on_responses_only", True, self._place(node))

    def _place(self, node: ast.AST) -> str:
        return f"line {getattr(node, 'lineno', 0)}"

    def _literal(self, node: ast.expr) -> Any:
        """The value of an expression: a literal, a variable that is assigned one, or a choice of what torch can."""
        try:
            return ast.literal_eval(node)
        except ValueError:
            pass
        if isinstance(node, ast.Name) and node.id in self._names:
            value = self._names[node.id]
            if not isinstance(value, ast.expr):
                return value
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            return f"torch.{node.attr}"
        raise _UnreadableError(ast.unparse(node))

    def _stage(self, stage: str | None, node: ast.Call) -> None:
        if stage is not None:
            self._reading.imply("stage", stage, self._place(node))

    def _keywords(self, node: ast.Call, *, only: Sequence[str] = (), but: Sequence[str] = ()) -> None:
        for keyword in node.keywords:
            if keyword.arg is None:
                self._lose("**" + ast.unparse(keyword.value), keyword.value, "write its options into the run file")
            elif (not only or keyword.arg in only) and keyword.arg not in but:
                self._keyword(keyword.arg, keyword.value)

    def _keyword(self, name: str, value: ast.expr) -> None:
        try:
            self._reading.add(name, self._literal(value), self._place(value))
        except _UnreadableError as error:
            text = str(error)
            if "is_bfloat16_supported" in text or "is_bf16_supported" in text:
                return  # bf16 where the device has it: the default here
            self._lose(
                name,
                value,
                f"{_cut(text)} is no literal value; write what it stands for into the run file",
            )

    def _lose(self, name: str, node: ast.AST, why: str) -> None:
        self._reading.lost.append((name, self._place(node), why))

    def _positional(self, node: ast.Call, option: str, *keywords: str) -> None:
        named = next((keyword.value for keyword in node.keywords if keyword.arg in keywords), None)
        value = node.args[0] if node.args else named
        if value is not None and option not in self._reading.options:
            self._keyword(option, value)

    def _trainer(self, node: ast.Call, stage: str | None) -> None:
        if stage is not None and "stage" not in self._reading.options:
            self._stage(stage, node)
        for keyword in node.keywords:
            if keyword.arg == "model" and not isinstance(keyword.value, ast.Name | ast.Call):
                self._keyword("model_name_or_path", keyword.value)
            elif keyword.arg in ("dataset_text_field", "max_seq_length", "packing", "dataset_num_proc", "beta"):
                self._keyword(keyword.arg, keyword.value)
            elif keyword.arg in (
                "reward_funcs",
                "formatting_func",
                "data_collator",
                "callbacks",
                "ref_model",
                "compute_metrics",
            ):
                self._code(keyword.arg, keyword.value)

    def _code(self, name: str, value: ast.expr) -> None:
        if name == "reward_funcs":
            functions = [n.name for n in self._tree.body if isinstance(n, ast.FunctionDef)]
            used = value.elts if isinstance(value, ast.List) else [value]
            texts = [ast.unparse(item) for item in used]
            if len(texts) == 1 and texts[0] in functions:
                self._reading.add(
                    "reward_funcs",
                    f"{self._path.with_suffix('').as_posix().replace('/', '.')}.{texts[0]}",
                    self._place(value),
                )
                return
        self._keyword(name, value)

    def _load_dataset(self, node: ast.Call) -> None:
        """`load_dataset("json", data_files="rows.jsonl", split="train")`, or `load_dataset("owner/name", "subset")`."""
        if "dataset_name" in self._reading.options:
            self._lose("load_dataset", node, "a second one; add it to data.train or data.eval")
            return
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        try:
            path = self._literal(node.args[0] if node.args else keywords["path"])
            files = self._literal(keywords["data_files"]) if "data_files" in keywords else None
        except (_UnreadableError, KeyError):
            self._lose("load_dataset", node, "its arguments are no literal values; write the path into data.train")
            return
        if isinstance(files, dict):
            files = files.get("train", next(iter(files.values()), None))
        self._reading.add("dataset_name", files or path, self._place(node))
        for option, value in (
            ("dataset_config", keywords.get("name", node.args[1] if len(node.args) > 1 else None)),
            ("dataset_train_split", keywords.get("split")),
        ):
            if value is not None:
                self._keyword(option, value)
        split = self._reading.options.get("dataset_train_split")
        if split is not None and isinstance(split.value, list) and split.value:
            self._reading.add("dataset_train_split", split.value[0], split.place)
            if split.value[1:]:
                self._lose("split", node, f"{split.value[1]} is of the same dataset; add it to data.eval")
            split = self._reading.options["dataset_train_split"]
        if split is not None and (cut := re.fullmatch(r"(\w+)\[:(\d+)\]", str(split.value))):
            self._reading.add("dataset_train_split", cut[1], split.place)
            self._reading.add("max_samples", int(cut[2]), split.place)
