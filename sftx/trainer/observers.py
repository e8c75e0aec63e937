"""Events are handed to every observer; one that raises is named once and switched off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftx.assembly.entry_points import PluginInfo
from sftx.errors import one_line
from sftx.events import EvalReport, StartReport, StepReport
from sftx.types import Observer

log = logging.getLogger(__name__)


class Observers(Observer):
    """The observers of a run, as one that never raises."""

    def __init__(self, observers: Sequence[tuple[PluginInfo, Observer]]) -> None:
        self._observers = list(observers)

    def on_start(self, report: StartReport) -> None:
        self._tell(lambda observer: observer.on_start(report))

    def on_step(self, report: StepReport) -> None:
        self._tell(lambda observer: observer.on_step(report))

    def on_log(self, report: StepReport) -> None:
        self._tell(lambda observer: observer.on_log(report))

    def on_evaluate(self, report: EvalReport) -> None:
        self._tell(lambda observer: observer.on_evaluate(report))

    def on_save(self, step: int, directory: Path) -> None:
        self._tell(lambda observer: observer.on_save(step, directory))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._tell(lambda observer: observer.on_end(summary))

    def on_fail(self, error: BaseException) -> None:
        self._tell(lambda observer: observer.on_fail(error))

    def close(self) -> None:
        self._tell(lambda observer: observer.close())

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for pair in list(self._observers):
            info, observer = pair
            try:
                event(observer)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # sys.exit too
                self._observers.remove(pair)
                log.warning("%s failed and is switched off: %s: %s", info, type(error).__name__, one_line(error))
