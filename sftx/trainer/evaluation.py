"""Computes answers and log-likelihoods for an evaluation, in batches that the processes of a run share.

Dimensions: B rows, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sftx.data.collate import pad
from sftx.data.encoder import Encoder
from sftx.data.row_encoder import answer_ids
from sftx.distributed.process_group import ProcessGroup
from sftx.errors import PluginError, TrainingError, counted, is_out_of_memory
from sftx.model.generation import generate_greedy
from sftx.model.language_model import CausalLM
from sftx.phases import phase
from sftx.types import IGNORE_INDEX, Conversation, Example, Message, Question

T = TypeVar("T")


@dataclass
class ModelEvaluation:
    """Implements `sftx.Evaluation` for one model at one step.

    In a run of several processes each must have all parameters (`ParallelStrategy.summon_full_params`). The caller
    switches gradients and dropout off.
    """

    lm: CausalLM
    step: int
    rows: Sequence[Question]
    examples: Sequence[Example]
    encoder: Encoder | None
    """Of evaluator plugins; answers to held-out rows need none."""
    stop_ids: Sequence[int]
    batch_size: int
    """Rows that are evaluated at once."""
    generation_batch_size: int
    """Rows that are answered at once."""
    max_new_tokens: int
    process_group: ProcessGroup
    check_stop: Callable[[], None] = lambda: None
    """Called between batches, and by a single process between tokens too; it may raise."""

    def encode(self, prompt: str | Conversation, continuation: str = "") -> tuple[list[int], list[int]]:
        assert self.encoder is not None
        if isinstance(prompt, str):
            return self.encoder.text(prompt), self.encoder.plain(continuation, continues=bool(prompt))
        answer = answer_ids(prompt, Message("assistant", continuation), self.encoder) if continuation else []
        return self.encoder.prompt(prompt), answer

    def generate(
        self,
        prompts: Sequence[str | Conversation | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        prompt_ids = [self.encode(one)[0] if isinstance(one, str | Conversation) else list(one) for one in prompts]
        control = self.lm.tokenizer.get_added_vocab()
        return [
            _until(str(self.lm.tokenizer.decode(ids, skip_special_tokens=True)), stop)
            for ids in self.answer(
                prompt_ids,
                max_new_tokens=max_new_tokens,
                stop_ids=[*self.stop_ids, *(control[text] for text in stop if text in control)],
                stop=[text for text in stop if text not in control],
            )
        ]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        stop_ids: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        embed: Callable[[Sequence[int]], Sequence[Tensor]] | None = None,
    ) -> list[list[int]]:
        """Return the token ids of the answer to each prompt. `embed`: as that of `generate_greedy`."""
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {number} has no token; give at least one")
        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens

        def answered(numbers: list[int]) -> Iterator[tuple[int, list[int]]]:
            for index, ids in generate_greedy(
                self.lm,
                [prompts[number] for number in numbers],
                max_new_tokens=most,
                stop_ids=self.stop_ids if stop_ids is None else stop_ids,
                batch_size=self.generation_batch_size,
                stop=stop,
                check_stop=self.check_stop if self.process_group.world_size == 1 else lambda: None,
                embed=None if embed is None else lambda indices: embed([numbers[index] for index in indices]),
            ):
                yield numbers[index], ids

        with explain_out_of_memory(
            self.lm, f"step {self.step}: to answer", "generation.batch_size", self.generation_batch_size
        ):
            lengths = [len(prompt) for prompt in prompts]
            arguments = [*map(list, prompts), most, stop]
            # A process that is alone lets other rows join as soon as some are complete; several keep in step.
            at_once = len(prompts) if self.process_group.world_size == 1 else self.generation_batch_size
            return self._divided("answering", "prompts", lengths, max(1, at_once), answered, arguments)

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        examples = []
        for number, (prompt, continuation) in enumerate(pairs):
            if not prompt:
                raise ValueError(f"the prompt of pair {number} has no token; give at least one, such as bos")
            mask = [False] * len(prompt) + [True] * len(continuation)
            examples.append(Example([*prompt, *continuation], mask, str(number), number))  # type: ignore[arg-type]

        def computed(numbers: list[int]) -> Iterator[tuple[int, tuple[float, bool]]]:
            batch = pad([examples[number] for number in numbers])
            if batch.num_label_tokens == 0:
                yield from ((number, (0.0, True)) for number in numbers)
                return
            batch = batch.to(self.lm.device)
            with self.lm.ignoring_extras():  # what is asked is text
                hidden_BTD = self.lm.hidden(batch).hidden_BTD
            out = self.lm.cross_entropy(
                hidden_BTD,
                batch.labels_BT,
                num_valid=batch.num_label_tokens,
                reduction="none",
                stats=True,
            )
            assert out.correct_N is not None
            sums_B = -out.loss.view_as(batch.labels_BT).double().sum(1)
            greedy_B = (out.correct_N.view_as(batch.labels_BT) | (batch.labels_BT == IGNORE_INDEX)).all(1)
            yield from zip(numbers, zip(sums_B.tolist(), greedy_B.tolist(), strict=True), strict=True)

        with explain_out_of_memory(
            self.lm, f"step {self.step}: to evaluate", "per_device_eval_batch_size", self.batch_size
        ):
            lengths = [len(example.token_ids) for example in examples]
            return self._divided("evaluating", "log-likelihoods", lengths, self.batch_size, computed, pairs)

    def _divided(
        self,
        name: str,
        what: str,
        lengths: Sequence[int],
        batch_size: int,
        compute: Callable[[list[int]], Iterable[tuple[int, T]]],
        arguments: object,
    ) -> list[T]:
        """Compute items in batches of similar length, the longest first, and return the results of all processes.

        Every process computes one batch at a time, then all check together whether to stop. Raises PluginError when
        processes were given different `arguments`.
        """
        group = self.process_group
        order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        if group.world_size > 1:
            digests = group.all_gather(hashlib.sha256(json.dumps(arguments, default=int).encode()).hexdigest())
            if len(set(digests)) > 1:
                raise PluginError("the processes of the run ask for different things; ask for the same in each")
        results: dict[int, T] = {}
        with phase(name, what, total=len(lengths), unit="rows") as progress, torch.no_grad():
            for start in range(0, len(batches), group.world_size):
                self.check_stop()
                together = batches[start : start + group.world_size]
                for batch in together[group.rank :][:1]:
                    for number, result in compute(batch):
                        results[number] = result
                        progress.update()
                progress.update(sum(len(batch) for rank, batch in enumerate(together) if rank != group.rank))
        gathered = {number: result for one in group.all_gather(results) for number, result in one.items()}
        return [gathered[number] for number in range(len(lengths))]


def _until(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the texts `stop` in it."""
    return text[: min((at for one in stop if (at := text.find(one)) >= 0), default=len(text))]


@contextlib.contextmanager
def explain_out_of_memory(lm: CausalLM, what: str, option: str, num_rows: int) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that says what to lower, and by how much."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"lower {option} to {num_rows // 2} (now {num_rows})" if num_rows > 1 else "lower data.max_length"
        raise TrainingError(
            f"{what} {counted(num_rows, 'row')} at once, {lm.device} has not enough memory; {fewer}"
        ) from error
