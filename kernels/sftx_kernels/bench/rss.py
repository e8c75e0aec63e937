"""`python -m sftx_kernels.bench.rss` measures the peak resident memory of one provider on one case.

Unlike the allocator's peak it includes memory that libraries allocate themselves (packed operands, threads' scratch).
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

from sftx_kernels.bench.cases import Case, Provider, make_problem
from sftx_kernels.bench.measure import Run
from sftx_kernels.bench.operations import providers_of, shape_entry, shape_from

_TIMEOUT_S: Final = 600
_CPU: Final = torch.device("cpu")


def peak_rss_bytes(case: Case, provider: Provider) -> int:
    """Return by how much one forward and backward raise the peak of the resident set, on a CPU.

    Raises:
        RuntimeError: the process failed; the message is the last line of its stderr.
    """
    request = {
        "shape": shape_entry(case.shape),
        "dtype": case.dtype,
        "mask": case.mask,
        "provider": provider.name,
        "threads": torch.get_num_threads(),
    }
    # This process may have found this package on a path that was only set here.
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
    # A small case of the same operation first loads libraries and starts threads.
    small = replace(case, shape=replace(case.shape, rows=min(64, case.shape.rows)))
    peak = 0
    for measured in (small, case):
        problem = make_problem(measured, _CPU)
        run = Run(provider, provider.prepare(problem), problem)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        run.first_call()
        peak = _status_bytes("VmHWM") - before
    return max(0, peak)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _main(request_json: str) -> None:
    request = json.loads(request_json)
    torch.set_num_threads(request["threads"])
    case = Case(shape_from(request["shape"], "rss"), request["dtype"], request["mask"])
    (provider,) = providers_of(case.op, (request["provider"],))
    print(_measure(case, provider))


if __name__ == "__main__":
    _main(sys.argv[1])
