"""Writes the README.md of an adapter: the model card that PEFT writes, and how to load the adapter so that it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from sftx.model import names

PEFT_CONFIG: Final = "adapter_config.json"
_CARD: Final = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- {tag}
- {kind}
- transformers
---

# An adapter of {name}

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


def write(directory: Path, stop: str | None) -> None:
    """Write README.md beside adapter_config.json. `stop` is the token that ends an answer."""
    config = json.loads((directory / PEFT_CONFIG).read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path"))
    card = _CARD.format(
        base=json.dumps(base, ensure_ascii=False),  # JSON text is YAML, whatever is in a path
        tag=json.dumps(f"base_model:adapter:{base}", ensure_ascii=False),
        kind=str(config.get("peft_type", "peft")).lower(),
        name=names.describe(base),
        stop=f"Answers end with `{stop}`. " if stop else "",
    )
    (directory / "README.md").write_text(card, encoding="utf-8")
