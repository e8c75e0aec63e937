"""Tests of the exporter `ollama`: Go renders its template as Jinja renders the run's, where Go is installed."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

import assets
from gguf_families import SHAPE
from sftx import ConfigError
from sftx.model.tiny import make_tokenizer
from sftx_plugins.exporters.gguf import Gguf
from sftx_plugins.exporters.go_template import markup_of
from sftx_plugins.exporters.ollama import Ollama
from templating import template_of, tokenizer_of

TEMPLATES = [
    ("chatml", "qwen3"), ("qwen3", "qwen3"), ("qwen2.5", "qwen2_5"), ("minimind", "qwen3"), ("phi", "llama2"),
    ("llama3", "llama3_1"), ("gemma3", "gemma3"), ("gemma", "gemma3"), ("deepseek3", "deepseek_v3"),
    ("mistral", "llama2"), ("mistral", "mistral_nemo"), ("llama2", "llama2"), ("vicuna", "llama2"),
    ("alpaca-template", "llama2"), ("zephyr", "llama2"), ("ma-rlhf", "llama2"),
]  # fmt: skip
"""Built-in templates, each with a tokenizer for it."""
ROUNDS = [
    {"role": "user", "content": 'Say {{ .System }} and "{{`x`}}".'},
    {"role": "assistant", "content": "No:\n```go\nfunc f() {}\n```"},
    {"role": "user", "content": "<|im_end|> Мир?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Why?"},
]
NEEDS_GO = pytest.mark.skipif(shutil.which("go") is None, reason="go is not installed; CONTRIBUTING names it")
CONVERSATIONS = [ROUNDS[:1], ROUNDS[:3], ROUNDS]


def source_of(tokenizer: Any, stop_ids: tuple[int, ...] = (2,)) -> Any:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, vocab_size=520))
    return SimpleNamespace(
        merge=lambda: model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        generation_config=model.generation_config,
        base_model="tiny",
    )


def with_template(name: str, tokenizer: str, **options: Any) -> Any:
    loaded = copy.copy(tokenizer_of(tokenizer))
    loaded.chat_template = template_of(name, tokenizer, **options).chat_template
    return loaded


def go(requests: list[dict[str, Any]], directory: Path) -> list[str]:
    program = Path(__file__).parents[1] / "helpers" / "render_go_templates.go"
    environment = {**os.environ, "GO111MODULE": "off", "GOCACHE": str(directory), "GOTELEMETRY": "off"}
    done = subprocess.run(
        ["go", "run", str(program)], input=json.dumps(requests), env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    texts: list[str] = json.loads(done.stdout)
    return texts


def same_as_jinja(tokenizers: Iterable[tuple[str, Any]], directory: Path) -> int:
    """Compare Go's texts with Jinja's for the templates that can be expressed, and return how many these are."""
    requests, expected, found = [], [], 0
    for name, tokenizer in tokenizers:
        try:
            markup = markup_of(tokenizer)
        except ConfigError:
            continue
        found += 1
        bos = tokenizer.bos_token or ""
        for conversation in CONVERSATIONS:
            for system in ("", "Be brief.") if markup.before_system is not None else ("",):
                first = [{"role": "system", "content": system}] if system else []
                messages = [*first, *conversation]
                # Ollama gives a template the system text twice: by itself, and among the messages.
                turns = [{"Role": message["role"], "Content": message["content"]} for message in messages]
                requests.append({"Template": markup.to_go(bos=bos), "System": system, "Messages": turns})
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                expected.append((name, text.removeprefix(bos)))
    assert list(zip([name for name, _ in expected], go(requests, directory), strict=True)) == expected
    return found


@pytest.mark.slow
@NEEDS_GO
def test_go_renders_every_built_in_template_as_jinja_does(tmp_path: Path) -> None:
    tokenizers = [(name, with_template(name, kind)) for name, kind in TEMPLATES]
    assert same_as_jinja(tokenizers, tmp_path) == len(TEMPLATES)


@pytest.mark.slow
@NEEDS_GO
def test_go_renders_the_own_templates_of_many_models_as_jinja_does(tmp_path: Path) -> None:
    tokenizers = []
    for path in sorted(assets.path("chat_templates").glob("*.jinja")):
        tokenizer = copy.copy(tokenizer_of("qwen3"))
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        tokenizers.append((path.stem, tokenizer))
    assert same_as_jinja(tokenizers, tmp_path) > 0.7 * len(tokenizers)


def test_the_directory_is_what_ollama_create_takes(tmp_path: Path) -> None:
    exporter = Ollama("q8_0")
    exporter.export(source_of(make_tokenizer(), (2, 40)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "model-q8_0.gguf"]
    assert (tmp_path / "Modelfile").read_text() == (
        "FROM ./model-q8_0.gguf\n"
        'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n'
        "{{ else }}<|im_start|>user\n{{ end }}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}{{ .Content }}{{ if $last }}<|im_end|>\n<|im_start|>assistant\n{{ end }}'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}'
        '{{ if not $last }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\n'  # 40 is a letter, which the file itself stops at
    )
    assert exporter.usage(tmp_path) == f"ollama create my-model --file {tmp_path}/Modelfile && ollama run my-model"


def test_a_default_system_text_and_a_missing_bos_are_in_the_modelfile(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    chatml = tokenizer.chat_template
    start = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    tokenizer.chat_template = "{{ bos_token }}" + start + chatml
    Ollama().export(source_of(tokenizer), tmp_path)
    text = (tmp_path / "Modelfile").read_text()
    assert 'SYSTEM """Be kind."""\n' in text
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system\n' in text  # bos is the file's to write


def test_a_run_on_plain_text_gets_its_prompt_as_it_is(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    Ollama().export(source_of(tokenizer), tmp_path)
    assert 'TEMPLATE """{{ .Prompt }}"""\n' in (tmp_path / "Modelfile").read_text()


_LOOP = "{% for message in messages %}[{{ message.role }}{{ EXTRA }}]{{ message.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            _LOOP.replace("EXTRA", "loop.index"),
            "it writes later rounds of a conversation in another way than the first",
        ),
        ("{{ messages[-1].content }}", "it cannot write a plain conversation of three questions"),
        ("{% for message in messages | reverse %}{{ message.content }}{% endfor %}", "in another order"),
        ("{{ strftime_now('%d') }}" + _LOOP.replace("EXTRA", "''"), "it writes today's date"),
        (_LOOP.replace("EXTRA", '\'"""\''), 'it writes """'),
        (
            "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
            "it writes the system text elsewhere than before the first question",
        ),
    ],
)
def test_what_go_cannot_express_is_refused(template: str, reason: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=reason):
        Ollama().export(source_of(tokenizer), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_template_that_refuses_a_system_text_says_so_in_the_modelfile(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    Ollama().export(source_of(tokenizer), tmp_path)
    text = (tmp_path / "Modelfile").read_text()
    assert "# The template has no place for a system text, and leaves it out.\n" in text
    assert "{{ .System }}" not in text


def test_the_command_that_is_shown_quotes_its_file(tmp_path: Path) -> None:
    directory = tmp_path / "my exports"
    directory.mkdir()
    shown = Ollama().usage(directory)
    assert shlex.split(shown)[:5] == ["ollama", "create", "my-model", "--file", str(directory / "Modelfile")]
    (directory / "model-f16.gguf").touch()
    assert shlex.split(Gguf().usage(directory))[:3] == ["llama-cli", "--model", str(directory / "model-f16.gguf")]
