"""Writes the tables of docs/migrating/*.md: `python tests/helpers/migrating_pages.py`.

Each page has the options of one tool. Which those are is read from the tool's own source: what is installed beside
sftx, and what `make assets` fetched.
"""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import os
import re
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import assets
import real_files
from sftx.cli import main
from sftx.config.other_tools import ANY, TABLE, TOOLS, Row, Rule

PAGES = Path(__file__).parents[2] / "docs" / "migrating"
ENTRY = PAGES.with_suffix(".md")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"

NESTED = (
    "SFTDataset UserDefined Pretraining DPO Stepwise KTO Synthetic EBFT TRLConfig Vllm QAT PTQ FP8 FSDP Role LrGroup "
    "Dynamic Selective SpecialTokens AxolotlConfigWCapabilities"
)
"""Begins the names of Axolotl's classes that are nested under an option with a row of its own, or concern serving."""
UNSLOTH = (
    "model_name max_seq_length dtype load_in_4bit load_in_8bit full_finetuning r target_modules lora_alpha "
    "lora_dropout bias use_gradient_checkpointing random_state use_rslora loftq_config modules_to_save max_lora_rank "
    "fast_inference dataset_text_field packing dataset_num_proc instruction_part response_part"
)
"""Arguments of FastLanguageModel, SFTTrainer and train_on_responses_only in Unsloth's notebooks."""


def annotated(path: Path, *, but: str = " ") -> dict[str, Any]:
    """Return the fields of the classes in a module that cannot be imported, with the defaults that are plain values."""
    fields: dict[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for line in (
            node.body if isinstance(node, ast.ClassDef) and not node.name.startswith(tuple(but.split())) else ()
        ):
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            call = line.value if isinstance(line.value, ast.Call) else None
            default = next((k.value for k in call.keywords if k.arg == "default"), None) if call else line.value
            fields[line.target.id] = default.value if isinstance(default, ast.Constant) else None
    return fields


def _installed(package: str, *files: str) -> set[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    return {name for file in files for name in annotated(root / file)}


def options_of(tool: str) -> set[str]:
    """Return the names of a tool's options."""
    own = {name for row in TOOLS[tool].rows for name in row.names} if tool in TOOLS else set()
    if tool == "trl":
        configs = [f"trainer/{name}_config.py" for name in ("base", "sft", "dpo", "kto", "grpo", "reward", "model")]
        names = _installed("trl", *configs, "scripts/utils.py") | _installed("peft", "tuners/lora/config.py")
        return names | _installed("transformers", "training_args.py") | {"chat_template"}
    if tool == "llama-factory":
        files = sorted(assets.path("llamafactory_options").glob("*_args.py"))
        return {name for file in files for name in annotated(file)} | _installed("transformers", "training_args.py")
    if tool == "axolotl":
        files = sorted(assets.path("axolotl_options").glob("*.py"))
        return {name for file in files for name in annotated(file, but=NESTED)}
    if tool == "unsloth":
        return set(UNSLOTH.split())
    more = {"minimind": "epochs learning_rate max_seq_len data_path dtype seed wandb_project"}
    return own | set(more.get(tool, "").split())


def page(tool: str, text: str) -> str:
    """Return the page with the table and the run files of today."""
    if BEGIN in text:
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        text = f"{before}{BEGIN}\n{table(tool)}\n{END}{after}"
    return with_run_files(text)


_FILE = re.compile(r"^`([\w./-]+)`\n\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ sftx migrate (.*)$", re.MULTILINE)


def with_run_files(text: str) -> str:
    """Return the text with what `sftx migrate` writes of the files that it shows: it is in a block named like that."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        try:
            os.chdir(directory)
            for name, content in _FILE.findall(text):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text(content, encoding="utf-8")
            for command in _COMMAND.findall(text):
                words = shlex.split(command)
                into = words[words.index("--into") + 1] if "--into" in words else f"{Path(words[0]).stem}.sftx.yaml"
                Path(into).unlink(missing_ok=True)
                result = CliRunner().invoke(main, ["migrate", *words], catch_exceptions=False)
                assert result.exit_code == 0, result.output
            return _FILE.sub(_as_written, text)
        finally:
            os.chdir(before)


def _as_written(found: re.Match[str]) -> str:
    content = Path(found[1]).read_text(encoding="utf-8")
    return found[0].replace(found[2], content, 1) if found[2] else found[0]


def table(tool: str) -> str:
    names = options_of(tool)
    own = TOOLS["trl" if tool == "unsloth" else tool].rows
    hidden = {"source", "class", "rows", "unsloth", "train_on_responses_only"}
    lines = ["| there | with the value | here |", "| --- | --- | --- |"]
    of_own = {name for row in own for name in row.names}
    for row in own:
        lines += _lines(row, [name for name in row.names if name in names or tool in ("ms-swift",)], hidden)
    for rows in TABLE.values():
        for row in rows:
            shown = [name for name in row.names if _has(name, names - of_own)]
            lines += _lines(row, shown, hidden)
    return "\n".join(lines) + "\n"


def _has(name: str, names: Iterable[str]) -> bool:
    return name in names if "*" not in name else bool(fnmatch.filter(names, name))


def _lines(row: Row, names: list[str], hidden: set[str]) -> Iterator[str]:
    shown = ", ".join(f"`{name}`" for name in names if name not in hidden)
    if not shown:
        return
    for number, (key, rule) in enumerate(row.rules):
        yield f"| {'' if number else shown} | {_value(key, alone=len(row.rules) == 1)} | {_here(rule)} |"


def _value(key: object, *, alone: bool) -> str:
    if key is ANY:
        return "" if alone else "any other"
    if isinstance(key, type):
        return {"float": "a share", "int": "a number", "str": "a word", "dict": "a mapping"}[key.__name__]
    return f"`{str(key).lower() if isinstance(key, bool) else key}`"


def _here(rule: Rule) -> str:
    why = rule.why.replace("|", "\\|").replace("<", "&lt;")
    if rule.kind == "write":
        return ", ".join(f"`{target}`" for target in rule.targets) + (f": {why}" if why else "")
    return f"left out{f': {why}' if why else ''}" if rule.kind == "leave out" else f"not here: {why}"


def all_pages() -> dict[Path, str]:
    """Return what each page with a table should be."""
    files = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    return {path: page(path.stem, text) for path, text in files.items()}


def entry_page() -> str:
    """Return what docs/migrating.md should be: its table is of real configurations."""
    before, _, rest = ENTRY.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{real_files.table()}\n{END}{after}"


if __name__ == "__main__":
    for path, text in {**all_pages(), ENTRY: entry_page()}.items():
        path.write_text(text, encoding="utf-8")
