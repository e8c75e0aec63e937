"""lm-eval: the tasks of EleutherAI's lm-evaluation-harness, computed with the model of the run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sftx import ConfigError, Evaluator, RunInfo, hookimpl


@dataclass(frozen=True, eq=False)
class LmEval:
    """Runs tasks of lm-evaluation-harness; scores are named TASK/METRIC, such as `arc_easy/acc_norm`."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1, description="Names of tasks or groups.")]
    include_path: Annotated[
        str | None, Field(min_length=1, description="Directory with YAML files of further tasks.")
    ] = None
    num_fewshot: Annotated[
        int | None,
        Field(ge=0, le=10**6, description="Solved examples before each question; by default the task's own number."),
    ] = None
    limit: Annotated[
        int | None, Field(ge=1, le=10**9, description="Only the first rows of each task; by default all.")
    ] = None
    apply_chat_template: Annotated[
        bool, Field(description="Ask with the chat template of the tokenizer, which is that of the run.")
    ] = False

    @hookimpl
    def sftx_validate(self, run: RunInfo) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("needs the library lm_eval; install it with pip install 'sftx[lm-eval]'")

    @hookimpl
    def sftx_evaluator(self, run: RunInfo) -> Evaluator:
        self.sftx_validate(run)
        from sftx_plugins.evaluators._lm_eval_model import Harness

        return Harness(
            self.tasks,
            self.include_path,
            self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            fewshot_as_multiturn=self.apply_chat_template,
        )
