"""The real configurations of other tools with which `sftx migrate` is tested, and the table of them in the docs.

`migrating_pages.py` writes the table into docs/migrating.md. Its counts are those of today. What it says of batches is
`COMPARED`, which the slow tests of tests/migration/test_migrate.py compare with what both tools make.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import tempfile
from pathlib import Path
from typing import Final

import assets
from sftx.assembly.discovery import options_class
from sftx.migration.reading import read
from sftx.migration.translation import Translation, translate

AXOLOTL: Final = Path(__file__).parents[1] / "migration" / "axolotl"
LLAMA_FACTORY_FILES: Final = (
    "qwen3_full_sft", "qwen3_lora_dpo", "qwen3_lora_kto", "qwen3_lora_pretrain", "qwen3_lora_sft", "qwen3_lora_sft_ds3",
    "qwen3_lora_sft_otfq", "qwen3_lora_sft_ray", "llama3_lora_sft_gptq", "deepseek_v3_lora_sft_kt",
)  # fmt: skip
AXOLOTL_FILES: Final = ("lora-1b.yml", "instruct-lora-8b.yml", "dpo.yaml", "qlora-fsdp.yaml", "qlora-1b-kto.yaml")
COMPARED: Final[dict[str, str]] = {
    "qwen3_lora_sft.yaml": "16 examples, 1,803 tokens",
    "qwen3_lora_dpo.yaml": "16 examples, 8,363 tokens",
    "qwen3_lora_kto.yaml": "7 examples, 6,694 tokens; 1 longer than `cutoff_len` is cut another way",
    "sft.py, full": "8 examples, 1,673 tokens",
    "sft.py, full, without packing": "8 examples, 1,673 tokens",
    "dpo.py, full": "16 examples, 7,755 tokens",
    "kto.py, full": "6 examples, 3,683 tokens",
}
"""What `--check` finds the same in the first 8 rows of each source, by file: what the slow tests see.

It was seen with LLaMA-Factory 0.9.5 and TRL 1.16.0 in November 2026.
"""


def trl_commands() -> dict[str, str]:
    """Return the commands in the documentation of TRL's scripts as they are installed, by a name for each."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    found: dict[str, str] = {}
    for name in ("sft", "dpo", "kto"):
        script = Path(spec.submodule_search_locations[0]) / "scripts" / f"{name}.py"
        text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
        for command in re.findall(r"^(python \S*\.py .*?)\n\s*```", text, flags=re.MULTILINE | re.DOTALL):
            kind = "with LoRA" if "--use_peft" in command else "full"
            found[f"{name}.py, {kind}"] = command
    return found


def all_files() -> dict[str, dict[str, str]]:
    """Return what `sftx migrate` is given, by tool and name."""
    options = assets.ROOT / "llamafactory_options"
    return {
        "LLaMA-Factory": {f"{name}.yaml": str(options / f"{name}.yaml") for name in LLAMA_FACTORY_FILES},
        "Axolotl": {name: str(AXOLOTL / name) for name in AXOLOTL_FILES},
        "TRL": trl_commands(),
    }


def made_of(*words: str) -> Translation:
    return translate(read(list(words)), options_class)


def table() -> str:
    """Return the table of all files. LLaMA-Factory's are read where its demo sets are in `data`."""
    lines = [
        "| configuration | carried over | not needed | not here | the same in both |",
        "| --- | --- | --- | --- | --- |",
    ]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "data").symlink_to(assets.path("llamafactory"))
        try:
            os.chdir(directory)
            for tool, files in all_files().items():
                for name, words in files.items():
                    lines.append(_line(tool, name, made_of(words)))
        finally:
            os.chdir(before)
    return "\n".join(lines) + "\n"


def _line(tool: str, name: str, made: Translation) -> str:
    not_needed = sum(map(len, made.not_needed.values()))
    not_here = ", ".join(dict.fromkeys(f"`{found.name.partition(':')[0]}`" for found in made.lost))
    return f"| {tool}: {name} | {len(made.carried)} | {not_needed} | {not_here or 'none'} | {COMPARED.get(name, '')} |"
