"""The test-kit for plugin authors: the contract of each hook, as suites of clauses that a plugin is held against.

`check_template(MyTemplate())` in a test raises ContractError with what is wrong and what mends it; `sftx plugins check`
runs the same suites on an installed plugin. The pytest fixtures `tiny_model`, `tiny_tokenizer` and `plugin_run` come
with sftx (`sftx/testing/pytest_plugin.py`). Importing this package imports torch.

A file for each contract: `package`, `parser`, `template`, `collator`, `adapter`, `loss`, `metric`, `observer`.
`clauses` is what a contract is made of, `kit` what a plugin is checked with, `contract` all of them on an installed
plugin; the other files are what the clauses of one or two contracts look at.
"""

from sftx.events import Result
from sftx.testing.adapter import check_adapter
from sftx.testing.clauses import ContractError, Finding
from sftx.testing.collator import check_collator
from sftx.testing.loss import check_loss
from sftx.testing.metric import check_metric
from sftx.testing.observer import check_observer
from sftx.testing.parser import check_parser
from sftx.testing.template import check_template

__all__ = [
    "ContractError",
    "Finding",
    "Result",
    "check_adapter",
    "check_collator",
    "check_loss",
    "check_metric",
    "check_observer",
    "check_parser",
    "check_template",
]
