"""Build the sdist, and from it the wheel, of the last commit: `make dist`.

The tree is that of `git archive`, so that nothing that lies about is packed. Names are sorted, and times are the
commit's, so that two builds of a commit by the same versions of `build` and setuptools are the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--no-isolation", action="store_true", help="build with the setuptools of this environment")
    arguments = parser.parse_args()
    options = ["--no-isolation"] if arguments.no_isolation else []
    arguments.out.mkdir(parents=True, exist_ok=True)
    time = int(git("log", "-1", "--format=%ct"))
    os.umask(0o022)  # the wheel keeps the modes of files
    with tempfile.TemporaryDirectory() as directory:
        tree, built, source = (Path(directory) / name for name in ("tree", "built", "source"))
        unpack(git("archive", "--format=tar", "HEAD"), tree)
        build("--sdist", *options, "--outdir", str(built), str(tree), time=time)
        (sdist,) = built.iterdir()
        content = normalised(sdist, time)
        (arguments.out / sdist.name).write_bytes(gzip.compress(content, mtime=time))
        unpack(content, source)
        (root,) = source.iterdir()
        build("--wheel", *options, "--outdir", str(arguments.out), str(root), time=time)
    for file in sorted(arguments.out.iterdir()):
        print(f"{file.name}  {file.stat().st_size:,} bytes")


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def unpack(content: bytes, directory: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(directory, filter="data")


def build(*arguments: str, time: int) -> None:
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(time)}
    # Its output tells every file; setuptools' warnings and errors stay.
    subprocess.run([sys.executable, "-m", "build", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


def normalised(sdist: Path, time: int) -> bytes:
    """Return the archive within `sdist` without what differs between two builds; setuptools writes the time of each."""
    content = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as new:
        for entry in sorted(old.getmembers(), key=lambda entry: entry.name):
            entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname = time, 0, 0, "", ""
            entry.mode, entry.pax_headers = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644, {}
            new.addfile(entry, old.extractfile(entry) if entry.isfile() else None)
    return content.getvalue()


if __name__ == "__main__":
    main()
