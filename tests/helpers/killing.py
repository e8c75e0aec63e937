"""Runs in processes of their own, which tests kill at any instant and resume.

A process that imports torch and transformers needs seconds; these are forked from one that has imported them already,
and then do what the command `sftx` does with the same arguments.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

_IMPORTED = (
    "torch",
    "datasets",
    "transformers.models.llama.modeling_llama",
    "sftx.cli.run",
    "sftx.data.pipeline",
    "sftx.trainer.self_checks",
    "sftx.trainer.session",
    "sftx_plugins.adapters.lora_layers",
    "sftx_plugins.metrics.exact_match",
    "sftx_plugins.losses.masked_ce",
    "sftx_plugins.collators.packed",
    "sftx_plugins.collators.padded",
    "sftx_plugins.observers.progress",
)
PATIENCE_S = 300.0
"""A run that takes longer than this many seconds is taken to hang."""


@dataclass(frozen=True)
class Case:
    """The arguments of a run, without the output directory. `{data}` stands for the directory of the rows."""

    name: str
    arguments: tuple[str, ...]

    def command(self, data: Path, model: Path, *more: str) -> list[str]:
        """Return the arguments of `sftx` that write to `out` in the current directory."""
        given = [argument.format(data=data) for argument in self.arguments]
        return ["run", "--model", str(model), "--output-dir", "out", *given, *more]


def case(name: str, text: str) -> Case:
    return Case(name, tuple(text.split()))


_COMMON = (
    "--plugin chatml --learning-rate 1e-2 --data {data}/train.jsonl --eval-data {data}/held.jsonl "
    "--gradient-accumulation-steps 2 --per-device-train-batch-size 2 --eval-steps 3 --save-steps 2 "
    "--save-total-limit 2 --max-steps 12 --max-new-tokens 6 --logging-steps 4 --max-dropped 0.2 "
)
CASES = (
    case(
        "padded",
        _COMMON + "--plugin lora --set lora.lora_dropout=0.2 --plugin exact-match --warmup-steps 3",
    ),
    case(
        "packed",
        _COMMON + "--plugin packed --set packed.length=96 --learning-rate 1e-3 --weight-decay 0.1",
    ),
    case(
        "streaming",
        _COMMON
        + "--plugin lora --set lora.lora_dropout=0.1 --plugin packed --set packed.length=96 --streaming "
        + "--plan-window 14 --data {data}/more.jsonl:0.5",
    ),
    case(
        "best",
        _COMMON
        + "--plugin lora --set lora.lora_dropout=0.2 --plugin exact-match --metric-for-best-model loss "
        + "--load-best-model-at-end --early-stopping-patience 2 --save-total-limit 1 "
        # So that step 4 is the best by 0.02, far beyond rounding, and the run stops at step 8.
        + "--learning-rate 0.05 --lr-scheduler-type constant --save-steps 3 --eval-steps 2",
    ),
)


def write_rows(directory: Path) -> None:
    """Write the rows of CASES: of unequal lengths, one of them dropped, and enough for a bit over two epochs."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for name, num in (("train", 21), ("more", 9), ("held", 5)):
        rows = [
            {"prompt": f"{name}: count to {n}", "completion": " ".join(words[: 1 + n * 7 % 10])} for n in range(num)
        ]
        if name == "train":
            rows[4]["completion"] = ""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _work(command: Sequence[str], directory: Path) -> None:
    """Run the command `sftx` in `directory`, with its output in files there. Called in the child process."""
    os.chdir(directory)
    for name, number in (("stdout.txt", 1), ("stderr.txt", 2)):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))

    import torch

    from sftx.cli import main

    torch.set_num_threads(1)
    main.main(args=list(command), prog_name="sftx")


@dataclass
class Process:
    """A run in progress in `directory`."""

    directory: Path
    child: BaseProcess
    begun: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """Return the exit code, or minus the signal that ended the process. Raises TimeoutError."""
        self.child.join(PATIENCE_S)
        if self.child.exitcode is None:
            self.child.kill()
            raise TimeoutError(f"still running after {PATIENCE_S:g} s: {self.directory}")
        return self.child.exitcode

    def until(self, true: Callable[[], bool]) -> bool:
        """Wait until `true()` holds; return False when the process ended before."""
        while self.child.is_alive():
            if true():
                return True
            if time.monotonic() - self.begun > PATIENCE_S:
                self.child.kill()
                raise TimeoutError(f"waited over {PATIENCE_S:g} s: {self.directory}")
            time.sleep(0.0005)
        return False

    def signal(self, number: int) -> None:
        if self.child.pid is not None and self.child.is_alive():
            os.kill(self.child.pid, number)

    @property
    def printed(self) -> str:
        """Everything that runs in this directory have printed so far."""
        return "".join((self.directory / name).read_text(encoding="utf-8") for name in ("stdout.txt", "stderr.txt"))


class Runs:
    """Starts runs of the tiny model on the rows of `write_rows`, and keeps undisturbed runs to compare with."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.root.mkdir(parents=True, exist_ok=True)
        write_rows(self.root)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_IMPORTED))
        self._undisturbed: dict[Case, tuple[Path, float]] = {}
        self._numbers: Iterator[int] = iter(range(1, 1_000_000))

    def directory(self, name: str) -> Path:
        path = self.root / f"{name}-{next(self._numbers)}"
        path.mkdir()
        return path

    def start(self, case: Case, directory: Path, *more: str) -> Process:
        command = case.command(self.root, self.model, *more)
        child = self._context.Process(target=_work, args=(command, directory), name=f"sftx-{case.name}")
        child.start()
        return Process(directory, child)

    def undisturbed(self, case: Case) -> tuple[Path, float]:
        """Return the directory of an undisturbed run, and the seconds from its first file to its end."""
        if case not in self._undisturbed:
            process = self.start(case, self.directory(f"{case.name}-undisturbed"))
            out = process.directory / "out"
            process.until(out.exists)
            begun = time.monotonic()
            code = process.wait()
            assert code == 0, f"{case.name} ended with {code}: {process.printed}"
            self._undisturbed[case] = out, time.monotonic() - begun
        return self._undisturbed[case]

    def killed(self, case: Case, rng: random.Random, number: int = signal.SIGKILL, kills: int = 1) -> Killed:
        """Kill a run `kills` times at random instants, resume it each time, and let it end."""
        _, seconds = self.undisturbed(case)
        directory = self.directory(case.name)
        story, codes = [], []
        more: tuple[str, ...] = ()
        for _ in range(kills):
            process = self.start(case, directory, *more)
            instant = _instant(directory, seconds, rng)
            story.append(instant.name)
            if instant.wait(process):
                process.signal(number)
            codes.append(process.wait())
            more = ("--resume",)
        process = self.start(case, directory, *more)
        codes.append(process.wait())
        return Killed(case, directory / "out", story, codes, process.printed)


@dataclass(frozen=True)
class Killed:
    """The result of a run that was killed and resumed."""

    case: Case
    output_dir: Path
    story: list[str]
    """The instants at which it was killed."""
    codes: list[int]
    """The exit codes of its processes, the last of which was undisturbed."""
    printed: str

    def remove(self) -> None:
        shutil.rmtree(self.output_dir.parent)


@dataclass(frozen=True)
class _Instant:
    name: str
    wait: Callable[[Process], bool]
    """Waits for the instant; returns False when the run ended before."""


def _instant(directory: Path, seconds: float, rng: random.Random) -> _Instant:
    """Draw an instant: one time in three during a save, one in ten before the first step, else anywhere in the run."""
    out, draw = directory / "out", rng.random()
    if draw < 1 / 3:
        which, delay = rng.randrange(1, 8), rng.choice((0.0, rng.uniform(0, 0.03)))
        saving = _Saving(out, is_saving=bool(_parts(out)))
        return _Instant(f"{1e3 * delay:.1f} ms into save {which}", lambda p: p.until(lambda: saving.seen(which, delay)))
    if draw < 1 / 3 + 1 / 10:
        delay = rng.uniform(0, 1.5)
        return _Instant(f"{delay:.3f} s after its start", lambda p: p.until(_after(delay)))
    delay = rng.uniform(0, 1.05 * seconds)

    def wait(process: Process) -> bool:
        lines = _size(out / "metrics.jsonl")
        return process.until(lambda: _size(out / "metrics.jsonl") != lines) and process.until(_after(delay))

    return _Instant(f"{delay:.3f} s after its first line", wait)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _after(seconds: float) -> Callable[[], bool]:
    """Return a function that tells whether `seconds` have passed since its first call."""
    begun: list[float] = []

    def passed() -> bool:
        begun.append(time.monotonic())
        return begun[-1] - begun[0] >= seconds

    return passed


def _parts(out: Path) -> list[Path]:
    """Return the directories and files that are being written."""
    return [path for place in (out, out / "checkpoints") for path in place.glob(".*.part")]


@dataclass
class _Saving:
    """Counts the artefacts and checkpoints whose writing has begun."""

    out: Path
    begun: int = 0
    at: float = 0.0
    is_saving: bool = False

    def seen(self, which: int, delay: float) -> bool:
        """Return whether the writing of number `which`, counted from 1, began `delay` seconds ago."""
        now = bool(_parts(self.out))
        if now and not self.is_saving:
            self.begun, self.at = self.begun + 1, time.monotonic()
        self.is_saving = now
        return self.begun >= which and time.monotonic() - self.at >= delay
