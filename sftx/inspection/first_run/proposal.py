"""Chooses the plugins and options of a first run, each with its reason, such that the planner says that it fits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly
from sftx.assembly.stages.data_stages import TemplateStage
from sftx.config import loading
from sftx.config.flatten import flatten
from sftx.config.options import DataConfig
from sftx.config.run_file import Origins
from sftx.data.encoder import Encoder, templates_that_fit
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.errors import ConfigError, DataError, SftxError
from sftx.inspection.first_run.sampled_rows import Objective, SampledRows
from sftx.inspection.memory_plan.planner import Planner
from sftx.inspection.memory_plan.run_size import RunSize
from sftx.inspection.memory_plan.target_device import TargetDevice
from sftx.model import names
from sftx.model.load import load_config, load_tokenizer
from sftx.phases import phase
from sftx.types import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROUND_TO: Final = 64
_SHORTEST: Final = 256
_PER_ROW: Final = 4
"""The examples that share a packed row: a step has several rows, which several GPUs can divide."""
_EXAMPLES_PER_STEP: Final = 16
_FEW_ROWS: Final = 500
_SHORT_ANSWER: Final = 16
_MOST_NEW_TOKENS: Final = 256
_MOST_ANSWERED: Final = 50
_MARGIN: Final = 0.95
"""The share of a GPU's memory that is planned with."""
_MOST_FILLED: Final = 0.02
_PROBES: Final = (
    (Message("user", "A"), Message("assistant", "B", trainable=False), Message("user", "C")),
    (Message("system", "S"), Message("user", "A"), Message("assistant", "B", trainable=False), Message("user", "C")),
)


@dataclass
class Proposal:
    """A run file with a reason for each of its values."""

    values: dict[str, Any]
    reasons: dict[str, str]
    fits: str = ""
    """What the planner says."""


@dataclass(frozen=True)
class Lengths:
    """The tokens of the sampled rows."""

    examples: tuple[int, ...]
    answers: tuple[int, ...]
    """Those that are trained."""
    prompts: tuple[int, ...]

    def covering(self, share: float) -> int:
        """Return the length that this share of the examples does not exceed."""
        return int(np.quantile(self.examples, share, method="inverted_cdf"))


@dataclass
class Chooser:
    """Chooses the options of a run, one group after the other."""

    model: str
    rows: SampledRows
    device: TargetDevice
    objective: Objective
    eval_data: tuple[str, ...] = ()
    output_dir: str | None = None
    _values: dict[str, Any] = field(default_factory=dict)
    _plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)

    def choose(self) -> Proposal:
        """Return the run file. Raises SftxError, also when nothing was found that fits the device's memory."""
        names.check(self.model)
        with phase("loading", "the tokenizer"):
            resolved = names.resolve(self.model)
            tokenizer = load_tokenizer(resolved)
            config = load_config(resolved)
        with phase("encoding", "a sample of the rows"):
            lengths = self._choose_template(tokenizer)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._set("model", self.model, self._of_model())
        self._choose_data(lengths, longest)
        self._choose_loss(lengths)
        self._choose_metric(lengths)
        self._choose_training()
        with phase("planning", "the run"):
            return self._fitted(lengths)

    def _of_model(self) -> str:
        if self.model.startswith("sftx:"):
            return f"The model, {names.describe(self.model)}."
        return "The model, as you said. A directory that save_pretrained wrote, or an id of the hub."

    # --- one group of options each ------------------------------------------------------------------

    def _set(self, name: str, value: Any, reason: str = "") -> None:
        """Set an option by its dotted name."""
        *sections, last = name.split(".")
        values = self._values
        for section in sections:
            values = values.setdefault(section, {})
        values[last] = value
        if reason:
            self._reasons[name] = reason

    def _add(self, plugin: str, reason: str, **options: Any) -> None:
        self._plugins[plugin] = options
        self._reasons[f"plugins.{plugin}"] = reason

    def _choose_template(self, tokenizer: PreTrainedTokenizerBase) -> Lengths:
        """Choose the template that asks as the model was trained, and can write the rows. Return their lengths."""
        if self.rows.kind in ("text", "tokens"):
            return self._measure(tokenizer, None)
        problem: SftxError | None = None
        for name, reason, add_tokens in self._templates(tokenizer):
            if add_tokens:
                self._add(name, reason)
                self._set("add_tokens", True, "The tokenizer lacks the template's control tokens: they are added.")
                tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            try:
                lengths = self._measure(tokenizer, _template(name, tokenizer))
            except SftxError as error:  # tools, say, that this format cannot write
                problem = problem or error
                continue
            self._add(name, reason)
            return lengths
        assert problem is not None
        raise problem

    def _templates(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, bool]]:
        """Yield templates for this model, the best first: name, reason, whether control tokens are added."""
        fitting = templates_that_fit(tokenizer)
        has_own = bool(tokenizer.chat_template)
        same = [name for name in fitting if has_own and _is_own(name, tokenizer)]
        for name in same:
            yield name, "The chat template: it writes what the model's own template writes.", False
        if has_own:
            yield "tokenizer", "The chat template: the model's own, as its tokenizer has it.", False
        for name in fitting:
            if name not in same:
                yield name, "The chat template: the tokenizer has its control tokens.", False
        if not fitting and not has_own:
            yield "chatml", "The chat template: the model has none of its own.", True

    def _measure(self, tokenizer: PreTrainedTokenizerBase, template: TemplateStage | None) -> Lengths:
        """Encode the sampled rows. Raises SftxError when most cannot be encoded."""
        encode = RowEncoder({}, Encoder(tokenizer, template), DataConfig(max_length=2**24))
        examples: list[int] = []
        answers: list[int] = []
        problem: DataError | None = None
        num_wrong = 0
        for where, parsed in self.rows.parsed:
            try:
                row = encode.encode(parsed, EncodedRow(where))
            except DataError as error:
                problem, num_wrong = error, num_wrong + 1
                continue
            examples += [len(example.token_ids) for example in row.examples]
            answers += [int(example.loss_mask.sum()) for example in row.examples]
        if problem is not None and num_wrong > 0.05 * len(self.rows.parsed):
            raise problem
        if not examples:
            raise DataError(f"{' '.join(self.rows.paths)}: no row of it trains anything")
        prompts = tuple(length - answer for length, answer in zip(examples, answers, strict=True))
        return Lengths(tuple(examples), tuple(answers), prompts)

    def _choose_data(self, lengths: Lengths, longest: int | None) -> None:
        rows = self.rows
        train: Any = list(rows.paths) if len(rows.paths) > 1 else rows.paths[0]
        median, most = lengths.covering(0.5), max(lengths.examples)
        what = "answers" if rows.kind == "pairs" else "rows"
        self._set(
            "data.train", train,
            f"{rows.count} in the format {' and '.join(rows.formats)}. Sampled {what} have {median:,} tokens at the "
            f"median, and {most:,} at most.",
        )  # fmt: skip
        if self.eval_data:
            held: Any = list(self.eval_data) if len(self.eval_data) > 1 else self.eval_data[0]
            self._set("data.eval", held, "Held-out rows, which are evaluated and never trained on.")
        elif rows.num_rows >= 20:
            limit = 200 if self.device.is_gpu else 50
            is_share = rows.num_rows <= 10 * limit
            value, size = (0.1, "A tenth of the rows") if is_share else (limit, f"{limit} rows")
            self._set(
                "data.eval_fraction", value,
                f"{size} are held out: evaluated before and after training, and never trained on.",
            )  # fmt: skip
        covering = _rounded(lengths.covering(0.99))
        length = min(max(covering, _ROUND_TO * 2), longest or covering)
        bound = ", which is the most that this model takes" if longest is not None and length == longest else ""
        self._set_length(length, f"The most tokens of an example{bound}.", lengths)
        if rows.num_invalid:
            self._set("data.invalid_rows", "drop", f"Some rows cannot be read and are left out: {rows.problem}")

    def _set_length(self, length: int, reason: str, lengths: Lengths) -> None:
        """Set max_length, and how longer rows are cut: where the prompt alone fills it, no answer would be left."""
        num = len(lengths.examples)
        over = sum(one > length for one in lengths.examples) / num
        is_filled = sum(prompt >= length for prompt in lengths.prompts) / num
        kept = f"{over:.1%} of the sampled rows are longer." if over else "No sampled row is longer."
        self._set("data.max_length", length, f"{reason} {kept}")
        if is_filled > _MOST_FILLED:
            self._set(
                "data.long_rows", "cut_proportional",
                f"Of longer rows prompt and answer are cut in proportion: {is_filled:.1%} have a prompt that fills "
                "max_length alone. A model that takes longer rows learns more from them.",
            )  # fmt: skip
        elif over:
            self._set("data.long_rows", "cut_end", "Longer rows lose their end.")

    def _choose_loss(self, lengths: Lengths) -> None:
        if self.objective == "dpo":
            self._add("dpo", "The loss: the better answer of a pair becomes likelier than the worse one.")
        elif self.objective == "kto":
            self._add("kto", "The loss: good answers become likelier, bad ones less likely.")
        elif self.objective == "grpo":
            new = _rounded(int(np.quantile(lengths.answers, 0.95)) * 2)
            self._add(
                "grpo",
                "Reinforcement: the model answers each question several times, and learns from what sets the good "
                "answers apart. Answers get twice the tokens of the ones in the data.",
                max_completion_length=new,
            )
            self._add(
                "reward-exact-match",
                "The reward: whether an answer equals that of the row. `sftx plugins list` has others.",
            )
            self._values["data"]["max_length"] += new
        if self.rows.kind == "text":
            self._add(
                "packed", "Texts are cut into rows of max_length tokens, so that nothing is padded.", strategy="wrapped"
            )
            self._set("data.max_length", 1024 if self.device.is_gpu else 512, "The tokens of a row of text.")
        elif self.device.is_gpu and self.objective != "kto":
            self._add("packed", "Several examples share a row and do not see one another, so that nothing is padded.")
            if self.objective != "grpo":
                self._pack(lengths)

    def _pack(self, lengths: Lengths) -> None:
        """Make packed rows long enough for several examples."""
        group = 2 if self.rows.kind == "pairs" else 1
        several = _rounded(int(_PER_ROW * group * sum(lengths.examples) / len(lengths.examples)))
        if several > self._values["data"]["max_length"]:
            self._plugins["packed"]["length"] = several
            self._reasons["plugins.packed.length"] = f"The tokens of a row: about {_PER_ROW} examples."

    def _choose_metric(self, lengths: Lengths) -> None:
        if self.rows.kind not in ("chat", "pairs") or not self._has_eval:
            return
        references = [
            parsed[0].messages[-1].content
            for _, parsed in self.rows.parsed
            if parsed and isinstance(parsed[0], Conversation) and parsed[0].messages[-1].role == "assistant"
        ]
        is_json = bool(references) and sum(map(_is_json, references)) >= 0.95 * len(references)
        is_short = np.quantile(lengths.answers, 0.9) <= _SHORT_ANSWER
        if self.objective == "grpo" or is_short:
            self._add("exact-match", "The score: whether an answer to a held-out row equals the expected one.")
        elif is_json:
            self._add("json-valid", "The score: whether an answer to a held-out row is valid JSON, as in the data.")
        new = min(_rounded(int(np.quantile(lengths.answers, 0.95))), _MOST_NEW_TOKENS)
        self._set(
            "generation.max_new_tokens", new,
            "The most tokens of an answer to a held-out row: 95 % of those in the data have at most as many."
            if new < _MOST_NEW_TOKENS else "The most tokens of an answer to a held-out row.",
        )  # fmt: skip
        if self._plugins.keys() & {"exact-match", "json-valid"}:
            self._set("generation.max_rows", _MOST_ANSWERED, "The most held-out rows that are answered.")

    @property
    def _has_eval(self) -> bool:
        return bool(self._values["data"].keys() & {"eval", "eval_fraction"})

    def _choose_training(self) -> None:
        num, is_sft = self.rows.num_rows, self.objective == "sft"
        rate = {"sft": 2e-4, "dpo": 2e-5, "kto": 2e-5, "grpo": 2e-5}[self.objective]
        self._set(
            "train.learning_rate", rate,
            "The usual one for LoRA." if is_sft else "A tenth of that for imitating answers, as these losses need.",
        )  # fmt: skip
        self._set("train.warmup_steps", 0.05, "The learning rate rises over the first twentieth of the steps.")
        if self.objective == "grpo":
            self._set("train.max_steps", 100, "Optimizer steps; look at the reward's curve, and go on with --resume.")
        else:
            epochs = 1 if not is_sft or self.rows.kind == "text" or num >= 20_000 else 2 if num >= 2_000 else 3
            few = "Few rows are seen several times" if epochs > 1 else "Each row is seen once"
            self._set("train.num_train_epochs", epochs, f"{few}; a held-out loss that rises again says: too often.")

    # --- what fits ----------------------------------------------------------------------------------

    def _fitted(self, lengths: Lengths) -> Proposal:
        """Choose the adapter, the rows and checkpointing with which the run fits, the fastest first."""
        examples = 8 if self.rows.num_rows < _FEW_ROWS else _EXAMPLES_PER_STEP
        rows_per_step = examples
        what = f"{examples} examples make a stable step"
        if "packed" in self._plugins and self.objective != "grpo":
            row_length = self._plugins["packed"].get("length") or self._values["data"]["max_length"]
            group = 2 if self.rows.kind == "pairs" else 1
            held = max(1.0, row_length / (group * sum(lengths.examples) / len(lengths.examples)))
            rows_per_step = max(1, round(examples / held)) if self.rows.kind != "text" else 8
            what = f"A row holds about {held:.0f} examples" if self.rows.kind != "text" else "8 rows make a stable step"
        self._set("train.train_batch_size", rows_per_step, f"Rows of an optimizer step, over all GPUs. {what}.")
        limit = self.device.num_bytes
        share = _MARGIN if self.device.is_gpu else 1
        most = None if limit is None else int(limit * share)
        methods = ["lora", "qlora"] if self.device.is_gpu else ["lora"]
        smallest = 0
        while True:
            for method in methods:
                planner = self._planner(method, lengths)
                for checkpointing in (False, True):
                    rows, need = _largest(planner, min(8, rows_per_step), checkpointing=checkpointing, most=most)
                    if rows:
                        return self._proposal(method, rows, need, checkpointing=checkpointing)
                    smallest = need
            length = self._values["data"]["max_length"]
            if length // 2 < _SHORTEST:
                break
            self._set_length(length // 2, "The most tokens of an example with which the run fits.", lengths)
            if "length" in self._plugins.get("packed", {}):
                self._plugins["packed"]["length"] = max(length // 2, self._plugins["packed"]["length"] // 2)
        length, name = self._values["data"]["max_length"], self.device.name
        raise ConfigError(
            f"{self.model}: does not fit: one row of {length} tokens with {methods[-1]} needs {smallest / 1e9:.1f} GB, "
            f"and {name} has {(most or 0) / 1e9:.1f}; choose a smaller model, or a larger device with --gpu"
        )

    def _run(self, method: str) -> dict[str, Any]:
        """Return the values of the run file so far, with this adapter."""
        template, rest = {}, dict(self._plugins)
        for name in list(rest):
            if self._reasons.get(f"plugins.{name}", "").startswith("The chat template"):
                template[name] = rest.pop(name)
        order = ("model", "add_tokens", "data", "plugins", "train", "generation", "output_dir")
        values = {**self._values, "plugins": {**template, method: {}, **rest}}
        if self.output_dir is not None:
            values["output_dir"] = self.output_dir
        return {name: values[name] for name in order if name in values}

    def _planner(self, method: str, lengths: Lengths) -> Planner:
        values = self._run(method)
        plugins = values.pop("plugins")
        assignments = [(name, value, f"{name}: {value}") for name, value in flatten(values).items()]
        assignments += [
            (f"plugins.{plugin}.{name}", value, name) for plugin, of in plugins.items() for name, value in of.items()
        ]
        loaded = loading.load(None, add=list(plugins), assignments=assignments)
        num_eval = 0
        if self._has_eval:
            fraction = self._values["data"].get("eval_fraction", 16)
            num_eval = math.ceil(fraction * self.rows.num_rows) if fraction < 1 else int(fraction)
        prompts = sorted(lengths.prompts)[-min(num_eval, _MOST_ANSWERED) :] if num_eval else []
        size = RunSize(1, 1, num_evaluations=2, num_eval_rows=num_eval, prompt_lengths=tuple(prompts))
        return Planner(loaded, self.device, size=size if num_eval else None)

    def _proposal(self, method: str, rows: int, need: int, *, checkpointing: bool) -> Proposal:
        reasons = {
            "lora": "LoRA: small matrices beside the frozen weights are trained. r: 32 has more room for larger data.",
            "qlora": "LoRA on a base in four bits, as the model itself would leave too little memory.",
        }
        self._reasons[f"plugins.{method}"] = reasons[method]
        self._set(
            "train.per_device_train_batch_size", rows,
            "Rows that are computed at once: all of a step." if rows == self._values["train"]["train_batch_size"]
            else "Rows that are computed at once: the most that fit, up to eight. The rest of a step follows.",
        )  # fmt: skip
        if checkpointing:
            self._set(
                "train.gradient_checkpointing",
                True,
                "Layers are computed again in the backward pass: without it the run would not fit.",
            )
        if self.output_dir is not None:
            self._reasons["output_dir"] = "Where the result goes."
        limit = self.device.num_bytes
        of = "" if limit is None else f" of {limit / 1e9:.1f} GB"
        where = self.device.name if self.device.is_gpu else "memory that is free on this machine"
        return Proposal(self._run(method), self._reasons, f"fits: {need / 1e9:.1f}{of} ({where})")


def _largest(planner: Planner, at_most: int, *, checkpointing: bool, most: int | None) -> tuple[int, int]:
    """Return the most rows, a power of two, that fit at once, with the bytes they need; 0 with those of one row."""
    rows = 2 ** int(math.log2(at_most))
    need = 0
    while rows:
        need = planner.estimate(rows=rows, gradient_checkpointing=checkpointing).total
        if most is None or need <= most:
            return rows, need
        rows //= 2
    return 0, need


def _template(name: str, tokenizer: PreTrainedTokenizerBase) -> TemplateStage:
    assembly = Assembly(Origins())
    assembly.add(find(name, discover()), {})
    template = assembly.template(tokenizer)
    assert template is not None
    return template


def _is_own(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template asks as the tokenizer's own does, at least where there is a system message."""
    template = _template(name, tokenizer)
    return any(_asks_alike(template, tokenizer, messages) for messages in _PROBES)


def _asks_alike(template: TemplateStage, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ours = "".join(segment.text for segment in template.generation_prompt(Conversation(tuple(messages))))
    except Exception:  # a Jinja template raises what it likes
        return False
    return bool(own == ours)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        return False


def _rounded(length: int) -> int:
    return max(_ROUND_TO, math.ceil(length / _ROUND_TO) * _ROUND_TO)
