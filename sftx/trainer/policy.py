"""The policy of a rollout: answers that the model of a run samples, with their rewards, and log-probabilities.

Dimensions: T tokens, N tokens of a packed batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sftx.assembly.stages.data_stages import CollatorStage
from sftx.assembly.stages.rollout_stages import RewardStage
from sftx.data.collate import pack
from sftx.data.row_encoder import prompt_example
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import PluginError
from sftx.model.decoding import Decoder, Request, Sampling
from sftx.model.generation import embed_prompts
from sftx.model.language_model import CausalLM
from sftx.phases import phase
from sftx.trainer.evaluation import explain_out_of_memory
from sftx.types import Answer, Batch, Example, LanguageModel, Question

T = TypeVar("T")

_TOKENS_AT_ONCE: Final = 8192
"""Tokens of a packed batch of log-probabilities, if the run's own batches are not larger."""


@dataclass
class ModelPolicy:
    """Implements `sftx.Policy` for the model of a run at one step.

    In a run of several processes each must have all parameters (`ParallelStrategy.summon_full_params`). The caller
    switches gradients and dropout off.
    """

    lm: CausalLM
    step: int
    seed: int
    """That of the run."""
    rewards: Mapping[str, RewardStage]
    """By the names of their plugins."""
    reward_weights: Mapping[str, float]
    """Those that are not 1."""
    stop_ids: Sequence[int]
    generation_batch_size: int
    """Rows that are answered at once."""
    batch_size: int
    """Examples of which log-probabilities are computed at once, at most."""
    collator: CollatorStage
    process_group: ProcessGroup
    check_stop: Callable[[], None] = lambda: None
    """Called between batches, and by a single process between tokens too; it may raise."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.lm.tokenizer

    def generate(
        self,
        questions: Sequence[Question],
        *,
        num_answers: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
    ) -> list[list[Answer]]:
        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p)
        self._check_same([[q.row_id, q.prompt_ids] for q in questions], num_answers, dataclasses.astuple(sampling))

        def answered(numbers: list[int]) -> dict[int, list[Answer]]:
            """Answer these questions."""
            place_of: dict[Request, tuple[int, int]] = {}
            for number in numbers:
                question = questions[number]
                for n in range(num_answers):
                    seed = _seed(self.seed, self.step, question.row_id, n)
                    request = Request(question.prompt_ids, dataclasses.replace(sampling, seed=seed))
                    place_of[request] = number, n
            decoder = Decoder(
                self.lm,
                stop_ids=self.stop_ids,
                max_rows=self.generation_batch_size,
                with_log_probabilities=True,
                embed=self._embedded(lambda request: questions[place_of[request][0]])
                if self.lm.embeds_extras
                else None,
            )
            answers: dict[int, list[Answer]] = {number: [] for number in numbers}
            alone = self.process_group.world_size == 1
            with phase("rollout", "answers", total=len(place_of), unit="answers") as progress:
                for request in decoder.run(place_of, check_stop=self.check_stop if alone else lambda: None):
                    number, n = place_of[request]
                    answers[number].append(self._answer(questions[number], n, request))
                    progress.update()
            for group in answers.values():
                group.sort(key=lambda answer: answer.number)
            return self._rewarded(answers)

        with explain_out_of_memory(
            self.lm, f"step {self.step + 1}: to answer", "generation.batch_size", self.generation_batch_size
        ):
            return self._divided([len(question.prompt_ids) for question in questions], answered)

    def _answer(self, question: Question, number: int, request: Request) -> Answer:
        stop = () if request.stop_id is None else (request.stop_id,)
        return Answer(
            question=question,
            number=number,
            text=str(self.tokenizer.decode(request.answer_ids, skip_special_tokens=True)),
            token_ids=(*request.answer_ids, *stop),
            log_probs=tuple(request.log_probabilities),
            finish_reason="stop" if request.finish_reason == "stop" else "length",
        )

    def _rewarded(self, answers: Mapping[int, Sequence[Answer]]) -> dict[int, list[Answer]]:
        """Return the answers with their rewards. Each reward gets the answers to all of these questions at once."""
        listed = [answer for group in answers.values() for answer in group]
        scores: list[dict[str, float]] = [{} for _ in listed]
        for name, reward in self.rewards.items():
            with phase("rollout", f"the reward {name}"):
                for of_answer, score in zip(scores, reward(listed) if listed else (), strict=True):
                    if score is not None:
                        of_answer[name] = score
        rewarded = iter(
            dataclasses.replace(
                answer,
                rewards=of_answer,
                reward=sum(self.reward_weights.get(name, 1.0) * score for name, score in of_answer.items()),
            )
            for answer, of_answer in zip(listed, scores, strict=True)
        )
        return {number: [next(rewarded) for _ in group] for number, group in answers.items()}

    def _embedded(self, question_of: Callable[[Request], Question]) -> Callable[[Sequence[Request]], Sequence[Tensor]]:
        """Return the function by which the engine embeds prompts, for an adapter that embeds extras."""

        def embed(requests: Sequence[Request]) -> list[Tensor]:
            prompts = [prompt_example(question_of(request), group) for group, request in enumerate(requests)]
            return embed_prompts(self.lm, self.collator.collate, prompts)

        return embed

    def log_probs(
        self,
        examples: Sequence[Example],
        *,
        temperature: float = 1.0,
        lm: LanguageModel | None = None,
        without_adapters: bool = False,
    ) -> list[NDArray[np.float32]]:
        def compute(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
            out = model.cross_entropy(
                model.hidden(batch).hidden_BTD,
                batch.labels_BT,
                num_valid=batch.num_label_tokens,
                reduction="none",
                temperature=temperature,
            )
            return {"log_probs": -out.loss.view_as(batch.labels_BT)}

        made = self.per_token(examples, compute, lm=lm, without_adapters=without_adapters)
        return [numbers["log_probs"] for numbers in made]

    def per_token(
        self,
        examples: Sequence[Example],
        compute: Callable[[LanguageModel, Batch], Mapping[str, Tensor]],
        *,
        lm: LanguageModel | None = None,
        without_adapters: bool = False,
    ) -> list[dict[str, NDArray[np.float32]]]:
        self._check_same([[e.row_id, e.token_ids.tolist()] for e in examples], without_adapters)
        model = self.lm if lm is None else lm
        embeds = lm is None and self.lm.embeds_extras and not without_adapters

        def computed(numbers: list[int]) -> dict[int, dict[str, NDArray[np.float32]]]:
            results: dict[int, dict[str, NDArray[np.float32]]] = {}
            context = model.without_adapters() if without_adapters else contextlib.nullcontext()
            with context, phase("rollout", "log-probabilities", total=len(numbers), unit="rows") as progress:
                for together in self._batches(examples, numbers, alone=embeds):
                    if self.process_group.world_size == 1:
                        self.check_stop()
                    chosen = [examples[number] for number in together]
                    batch = (self.collator.collate(chosen) if embeds else pack(chosen)).to(self.lm.device)
                    made = {name: _on_host(name, value, batch) for name, value in compute(model, batch).items()}
                    start = 0
                    for number, example in zip(together, chosen, strict=True):
                        end = start + len(example.token_ids) - 1
                        results[number] = {
                            # What stands at a position belongs to the token after it.
                            name: np.append(np.float32(0), values_N[start:end])
                            for name, values_N in made.items()
                        }
                        start = end + 1
                    progress.update(len(together))
            return results

        with explain_out_of_memory(
            self.lm,
            f"step {self.step + 1}: to compute log-probabilities",
            "per_device_eval_batch_size",
            self.batch_size,
        ):
            return self._divided([len(example.token_ids) for example in examples], computed)

    def _batches(self, examples: Sequence[Example], numbers: Sequence[int], *, alone: bool) -> list[list[int]]:
        """Divide examples into batches. An adapter's collator may lay several out as it likes: then each is alone."""
        batches: list[list[int]] = []
        num_tokens = 0
        for number in numbers:
            length = len(examples[number].token_ids)
            is_full = alone or not batches or len(batches[-1]) == self.batch_size
            if is_full or num_tokens + length > _TOKENS_AT_ONCE:
                batches.append([])
                num_tokens = 0
            batches[-1].append(number)
            num_tokens += length
        return batches

    def _divided(self, lengths: Sequence[int], compute: Callable[[list[int]], Mapping[int, T]]) -> list[T]:
        """Compute items, each in one of the processes, and return the results of all in their order."""
        group = self.process_group
        self.check_stop()
        longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        own = group.all_or_raise(lambda: compute(longest_first[group.rank :: group.world_size]))
        gathered = {number: result for results in group.all_gather(own) for number, result in results.items()}
        return [gathered[number] for number in range(len(lengths))]

    def _check_same(self, *arguments: object) -> None:
        """Raise PluginError when processes were given different arguments."""
        if self.process_group.world_size > 1:
            digest = hashlib.sha256(json.dumps(arguments).encode()).hexdigest()
            if len(set(self.process_group.all_gather(digest))) > 1:
                raise PluginError("the processes of the run ask the policy for different things; ask for the same")


def _seed(run_seed: int, step: int, row_id: str, number: int) -> int:
    """Return the seed of an answer, which stays the same when the data lies in another directory."""
    row = row_id.replace("\\", "/").rpartition("/")[2]
    key = f"answer {run_seed} {step} {row} {number}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def _on_host(name: str, values_BT: Tensor, batch: Batch) -> NDArray[np.float32]:
    """Return what was computed of a batch, [N] in fp32. Raises PluginError for another shape than the labels have."""
    if values_BT.shape != batch.labels_BT.shape:
        raise PluginError(
            f"per_token: {name} is of shape {list(values_BT.shape)}, and the labels are of "
            f"{list(batch.labels_BT.shape)}; return a number for each label"
        )
    values_N: NDArray[np.float32] = values_BT.float().flatten().cpu().numpy()
    return values_N
