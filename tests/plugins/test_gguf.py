"""Tests of the exporter `gguf`: readers that are not ours find the run's logits, tokens and stops in the file.

The oracle of logits is PEFT's model of base and adapter. llama.cpp reads the files where llama-cpp-python is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import assets
from architectures import write_model
from gguf_families import FAMILIES, LLAMA_CPP_ONLY, SHAPE, WIDE
from sftx import ConfigError, load_run
from sftx.checkpoint.exporting import LoadedSource
from sftx.cli import main
from sftx.data.encoder import Encoder
from sftx.model.tiny import make_tokenizer
from sftx.testing.runs import run_tiny
from sftx_plugins.exporters.gguf import Gguf
from sftx_plugins.exporters.gguf_format import architectures, file, vocabulary
from sftx_plugins.exporters.gguf_format.readers import LlamaCppReader, TransformersGgufReader
from sftx_plugins.templates.phi import Phi
from templating import chat, template_of, tokenizer_with

NEEDS_LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed; CONTRIBUTING says how"
)
FAST = ("llama-3", "qwen3-moe", "gemma-3", "phi-3", "gpt2")
GELU = ("gemma", "gemma-2", "gemma-3", "starcoder2", "gpt2")
"""llama.cpp looks the values of GELU up in a table of fp16."""
TEXTS = [
    "", " ", "   ", "\n", "\n\n\n", "\t", "Hello world", " Hello  world\n Hello", "3 33 333 3333 33333.5", "½²٣४",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, We'Ve a'lL", "def f(x):\n    return x\r\n\r\n",
    "CamelCase HTTPServer élève ÀÉ", "我想在apple工作1314151天～", "нещо на Български", "កាន់តែពិសេសអាច",
    "日本語、カタカナ。", "🚀 (normal) 😶‍🌫️ (multiple emojis)", "a\u00a0b\u200bc", "------======= !!!!!!??????",
    "<b>bold</b> {'a': 1}",
]  # fmt: skip

Exported = Callable[[str, str], tuple[Path, Tensor]]


def slow_but(names: tuple[str, ...], all_names: Any) -> list[Any]:
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in all_names]


def tokens() -> Tensor:
    return torch.arange(40)[None] * 7 % 500


def redraw(parameters: Any) -> None:
    """Give every parameter a value of its own: norms and biases too, and B of an adapter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + noise / 5 if parameter.dim() == 1 else noise * 0.08)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function that exports a base of this family with an adapter, and gives the file and PEFT's logits."""
    sources: dict[str, tuple[LoadedSource, Tensor]] = {}

    def source(name: str) -> tuple[LoadedSource, Tensor]:
        if name not in sources:
            config = {**FAMILIES, **LLAMA_CPP_ONLY}[name]()
            directory = write_model(config, tmp_path_factory.mktemp("base"))
            base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
            redraw(base.parameters())
            base.save_pretrained(directory)
            adapter = tmp_path_factory.mktemp("adapter")
            mixture = {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["mlp.experts.down_proj"]}
            targets = mixture if name in ("mixtral", "qwen2-moe", "qwen3-moe") else {"target_modules": "all-linear"}
            model = peft.get_peft_model(
                base, peft.LoraConfig(r=4, lora_alpha=16, fan_in_fan_out=name == "gpt2", **targets)
            )
            redraw(parameter for key, parameter in model.named_parameters() if "lora_" in key)
            model.save_pretrained(adapter)
            AutoTokenizer.from_pretrained(directory).save_pretrained(adapter)
            with torch.no_grad():
                expected: Tensor = model.eval()(input_ids=tokens()).logits[0]
            sources[name] = LoadedSource(load_run(adapter, device="cpu", dtype=torch.float32)), expected
        return sources[name]

    def export(name: str, dtype: Any) -> tuple[Path, Tensor]:
        run, expected = source(name)
        directory = tmp_path_factory.mktemp("export")
        exporter = Gguf(dtype)
        exporter.check(run.lm.model.config)
        exporter.export(run, directory)
        (written,) = directory.iterdir()
        return written, expected

    return export


def error(reader: Any, expected: Tensor) -> float:
    """Return the largest difference of logits, relative to the largest logit."""
    got = reader.logits(tokens()[0].tolist())[:, : expected.shape[1]]
    assert got.dtype == torch.float32
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", slow_but(FAST, FAMILIES))
def test_transformers_reads_the_run_of_each_family(name: str, exported: Exported) -> None:
    for dtype, most in (("f32", 1e-5), ("f16", 1e-2)):
        written, expected = exported(name, dtype)
        assert error(TransformersGgufReader(written), expected) <= most, dtype


@pytest.mark.slow
@NEEDS_LLAMA_CPP
@pytest.mark.parametrize("name", [*FAMILIES, *LLAMA_CPP_ONLY])
def test_llama_cpp_reads_the_run_of_each_family(name: str, exported: Exported) -> None:
    """It adds in another order in fp32; with fp16 weights it rounds activations to fp16 as well."""
    for dtype, most in (("f32", 2e-3 if name in GELU else 1e-5), ("f16", 1e-2)):
        written, expected = exported(name, dtype)
        assert error(LlamaCppReader(written), expected) <= most, dtype


def metadata(written: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(written)
    return {name: field.contents() for name, field in reader.fields.items()}


def source_of(model: Any, tokenizer: Any, stop_ids: tuple[int, ...] = (2,)) -> Any:
    """Return what an exporter asks of a run."""
    return SimpleNamespace(
        merge=lambda: model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        generation_config=model.generation_config,
        base_model="makers/tiny",
    )


def small(**options: Any) -> Any:
    config = transformers.LlamaConfig(**{**SHAPE, "vocab_size": 520, "num_hidden_layers": 1, **options})
    return transformers.LlamaForCausalLM(config)


def test_the_file_says_how_prompts_begin_and_answers_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()  # bos and eos are 0, <|im_end|> is 2
    model = small()
    model.generation_config.eos_token_id = [0, 2, 5]
    file.write(source_of(model, tokenizer, (2, 1)), tmp_path / "a.gguf", "f16")
    found = metadata(tmp_path / "a.gguf")
    ends = [found[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [0, 2, 1]  # what the tokenizer calls eos, then the run's; no room is left for 5
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.add_bos_token"] is False  # ChatML writes none
    assert len(found["tokenizer.ggml.tokens"]) == 520
    assert found["tokenizer.ggml.tokens"][512:514] == ["[PAD512]", "[PAD513]"]
    assert found["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert found["tokenizer.ggml.token_type"][519] == gguf.TokenType.UNUSED
    assert found["general.name"] == "tiny"
    with pytest.raises(ConfigError, match=r"three tokens that end an answer, and the run has more of them: !, "):
        file.write(source_of(model, tokenizer, (2, 1, 3, 4)), tmp_path / "b.gguf", "f16")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    file.write(source_of(model, tokenizer), tmp_path / "c.gguf", "f16")
    assert metadata(tmp_path / "c.gguf")["tokenizer.ggml.add_bos_token"] is True


def test_weights_are_rounded_as_gguf_rounds_them(tmp_path: Path) -> None:
    model = small(intermediate_size=90)
    file.write(source_of(model, make_tokenizer()), tmp_path / "a.gguf", "q8_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_v.weight"] == kinds["output.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 90 columns are not whole blocks of 32
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    weight = model.model.layers[0].self_attn.v_proj.weight.detach().numpy()
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"].data, expected)


def test_f16_is_refused_where_it_overflows(tmp_path: Path) -> None:
    model = small()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = -7e4
    with pytest.raises(
        ConfigError, match=r"blk\.0\.ffn_up\.weight has a value of 7e\+04, beyond .* choose bf16 or f32"
    ):
        file.write(source_of(model, make_tokenizer()), tmp_path / "a.gguf", "f16")
    file.write(source_of(model, make_tokenizer()), tmp_path / "b.gguf", "bf16")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.OPTConfig(), r"architecture opt cannot be .* LlamaForCausalLM, .*, Qwen3ForCausalLM"),
        (transformers.LlamaConfig(hidden_act="relu"), "its activation is relu, and llama.cpp computes silu for llama"),
        (transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
         "rotary positions are scaled by 'dynamic'"),
        (transformers.GemmaConfig(tie_word_embeddings=False), "ties the head of gemma to the embeddings"),
        (transformers.Gemma2Config(query_pre_attn_scalar=100), "query_pre_attn_scalar=256, and .* has 100"),
        (transformers.Qwen3MoeConfig(norm_topk_prob=False), "norm_topk_prob=True, and its configuration has False"),
        (transformers.StableLmConfig(qk_layernorm=True), "qk_layernorm=False, and its configuration has True"),
    ],
)  # fmt: skip
def test_models_that_llama_cpp_computes_otherwise_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gguf().check(config)


def test_q4_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "llama_cpp" or None)
    with pytest.raises(ConfigError, match=r"pip install 'sftx\[llama-cpp\]'.*, or choose q8_0"):
        Gguf("q4_k_m").check(transformers.LlamaConfig())


def test_a_window_that_llama_cpp_leaves_out_bounds_the_context(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**SHAPE, vocab_size=520, sliding_window=100)
    model = transformers.MistralForCausalLM(config)
    file.write(source_of(model, make_tokenizer()), tmp_path / "a.gguf", "f16")
    assert metadata(tmp_path / "a.gguf")["llama.context_length"] == 100


def test_the_language_model_of_a_multimodal_model_is_written(tmp_path: Path) -> None:
    text = {**WIDE, "vocab_size": 512, "query_pre_attn_scalar": 32}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    redraw(model.parameters())
    Gguf().check(config)
    file.write(source_of(model, make_tokenizer()), tmp_path / "a.gguf", "f32")
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits[0]
    assert error(TransformersGgufReader(tmp_path / "a.gguf"), expected) <= 1e-5


# --- tokenizers ---------------------------------------------------------------------------------------


def write_vocabulary(tokenizer: Any, path: Path, base: str = "a") -> None:
    """Write a file without weights, which both readers take for its tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(vocabulary.model_name(base, tokenizer))
    architectures.write_metadata(writer, architectures.of(transformers.LlamaConfig())[0], transformers.LlamaConfig())
    vocabulary.write(writer, tokenizer, num_tokens=max(tokenizer.get_vocab().values()) + 1, stop_ids=(), more=())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def assert_same_tokens(tokenizer: Any, reader: Any, texts: Sequence[str] = TEXTS) -> None:
    for text in texts:
        ids = reader.encode(text)
        plain = ids[1:] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else ids
        assert plain == tokenizer(text, add_special_tokens=False).input_ids, text


def sentencepiece() -> Any:
    """Return a small tokenizer of SentencePiece's kind, with bytes for what it has no token for."""
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator([text for text in TEXTS if text.isascii()] * 3, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # the bytes are plain tokens
    backend = Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def a_tokenizer(change: Callable[[Any], None]) -> Any:
    tokenizer = make_tokenizer()
    change(tokenizer.backend_tokenizer)
    return tokenizer


def split(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def prefix(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lower(backend: Any) -> None:
    backend.normalizer = normalizers.Lowercase()


def unigram(backend: Any) -> None:
    backend.model = models.Unigram([("a", 0.0)])


def whole_words(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (split, "splits text in none of the ways that are known here: dbrx, deepseek-v3, gpt-2, "),
        (prefix, "splits text in none of the ways"),
        (lower, "normalises text with Lowercase, which llama.cpp does not"),
        (unigram, "its model is Unigram, and only BPE is known"),
        (whole_words, "its normalizer and pre-tokenizer are none of those that SentencePiece's models have"),
    ],
)
def test_a_tokenizer_of_which_llama_cpp_would_make_other_tokens_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_vocabulary(a_tokenizer(change), tmp_path / "a.gguf")


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["[PAD515]"])
    with pytest.raises(ConfigError, match=r"two of its tokens are '\[PAD515\]'"):
        file.write(source_of(small(), tokenizer), tmp_path / "a.gguf", "f16")


@pytest.mark.parametrize("tokenizer", [make_tokenizer, sentencepiece])
def test_transformers_makes_the_same_tokens_of_the_file(tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    write_vocabulary(tokenizer(), tmp_path / "a.gguf")
    assert_same_tokens(tokenizer(), TransformersGgufReader(tmp_path / "a.gguf"))


@pytest.mark.slow
@NEEDS_LLAMA_CPP
@pytest.mark.parametrize("tokenizer", [make_tokenizer, sentencepiece])
def test_llama_cpp_makes_the_same_tokens_of_the_file(tokenizer: Callable[[], Any], tmp_path: Path) -> None:
    write_vocabulary(tokenizer(), tmp_path / "a.gguf")
    assert_same_tokens(tokenizer(), LlamaCppReader(tmp_path / "a.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama3_1", "mistral_nemo", "gemma3", "llama2", "deepseek_v3"])
def test_real_tokenizers_keep_their_tokens(name: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    """DeepSeek's control tokens hold letters that transformers' reader takes for bytes; llama.cpp reads them.

    Where a text of llama2 begins with a space, llama.cpp puts another one before it, and its own tokenizer does not.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir if name == "smollm2" else assets.path("tokenizers", name))
    write_vocabulary(tokenizer, tmp_path / "a.gguf")
    texts = [text for text in TEXTS if name != "llama2" or not text.startswith(" ")]
    if name != "deepseek_v3":
        assert_same_tokens(tokenizer, TransformersGgufReader(tmp_path / "a.gguf"), texts)
    if importlib.util.find_spec("llama_cpp") is not None:
        assert_same_tokens(tokenizer, LlamaCppReader(tmp_path / "a.gguf"), texts)


CONVERSATION = [("user", "What is 2 + 3?"), ("assistant", "Five: 5."), ("user", "And 333 in Русский?\nHm  two spaces")]


def assert_same_prompts(name: str, tokenizer: Any, reader: Callable[[Path], Any], path: Path, base: str = "a") -> None:
    """Compare the prompts of a file with those that a run with this template trains on."""
    template = template_of(name, tokenizer)
    tokenizer.chat_template = template.chat_template
    write_vocabulary(tokenizer, path, base)
    encoder, written = Encoder(tokenizer, template), reader(path)
    for turns in (CONVERSATION[:1], CONVERSATION, [("system", "Be brief."), *CONVERSATION]):
        messages = [{"role": role, "content": content} for role, content in turns]
        assert written.prompt(messages, ()) == encoder.prompt(chat(*turns))


@pytest.mark.slow
@NEEDS_LLAMA_CPP
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("qwen3", "qwen3"), ("llama3", "llama3_1"), ("gemma3", "gemma3"), ("deepseek3", "deepseek_v3"),
        ("mistral", "mistral_nemo"), ("mistral", "llama2"), ("llama2", "llama2"), ("vicuna", "llama2"),
        ("alpaca-template", "llama2"), ("zephyr", "llama2"), ("ma-rlhf", "llama2"),
    ],
)  # fmt: skip
def test_llama_cpp_makes_the_prompts_of_the_run(name: str, tokenizer: str, tmp_path: Path) -> None:
    assert_same_prompts(name, tokenizer_with(tokenizer, ()), LlamaCppReader, tmp_path / "a.gguf")


@pytest.mark.parametrize("base", ["my-model", pytest.param("Phi-3-mini", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rstrip", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "reader", [TransformersGgufReader, pytest.param(LlamaCppReader, marks=[pytest.mark.slow, NEEDS_LLAMA_CPP])]
)
def test_control_tokens_swallow_white_space_as_the_tokenizer_says(
    base: str, *, rstrip: bool, reader: Callable[[Path], Any], tmp_path: Path
) -> None:
    """llama.cpp goes by the model's name."""
    tokenizer = tokenizer_with("llama2", sorted(Phi.controls), rstrip=rstrip)
    assert_same_prompts("phi", tokenizer, reader, tmp_path / "a.gguf", base)


# --- the command --------------------------------------------------------------------------------------


@pytest.mark.slow
@NEEDS_LLAMA_CPP
def test_four_bits_are_quantised_by_llama_cpp(exported: Exported) -> None:
    written, expected = exported("qwen2", "q4_k_m")
    assert [path.name for path in written.parent.iterdir()] == ["model-q4_k_m.gguf"]
    assert 1e-3 < error(LlamaCppReader(written), expected) < 0.5


def test_the_command_exports_a_run(tmp_path: Path) -> None:
    run = run_tiny(("lora",), tmp_path).output_dir
    done = CliRunner().invoke(main, ["export", str(run), "--to", "gguf", "--set", "gguf.dtype=f32"])
    assert done.exit_code == 0, done.output
    written = run / "export" / "gguf" / "model-f32.gguf"
    assert f"llama-cli --model {written} --conversation --jinja" in done.stdout
    assert written.is_file()
