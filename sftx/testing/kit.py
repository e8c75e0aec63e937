"""This module prepares what a plugin is checked with: its own stages, default ones for the rest, and a small model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sftx.assembly.entry_points import discover, find
from sftx.assembly.registry import Assembly, activate
from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.rollout_stages import RewardStage, RolloutStage
from sftx.assembly.stages.stage import make
from sftx.config.default_plugins import DEFAULT_PLUGINS, TEMPLATES
from sftx.config.loading import load
from sftx.config.named_plugins import OPTIM
from sftx.config.options import DataConfig
from sftx.config.run_file import Origins
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import EncodedRow, RowEncoder
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import DataError
from sftx.events import Provider, RunInfo
from sftx.model import tiny
from sftx.model.language_model import CausalLM
from sftx.model.load import load_model, load_spec, load_tokenizer
from sftx.trainer.policy import ModelPolicy
from sftx.types import (
    Adapter,
    Answer,
    Collator,
    Conversation,
    Example,
    Location,
    Loss,
    Message,
    ModelSpec,
    OptimizerBuilder,
    Parser,
    Question,
    Schedule,
    Template,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATIONS = tuple(
    Conversation(tuple(Message(role, content) for role, content in turns))
    for turns in (
        [("user", "What is 2 + 3?"), ("assistant", "5")],
        [("user", "Name the largest planet."), ("assistant", "Jupiter is the largest planet of the sun.")],
        [("user", "Hello!"), ("assistant", "Hello."), ("user", "How are you today?"), ("assistant", "Well, thanks.")],
        [("user", "你好，请介绍一下北京。"), ("assistant", "北京是中国的首都。")],
        [("user", "Write a list.\n- one\n- two"), ("assistant", "- one\n- two\n\nThat is the list.")],
        [("user", "Say yes"), ("assistant", "yes"), ("user", "again"), ("assistant", "yes"), ("user", "and again"),
         ("assistant", "yes, yes")],
    )
)  # fmt: skip
"""Conversations that every template can render: user and assistant turns that alternate."""

_ANSWER_LENGTH = 12
"""The most tokens of an answer to a rollout."""

MAX_LENGTH = 128
"""The maximum length that collators are given, in tokens; all of these conversations are shorter."""


@lru_cache
def assembled() -> tuple[Mapping[str, Any], tuple[Provider, ...]]:
    """Return the resolved run file and the table of plugins of a run with LoRA and every default."""
    assignments = [("data.train", ["rows.jsonl"], ""), ("data.eval", ["held-out.jsonl"], "")]
    loaded = load(None, add=["chatml", "lora"], assignments=assignments)
    assembly = activate(loaded)
    return assembly.run.config, assembly.table()


def run_info(directory: Path, number: int = 1) -> RunInfo:
    """Return the argument of the hook; its run directory, below `directory`, does not exist yet."""
    return RunInfo(directory / "runs" / f"run-{number}", deepcopy(assembled()[0]))


def make_stage(plugin: object, hook: str, **arguments: Any) -> Any:
    """Call the plugin's hook as a run of `assembled` does. Raises PluginError for a wrong result."""
    return make(plugin, hook, **{"run": run_info(Path()), **arguments})


class Kit:
    """One plugin and everything else that a run with it needs; each part is made on first use.

    `model` is a directory with a model and its tokenizer. By default it is the tiny model, whose tokenizer then gets
    the control tokens that the plugin's template declares.
    """

    def __init__(self, plugin: object, model: Path | None = None) -> None:
        self.plugin = plugin
        self.model_dir = model or tiny.model_dir()
        self._is_tiny = model is None
        self._rolled_out: dict[int, tuple[CausalLM, list[Example]]] = {}
        """The examples of a rollout by the identity of the model that made them, which is kept for it."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = load_tokenizer(str(self.model_dir))
        if self._is_tiny and hasattr(self.plugin, "sftx_template"):
            controls = make_stage(self.plugin, "sftx_template", tokenizer=tokenizer).controls
            tokenizer.add_tokens(sorted(controls - set(tokenizer.get_vocab())), special_tokens=True)
        return tokenizer

    @cached_property
    def template(self) -> Template:
        template: Template = self._stage("sftx_template", TEMPLATES[0], tokenizer=self.tokenizer)
        return template

    @cached_property
    def collator(self) -> Collator:
        collator: Collator = self._stage("sftx_collator", DEFAULT_PLUGINS["sftx_collator"][0], max_length=MAX_LENGTH)
        return collator

    @cached_property
    def loss(self) -> Loss:
        loss: Loss = self._stage("sftx_loss", DEFAULT_PLUGINS["sftx_loss"][0])
        return loss

    @cached_property
    def optimizer(self) -> OptimizerBuilder:
        optimizer: OptimizerBuilder = self._stage("sftx_optimizer", OPTIM.built_in[0])
        return optimizer

    def schedule(self, num_training_steps: int) -> Schedule:
        """Return the schedule of a run of so many steps, without warm-up."""
        given = {"num_warmup_steps": 0, "num_training_steps": num_training_steps}
        schedule: Schedule = self._stage("sftx_schedule", "cosine-schedule", **given)
        return schedule

    def _stage(self, hook: str, default: str, **arguments: Any) -> Any:
        plugin = self.plugin if hasattr(self.plugin, hook) else built_in(default)
        run = RunInfo(Path(), {**assembled()[0], "model": str(self.model_dir)})
        return make_stage(plugin, hook, run=run, **arguments)

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.template)

    @cached_property
    def spec(self) -> ModelSpec:
        return load_spec(str(self.model_dir))

    @property
    def examples(self) -> list[Example]:
        """The samples of the plugin's parser, or CONVERSATIONS, encoded with the plugin's template or ChatML.

        Those of a plugin with a rollout are what the rollout makes of them, which a loss of the same plugin expects.
        """
        return self.examples_for(self.policy_model) if hasattr(self.plugin, "sftx_rollout") else self._encoded[0]

    def examples_for(self, lm: CausalLM) -> list[Example]:
        """The same examples; those of a rollout are made with this model, in place of the kit's own."""
        if not hasattr(self.plugin, "sftx_rollout"):
            return self._encoded[0]
        if id(lm) not in self._rolled_out:
            lm.eval()
            with torch.no_grad():
                made = self.rollout(dataclasses.replace(self.policy(), lm=lm), self.held_out_rows, 1)
            self._rolled_out[id(lm)] = lm, list(made.examples)
        return self._rolled_out[id(lm)][1]

    @cached_property
    def rollout(self) -> RolloutStage:
        return self.make_rollout()

    def make_rollout(self) -> RolloutStage:
        """Return a new one, which remembers nothing."""
        return RolloutStage("the rollout", self._stage("sftx_rollout", ""))

    @cached_property
    def policy_model(self) -> CausalLM:
        """The model that a rollout gets, with the module of the plugin's own loss where that has one."""
        lm = self.language_model()
        make_module: Any = getattr(self.loss, "module", None)
        lm.loss_module = None if make_module is None else make_module(lm)
        return lm.eval()

    def policy(self, step: int = 0) -> ModelPolicy:
        """Return the policy that a rollout gets; a reward of its own scores the answers."""
        collator = CollatorStage("the collator", self.collator)
        return _BriefPolicy(
            lm=self.policy_model,
            step=step,
            seed=0,
            rewards={"sample": RewardStage("the reward", _sample_reward)},
            reward_weights={},
            stop_ids=self.encoder.stop_ids,
            generation_batch_size=64,
            batch_size=8,
            collator=collator,
            process_group=ProcessGroup(),
        )

    @property
    def held_out_rows(self) -> list[Question]:
        """Return the same samples, those that are conversations, as metrics and evaluators get them."""
        return self._encoded[1]

    @cached_property
    def _encoded(self) -> tuple[list[Example], list[Question]]:
        if hasattr(self.plugin, "sftx_parser"):
            parser: Parser = make_stage(self.plugin, "sftx_parser")
            rows = [tuple(parser.parse(record, Location("samples", 0))) for record in parser.samples]
            rows *= 1 + 3 // max(1, len(rows))  # repeated, so that there are enough rows for a batch
        else:
            rows = [(conversation,) for conversation in CONVERSATIONS]
        encode = RowEncoder({}, self.encoder, DataConfig(), questions=True)
        examples: list[Example] = []
        held_out: list[Question] = []
        for number, parsed in enumerate(rows, 1):
            row = encode.encode(parsed, EncodedRow(Location("samples", number)))
            examples += row.examples_from_group(first_group=len(examples))
            held_out += row.questions
        if not examples:
            raise DataError("no sample has a label token")
        return examples, held_out

    def language_model(
        self,
        adapters: Mapping[str, Adapter] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        trainable: Set[str] | None = None,
    ) -> CausalLM:
        """Load the model again and attach these adapters; without any, `trainable` parameters train, or all."""
        adapters = adapters or {}
        model = load_model(self.spec, list(adapters.values()), dtype=dtype, device=torch.device("cpu"))
        lm = CausalLM(model, self.tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            lm.attach(adapters, trainable)
        return lm


class _BriefPolicy(ModelPolicy):
    """Answers with few tokens: the tiny model ends an answer by chance alone."""

    def generate(self, questions: Sequence[Question], *, max_new_tokens: int, **options: Any) -> list[list[Answer]]:
        return super().generate(questions, max_new_tokens=min(max_new_tokens, _ANSWER_LENGTH), **options)


def _sample_reward(answers: Sequence[Answer]) -> list[float]:
    """Score answers by their tokens: what they say means nothing, and they differ."""
    return [sum(answer.token_ids) % 5 / 5 for answer in answers]


def built_in(name: str, **options: Any) -> object:
    """Return an instance of the installed plugin `name` with these options."""
    assembly = Assembly(Origins())
    assembly.add(find(name, discover()), options)
    return assembly.active[0].plugin
