"""Writes the README.md of an artefact: the model card that the hub shows, and how to load it so that it stops."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from sftx.checkpoint import layout
from sftx.checkpoint.run_directory import RunDirectory
from sftx.config.run_file import read
from sftx.model import names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEFT_CONFIG: Final = "adapter_config.json"
_QUESTION: Final = "What is the capital of France?"

_ADAPTER: Final = """# An adapter of {name}

{stop}PEFT and `pipeline()` take the generation settings of the base model, which may stop elsewhere. Those of this
adapter are in its `generation_config.json`:

```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

directory = "."  # of this file
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
model.generation_config = GenerationConfig.from_pretrained(directory)

messages = [{{"role": "user", "content": "What is the capital of France?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

A merged model keeps these settings, and everything that loads it stops:

```python
merged = model.merge_and_unload()
merged.generation_config = model.generation_config
merged.save_pretrained("merged")
tokenizer.save_pretrained("merged")
```

`pipeline()` reads the base model's tokenizer too, unless it is given this one:

```python
from transformers import pipeline

generate = pipeline(
    "text-generation",
    model=directory,
    tokenizer=directory,
    generation_config=GenerationConfig.from_pretrained(directory),
)
print(generate(messages, max_new_tokens=256)[0]["generated_text"][-1]["content"])
```
"""


def write_adapter(directory: Path, stop: str | None) -> None:
    """Write README.md beside adapter_config.json. `stop` is the token that ends an answer."""
    config = json.loads((directory / PEFT_CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path"))
    body = _ADAPTER.format(name=names.describe(base), stop=f"Answers end with `{stop}`. " if stop else "")
    kind = str(config.get("peft_type", "peft")).lower()
    # As adapter_config.json names it: where that is a directory, `sftx push` puts an id in its place.
    named, tags = names.hub_id(base) or base, [kind, "transformers"]
    _write(directory, _front_matter(named, "peft", _license(base), relation="adapter", tags=tags), body)


@dataclass(frozen=True)
class Origin:
    """An Origin holds what the card of an export says of the run that it comes from."""

    base: str
    """Directory or hub id of the base model, as the run names it."""
    license: str | None
    """That of the base model, where it is known."""
    stops: tuple[str, ...]
    """The tokens that end an answer."""
    example: str
    """A question as the chat template renders it; empty without a template."""
    template: str
    """Name of the template plugin; empty where it is the tokenizer's own."""
    data: tuple[str, ...]
    """A row of a table for each source of the run's data."""
    num_rows: str
    """How many rows these have, as a part of a sentence; empty where that was not recorded."""
    datasets: tuple[str, ...]
    """Those of the data that are on the hub, by their ids."""
    metrics: tuple[str, ...]
    """A row of a table for each metric of the held-out rows."""
    steps: int | None
    """Optimizer steps that were trained."""


def describe_origin(
    run_directory: Path | None, base: str, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> Origin:
    """Return what the record of a run says, and what the model itself shows. `run_directory` is None without a run.

    `base`: the base model's directory or hub id.
    """
    license_ = _license(base)
    manifest: Mapping[str, Any] = {}
    summary: Mapping[str, Any] = {}
    config: Mapping[str, Any] = {}
    if run_directory is not None:
        record = RunDirectory(run_directory)
        manifest, summary = (record.read_json(name) or {} for name in (layout.MANIFEST, layout.SUMMARY))
        config = read(run_directory / layout.RUN)[0]
        base = str(config.get("model", base))
    sources = [(split, source) for split in ("data", "eval_data") for source in manifest.get(split, ())]
    numbers = manifest.get("num_rows") or {}
    held_out = summary.get("held_out") or {}
    before, after = held_out.get("before") or {}, held_out.get("after") or {}
    templates = [line["plugin"] for line in manifest.get("plugins", ()) if line["stage"] == "template"]
    return Origin(
        base=base,
        license=license_,
        stops=tuple(str(tokenizer.decode([token_id])) for token_id in stop_ids),
        example=_render(tokenizer),
        template=next(iter(templates), ""),
        data=tuple(_source(split, source) for split, source in sources),
        num_rows=" and ".join(f"{number:,} {kind} rows" for kind, number in numbers.items() if number),
        datasets=tuple(
            dict.fromkeys(name for _, source in sources if (name := str(source.get("path"))) and _is_hub_id(name))
        ),
        metrics=tuple(
            f"| {name} | {before[name]:.4g} | {after[name]:.4g} |"
            for name in after
            if isinstance(before.get(name), int | float) and isinstance(after[name], int | float)
        ),
        steps=summary.get("num_steps"),
    )


def write_export(directory: Path, origin: Origin, usage: str, checked: str) -> None:
    """Write README.md into an export. `usage` is how to load it; `checked` says how it was compared with the run."""
    files = {path.suffix for path in directory.rglob("*") if path.is_file()}
    library, relation = None, "finetune"
    if (directory / PEFT_CONFIG).exists():
        library, relation = "peft", "adapter"
    elif (directory / "config.json").exists() and ".safetensors" in files:
        library = "transformers"
    elif ".gguf" in files:
        library, relation = "gguf", "quantized"
    hub_id = names.hub_id(origin.base)  # the hub takes no other name of a base model
    matter = _front_matter(hub_id, library, origin.license, relation=relation, datasets=origin.datasets)
    fence = "python" if "import " in usage else ""
    parts = [
        f"# A model trained from {names.describe(origin.base) if hub_id else f'`{Path(origin.base).name}`'}",
        f"```{fence}\n{usage.strip()}\n```",
    ]
    if origin.stops:
        parts.append(f"Answers end with {' or '.join(f'`{stop}`' for stop in origin.stops)}.")
    if origin.example:
        by = f"The template is `{origin.template}` of the run" if origin.template else "The template is the tokenizer's"
        parts += ["## Template", f"{by}. A question is rendered as", f"```\n{origin.example.rstrip()}\n```"]
    if origin.data:
        counted = [f"There are {origin.num_rows}."] if origin.num_rows else []
        parts += ["## Data", *counted, _table("source", "SHA-256 or version", rows=origin.data)]
    if origin.metrics:
        trained = f" and after {origin.steps:,} steps" if origin.steps else " and after"
        parts += [
            "## Metrics",
            f"Of the held-out rows, before training{trained}.",
            _table("metric", "before", "after", rows=origin.metrics),
        ]
    parts += ["## Verification", checked]
    if origin.license:
        parts += ["## License", f"The base model's is {origin.license}."]
    _write(directory, matter, "\n\n".join(parts) + "\n")


def _write(directory: Path, front_matter: Mapping[str, Any], body: str) -> None:
    matter = yaml.safe_dump(dict(front_matter), sort_keys=False, allow_unicode=True)
    (directory / "README.md").write_text(f"---\n{matter}---\n\n{body}", encoding="utf-8")


def _front_matter(
    base: str | None,
    library: str | None,
    license_: str | None,
    *,
    relation: str,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the head of a card."""
    matter = {
        "base_model": base,
        "base_model_relation": relation if base else None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": license_,
        "datasets": list(datasets) or None,
        "tags": [*([f"base_model:{relation}:{base}"] if base else []), *tags, "sftx"],
    }
    return {key: value for key, value in matter.items() if value is not None}


def _license(base: str) -> str | None:
    """Return the license that the card of the base model names, where it lies on this machine."""
    if names.hub_id(base) == names.HUB_ID:
        return names.LICENSE
    directory = names.local_directory(base)
    try:
        text = (directory / "README.md").read_text(encoding="utf-8") if directory is not None else ""
        matter = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    value = matter.get("license") if isinstance(matter, dict) else None
    return value if isinstance(value, str) else None


def _render(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return ""
    try:
        asked = [{"role": "user", "content": _QUESTION}]
        return str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    except Exception:  # whatever a template raises for a question without a system message
        return ""


def _source(split: str, source: Mapping[str, Any]) -> str:
    """Return the row of a table: a local file by its last name alone, since the card may be published."""
    path = str(source.get("path"))
    name = path if _is_hub_id(path) or ":" in path else Path(path).name
    parts = [str(part) for part in (source.get("subset"), source.get("split")) if part]
    held_out = " (held out)" if split == "eval_data" else ""
    digest = str(source.get("fingerprint") or "")
    return f"| {' '.join([name, *parts])}{held_out} | {digest} |"


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and ":" not in path and not Path(path).exists()


def _table(*head: str, rows: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *rows])
