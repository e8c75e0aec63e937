"""Events of a run, which observers receive, and the rows of the assembled table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Provider:
    """One line of the assembled table: who fills a stage, from which distribution, with which options."""

    stage: str
    plugin: str
    distribution: str
    version: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """The facts about a run that every hook may ask for."""

    output_dir: Path
    """Exists from `on_start` on. Before it is chosen, and in commands that run nothing, that of the options or `.`."""
    config: Mapping[str, Any]
    """The resolved run file: `train`, `data`, `generation`, `model`, ..., and the options of each plugin under
    `plugins`."""


@dataclass(frozen=True)
class StartReport:
    """Values that were derived before the first step."""

    providers: tuple[Provider, ...]
    model: str
    device: str
    dtype: str
    num_parameters: int
    num_trainable: int
    num_rows: int
    num_examples: int
    num_label_tokens: int
    """Trained tokens of one epoch."""
    num_input_tokens: int
    num_eval_rows: int
    formats: Mapping[str, int]
    """Rows by the parser that took them."""
    ledger: tuple[str, ...]
    """One line for each kind of row that was dropped or cut."""
    num_steps: int
    """Optimizer steps of the whole run."""
    tokens_per_step: float
    """Trained tokens of a step, mean."""
    is_stream: bool = False
    """Whether rows are read while training: rows and tokens above are those of the first window then."""
    num_processes: int = 1
    train_batch_size: int = 0
    """Rows of an optimizer step, over all processes."""
    per_device_train_batch_size: int = 0
    """Rows that one process computes at once."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of a process in a step."""
    reach: str = ""
    """How much of the model's weights train, or adapters reach, and which kinds are left out; empty if all train."""
    resumed_step: int | None = None
    """The step after which an interrupted run goes on; what it reported of later steps is void. None: a new run."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step; in `Observer.on_log`, the steps since the last log as one."""

    step: int
    """Counted from 1."""
    num_steps: int
    epoch: float
    """Epochs done after this step."""
    loss: float
    """Mean over the step's denominator: trained tokens, or what else the loss counts (pairs). Over several steps, the
    mean of theirs, weighted by their trained tokens; so are the metrics."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    num_label_tokens: int
    """Trained tokens."""
    num_input_tokens: int
    seconds: float
    peak_bytes: int
    """Device memory where there is a GPU, resident memory of the process otherwise; highest so far."""
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, padding not counted."""
        return self.num_input_tokens / self.seconds


@dataclass(frozen=True)
class Sample:
    """One held-out row: what was asked, what is right, what the model says."""

    row_id: str
    prompt: str
    reference: str
    prediction: str
    full_prompt: str = ""
    """All that the model was given, control tokens too."""


@dataclass(frozen=True)
class TokenLosses:
    """One held-out row, token by token, as the model finds it at that time."""

    row_id: str
    tokens: tuple[str, ...]
    """The text of each."""
    losses: tuple[float | None, ...]
    """Of each token, given those before it: negative log-likelihood in nats. None for the first, which has none."""
    trained: tuple[bool, ...]


@dataclass(frozen=True)
class EvalReport:
    """One evaluation of the model; step 0 is the model before training."""

    step: int
    metrics: Mapping[str, float]
    """`loss` and what else the loss counts, means over its denominator; then the scores of metrics and of evaluators.
    Without held-out rows, the scores of evaluators alone."""
    samples: tuple[Sample, ...] = ()
    """The answered rows; empty without a metric."""
    seconds: float = 0.0
    token_losses: TokenLosses | None = None
    """Those of one row, the same in every evaluation; None without held-out rows."""


@dataclass(frozen=True)
class Decision:
    """A control plugin's answer to a step or an evaluation. What it leaves unset, the run's options decide."""

    evaluate: bool = False
    """Evaluate the held-out rows after this step."""
    save: bool = False
    """Save a checkpoint after this step."""
    stop: bool = False
    """End the run after this step, with its artefact and its report, as if it were complete."""
    rate_factor: float | None = None
    """Factor of the learning rate in all later steps, in place of the one that this plugin asked for before."""
    reason: str = ""
    """Why, in a few words; it is printed and recorded."""


@dataclass(frozen=True)
class Result:
    """The directory of a finished run, and the content of its summary.json."""

    output_dir: Path
    summary: Mapping[str, Any]
    """`num_steps`, `num_label_tokens`, `loss` (`first`, `last`), `tokens_per_second`, `peak_bytes`, `wall_seconds`,
    `seconds` (wall time by phase: `importing`, `loading`, `encoding`, `training`, `evaluating`, ...), `artefact` (its
    directory); with `metric_for_best_model` `best` (`step`, `value`); with held-out rows `held_out` (`before`, `after`:
    means by name) and `samples`."""
