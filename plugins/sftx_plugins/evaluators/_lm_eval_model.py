"""The model of a run as lm-evaluation-harness sees it. Importing this module imports the harness, in two seconds.

Encoding, truncation and post-processing are those of the harness's own HFLM, so that scores are equal to those that it
computes of the saved model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sftx import ConfigError, Evaluation

_SEED: Final = 1234
"""Of the choice of few-shot examples: the harness's own default."""
_MAX_LENGTH: Final = 2048
"""The harness's own limit, in tokens, for a model whose configuration has none."""


class Harness:
    """Loads tasks, and computes their scores at each evaluation."""

    def __init__(
        self, names: Sequence[str], include_path: str | None, num_fewshot: int | None, **settings: bool | int | None
    ) -> None:
        """`settings`: arguments of the harness's `evaluate`. Raises ConfigError for tasks that cannot be loaded."""
        self._names, self._num_fewshot, self._settings = names, num_fewshot, settings
        try:
            with _quiet():
                self._tasks: dict[str, Any] = TaskManager(include_path=include_path).load(list(names))
        except Exception as error:  # an unknown task, a file that is no YAML, a data set that cannot be reached
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the tasks {', '.join(names)} cannot be loaded: {type(error).__name__}: {reason:.300}"
            ) from error

    def evaluate(self, evaluation: Evaluation) -> Mapping[str, float]:
        model = RunModel(evaluation)
        with _quiet():
            for task in self._tasks["tasks"].values():
                own = task.get_config("num_fewshot")
                if own is None or (self._num_fewshot is not None and own != 0):  # as the harness decides
                    task.set_config(key="num_fewshot", value=self._num_fewshot or 0)
                task.set_fewshot_seed(seed=_SEED)
            results = evaluate(model, self._tasks, bootstrap_iters=0, log_samples=False, **self._settings)["results"]
        named = {name: _numbers(name, values) for name, values in results.items()}
        chosen = [named.get(name, {}) for name in self._names]
        if not all(chosen):  # a group without a score of its own: those of its tasks
            chosen = list(named.values())
        return {name: value for numbers in chosen for name, value in numbers.items()}


def _numbers(task: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a task by name, without standard errors."""
    numbers = {}
    for key, value in values.items():
        metric, _, chosen_by = key.partition(",")
        if chosen_by and not metric.endswith("_stderr") and isinstance(value, int | float):
            numbers[f"{task}/{metric}" + ("" if chosen_by == "none" else f",{chosen_by}")] = float(value)
    return numbers


class RunModel(TemplateLM):  # type: ignore[misc]
    """Answers the harness's requests. Every process has all of them; `Evaluation` divides the work."""

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__()
        self._evaluation = evaluation
        self._stderr = sys.stderr  # on which the run shows how far it is
        self.tokenizer: Any = evaluation.lm.tokenizer
        config: Any = evaluation.lm.model.config.get_text_config()
        self._max_length = int(getattr(config, "max_position_embeddings", None) or _MAX_LENGTH)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            room = max(1, self._max_length + 1 - len(continuation))
            pairs.append((list(context)[-room:], list(continuation)))
        with contextlib.redirect_stderr(self._stderr):
            return self._evaluation.log_likelihoods(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], 256)
            if settings.get("do_sample"):
                raise ConfigError(
                    "the task samples its answers (do_sample), and a run answers with the likeliest tokens"
                )
            stop = handle_stop_sequences(settings.get("until"), eos=self.tokenizer.decode(self.eot_token_id))
            most = settings["max_gen_toks"]
            room = self._max_length - most
            if room < 1:
                raise ConfigError(
                    f"the task asks for {most} new tokens; the model was made for {self._max_length} in all"
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            with contextlib.redirect_stderr(self._stderr):
                texts = self._evaluation.generate(prompts, max_new_tokens=most, stop=[text for text in stop if text])
            answers.update(zip(numbers, texts, strict=True))
        return [answers[number] for number in range(len(requests))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let the harness log errors alone, and draw no progress bars of its own."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
