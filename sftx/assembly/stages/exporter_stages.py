"""An exporter, and the model that it wrote, as stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sftx.assembly.stages.stage import Stage, arguments_of
from sftx.types import ExportedModel, Exporter, ExportSource, Rounding

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


class ExporterStage(Stage):
    """Exports the result of a run, and checks that something was written."""

    def __init__(self, plugin: str, exporter: Exporter) -> None:
        super().__init__(plugin)
        self._exporter = exporter
        with self._attribute("reading what it declares"):
            self.rounding: Rounding = getattr(exporter, "rounding", "none")
            self.can_load = hasattr(exporter, "load")
        if self.rounding not in get_args(Rounding):
            raise self._refuse(
                f"its rounding is {self.rounding!r:.60}, expected one of {', '.join(get_args(Rounding))}"
            )

    def check(self, config: PretrainedConfig) -> None:
        with self._attribute("check"):
            self._exporter.check(config)

    def export(self, source: ExportSource, directory: Path) -> None:
        with self._attribute("export"):
            self._exporter.export(source, directory)
        if not any(path.is_file() for path in directory.rglob("*")):
            raise self._refuse("export wrote no file")

    def usage(self, directory: Path) -> str:
        with self._attribute("usage"):
            text: Any = self._exporter.usage(directory)
        if not isinstance(text, str):
            raise self._refuse(f"usage returned {type(text).__name__}, expected text")
        return text

    def load(self, directory: Path, *, trust_remote_code: bool = False) -> ExportedStage:
        """Load what was written there; only where `can_load`. `trust_remote_code` is for a `load` that asks for it."""
        exporter: Any = self._exporter
        options = {"trust_remote_code": trust_remote_code} if "trust_remote_code" in arguments_of(exporter.load) else {}
        with self._attribute("load"):
            exported = exporter.load(directory, **options)
        return ExportedStage(self._plugin, exported)


class ExportedStage(Stage):
    """Answers from the files of an export, and checks the types of what is compared."""

    def __init__(self, plugin: str, exported: ExportedModel) -> None:
        super().__init__(plugin)
        self._exported = exported
        if lacking := [name for name in ("reader", "stop_ids", "prompt", "logits") if not hasattr(exported, name)]:
            raise self._refuse(f"load returned {type(exported).__name__}, which has no {' and no '.join(lacking)}")
        with self._attribute("the reader's name"):
            self.reader = str(exported.reader)
        with self._attribute("stop_ids"):
            self.stop_ids = frozenset(int(token_id) for token_id in exported.stop_ids)
        self.can_encode = hasattr(exported, "encode")

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        with self._attribute("prompt"):
            return [int(token_id) for token_id in self._exported.prompt(messages, tools)]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; only where `can_encode`."""
        exported: Any = self._exported
        with self._attribute("encode"):
            return [int(token_id) for token_id in exported.encode(text)]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        with self._attribute("logits"):
            logits_TV = self._exported.logits(token_ids)
        shape, dtype = tuple(getattr(logits_TV, "shape", ())), str(getattr(logits_TV, "dtype", None))
        if len(shape) != 2 or shape[0] != len(token_ids) or dtype != "torch.float32":
            got = f"{dtype} {list(shape)}" if shape else type(logits_TV).__name__
            raise self._refuse(
                f"logits of {len(token_ids)} tokens are {got}, expected torch.float32 [{len(token_ids)}, V]"
            )
        return logits_TV
