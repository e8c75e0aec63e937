"""Measure how much longer `sftx --help` and `sftx plugins list` take beside many installed packages than without them.

The script writes `--packages` distributions, each with a plugin and a command, runs both commands `--repeat` times in
turn without and with them, and prints medians and their ratio: of wall time, and of CPU time (user and system), which
other processes of the machine disturb less.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

README = "A paragraph of a description as packages have it, of which a list shows nothing.\n\n" * 80


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_packages(Path(directory), arguments.packages)
        for command in (["--help"], ["plugins", "list"]):
            pairs = [(measure(command), measure(command, directory)) for _ in range(arguments.repeat)]
            for number, kind in enumerate(("wall", "CPU")):
                without, beside = (statistics.median(pair[side][number] for pair in pairs) for side in (0, 1))
                print(
                    f"sftx {' '.join(command)}: {kind} {without * 1e3:.0f} ms, with {arguments.packages} packages "
                    f"{beside * 1e3:.0f} ms, ratio {beside / without:.2f}"
                )
    return 0


def write_packages(site: Path, number: int) -> None:
    """Write the metadata of `number` distributions, and modules that fail when they are imported."""
    for n in range(number):
        (site / f"sftx_dummy_{n}.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
        info = site / f"sftx_dummy_{n}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.4\nName: sftx-dummy-{n}\nVersion: 1.0\nSummary: Number {n}.\n"
        (info / "METADATA").write_text(f"{head}\n{README}", encoding="utf-8")
        entries = f"[sftx.plugins]\np{n} = sftx_dummy_{n}:Plugin\n\n[sftx.commands]\nc{n} = sftx_dummy_{n}:command\n"
        (info / "entry_points.txt").write_text(entries, encoding="utf-8")


def measure(command: list[str], more_path: str = "") -> tuple[float, float]:
    """Run the command with one more entry on the path; return its wall and its CPU time in seconds."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), more_path]))
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-m", "sftx", *command], env=environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
