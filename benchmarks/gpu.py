"""The program of `make gpu`, for a machine with a GPU, torch, triton and, if installed, pytest.

It runs the tests of the kernels on the device, then the whole bench, and writes tests.txt, bench.json, bench.csv and a
picture for each operation to benchmarks/results/<device>/, or --out. Peers that are not installed are listed as absent.
The bench also runs if tests fail; the exit code is 0 if both succeed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels", "tests/gpu")
TESTS_SHARE = 0.4  # of the budget, at most
RESERVE_S = 45.0  # for the case that is running when the budget ends, and for the pictures


def main() -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all")
    parser.add_argument("--shapes", type=Path, help="a shapes file of sftx bench, instead of the default shapes")
    parser.add_argument("--out", type=Path, help="a directory for the results")
    parser.add_argument("--no-tests", action="store_true", help="run the bench only")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "kernels"))

    import torch

    from sftx_kernels.bench import BenchError, runner
    from sftx_kernels.bench.devices import device_name, slug

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; for a rehearsal, benchmarks/gpu.py --device cpu", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / "benchmarks" / "results" / slug(device_name(device))
    out.mkdir(parents=True, exist_ok=True)
    tests_passed = arguments.no_tests or _run_tests(out / "tests.txt", TESTS_SHARE * arguments.budget)
    left_s = arguments.budget - RESERVE_S - (time.monotonic() - start)
    options = runner.Options(
        device=arguments.device,
        shapes=arguments.shapes,
        json=out / "bench.json",
        csv=out / "bench.csv",
        plot=out,
        budget_s=max(1.0, left_s),
    )
    try:
        code = runner.run(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        code = 1
    tests = "not run" if arguments.no_tests else "passed" if tests_passed else "FAILED, see tests.txt"
    print(f"\ntests {tests}, ", end="")
    print(f"bench {'done' if code == 0 else 'FAILED'}, {time.monotonic() - start:.0f} s; results in {out}")
    return 0 if tests_passed and code == 0 else 1


def _run_tests(log: Path, timeout_s: float) -> bool:
    """Run the tests of the kernels and write their output to `log`; return True if they pass within the timeout."""
    if importlib.util.find_spec("pytest") is None:
        log.write_text("pytest is not installed\n", encoding="utf-8")
        print("tests: pytest is not installed, so they did not run")
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += [path for path in TESTS if (ROOT / path).exists()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {timeout_s:.0f} s\n")
            code = 1
    print("tests:", *log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:], sep="\n  ")
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
