"""Peak resident memory of one provider on one case, in a process of its own: `python -m sftx_kernels.bench.rss`.

The allocator's bytes leave out what libraries take by themselves (packed operands, threads' scratch); this has it.
Linux only: the high-water mark is reset through /proc/self/clear_refs and read from /proc/self/status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from sftx_kernels.bench.cases import Case, shape_entry, shape_from
from sftx_kernels.bench.measure import Run
from sftx_kernels.bench.peers import providers_of
from sftx_kernels.bench.problems import make_problem
from sftx_kernels.bench.providers import Provider

_TIMEOUT_S: Final = 600
_CPU: Final = torch.device("cpu")


def peak_rss_bytes(case: Case, provider: Provider) -> int:
    """What one forward and backward add to the resident set at their peak, on a CPU.

    Raises:
        RuntimeError: the process failed; the last line of what it said.
    """
    request = {
        "shape": shape_entry(case.shape),
        "dtype": case.dtype,
        "mask": case.mask,
        "provider": provider.name,
        "threads": torch.get_num_threads(),
    }
    # Where this package lies on a path that was only set in this process, the other has to be told.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sftx_kernels.bench.rss", json.dumps(request)],
            capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=environment,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"peak RSS: no answer within {_TIMEOUT_S} s") from error
    if done.returncode:
        raise RuntimeError(f"peak RSS: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(done.stdout.split()[-1])


def _measure(case: Case, provider: Provider) -> int:
    # First a small case of the same operation, which loads libraries and starts threads.
    small = replace(case, shape=replace(case.shape, rows=min(64, case.shape.rows)))
    peak = 0
    for one in (small, case):
        problem = make_problem(one, _CPU)
        run = Run(provider, provider.prepare(problem), problem)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run.first_call()
        peak = _status_bytes("VmHWM") - before
    return max(0, peak)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _main(request: str) -> None:
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    case = Case(shape_from(asked["shape"], "rss"), asked["dtype"], asked["mask"])
    (provider,) = providers_of(case.op, (asked["provider"],))
    print(_measure(case, provider))


if __name__ == "__main__":
    _main(sys.argv[1])
