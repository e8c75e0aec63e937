"""This package lets authors of plugins test them: the contract of each hook, as a suite of clauses.

`check_template(MyTemplate())` in a test raises ContractError, which says what is wrong and how to fix it; `sftx plugins
check` runs the same suites on an installed plugin. The pytest fixtures `tiny_model`, `tiny_tokenizer` and `plugin_run`
come with sftx (`pytest_plugin`). Importing this package imports torch.

Each contract is a module of its own: `package`, `source`, `parser`, `template`, `collator`, `adapter`, `trainable`,
`loss`, `rollout`, `reward`, `optimizer`, `schedule`, `metric`, `evaluator`, `control`, `observer`, `exporter`. The
package may import all of sftx except `sftx.cli` and `sftx.inspection`; only `sftx.cli` imports it.
"""

from sftx.events import Result
from sftx.testing.adapter import check_adapter
from sftx.testing.clauses import ContractError, Finding
from sftx.testing.collator import check_collator
from sftx.testing.control import check_control
from sftx.testing.evaluator import check_evaluator
from sftx.testing.exporter import check_exporter
from sftx.testing.loss import check_loss
from sftx.testing.metric import check_metric
from sftx.testing.observer import check_observer
from sftx.testing.optimizer import check_optimizer
from sftx.testing.parser import check_parser
from sftx.testing.reward import check_reward
from sftx.testing.rollout import check_rollout
from sftx.testing.schedule import check_schedule
from sftx.testing.source import check_source
from sftx.testing.template import check_template
from sftx.testing.trainable import check_trainable

__all__ = [
    "ContractError",
    "Finding",
    "Result",
    "check_adapter",
    "check_collator",
    "check_control",
    "check_evaluator",
    "check_exporter",
    "check_loss",
    "check_metric",
    "check_observer",
    "check_optimizer",
    "check_parser",
    "check_reward",
    "check_rollout",
    "check_schedule",
    "check_source",
    "check_template",
    "check_trainable",
]
