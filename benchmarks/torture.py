"""Kill runs at random times, also while they save, resume them, and compare their end with that of undisturbed runs.

Every byte must be equal except for measured times (sftx/verify/run_differences.py). `make torture N=50` kills 50 times
in all, in turn over the kinds of runs of tests/helpers/killing.py. A run is killed one to three times before it may
finish; one kill in five is a SIGTERM. A run that ends differently is printed with the seed that repeats its times, and
its directory is kept; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from killing import CASES, Killed, Runs  # noqa: E402
from sftx.verify.run_differences import differences  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=50, help="number of kills in all (50)")
    parser.add_argument(
        "--seed", type=int, default=time.time_ns() % 10**6, help="seed of the random times (by default from the clock)"
    )
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    from sftx.model.tiny import model_dir

    directory = Path(tempfile.mkdtemp(prefix="sftx-torture-"))
    runs = Runs(directory, model_dir())
    print(f"seed {options.seed}, runs in {directory}")
    kills, wrong = Counter[str](), 0
    number = 0
    while kills.total() < options.kills:
        case = CASES[number % len(CASES)]
        rng = random.Random(f"{options.seed} {number}")
        by = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
        killed = runs.killed(case, rng, by, kills=min(rng.randint(1, 3), options.kills - kills.total()))
        problems = _problems(killed, runs.undisturbed(case)[0])
        kills[case.name] += len(killed.story)
        wrong += bool(problems)
        print(
            f"{number:4} {case.name:10} {by.name:8} {'; '.join(killed.story)}: {'WRONG' if problems else 'the same'}",
            flush=True,
        )
        for problem in problems:
            print(f"       {problem}")
        if not problems:
            killed.remove()
        number += 1
    print(", ".join(f"{name} {count}" for name, count in kills.items()))
    print(f"{kills.total()} kills in {number} runs; {wrong} runs ended differently from an undisturbed one")
    if not wrong:
        shutil.rmtree(directory)
    return int(wrong > 0)


def _problems(killed: Killed, undisturbed: Path) -> list[str]:
    """Return how the end of a killed run differs from that of an undisturbed one."""
    if killed.codes[-1] != 0:
        return [f"exit codes {killed.codes}: {killed.printed[-500:]}"]
    found = differences(undisturbed, killed.output_dir)
    # SIGTERM makes a run save a checkpoint, which may replace another one of the checkpoints it keeps.
    is_stopped = any(code == 128 + signal.SIGTERM for code in killed.codes)
    return [line for line in found if not (is_stopped and line.startswith("checkpoints/") and ": only in " in line)]


if __name__ == "__main__":
    sys.exit(main())
