"""The numbers of a run: their dtypes, float16 with its loss scale, and TF32."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optimizing import optimizer_stage
from sftx.config.options import TrainConfig
from sftx.errors import ConfigError, TrainingError
from sftx.trainer import precision
from trainers import batches_of, small_model, trainer_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "frozen", "trained", "shown"),
    [
        ({}, torch.float32, torch.float32, "float32"),
        ({"bf16": True}, torch.bfloat16, torch.float32, "bfloat16 (autocast)"),
        ({"fp16": True}, torch.float16, torch.float32, "float16 (autocast, loss scaled)"),
        ({"optim": "adamw_bf16"}, torch.bfloat16, torch.bfloat16, "bfloat16 (autocast, no fp32 copy of weights)"),
        ({"tf32": True}, torch.float32, torch.float32, "float32"),
    ],
)
def test_options_become_dtypes(options: dict[str, object], frozen: object, trained: object, shown: str) -> None:
    config = TrainConfig(use_cpu=True, **options)  # type: ignore[arg-type]
    chosen = precision.choose(config, bf16_weights=optimizer_stage(config).bf16_weights)
    assert chosen.base_dtype(frozen=True) == frozen
    assert chosen.base_dtype(frozen=False) == trained
    assert str(chosen) == shown


@pytest.mark.parametrize(
    ("has_bf16", "is_faster", "asks", "dtype", "reason"),
    [
        (True, True, None, torch.bfloat16, "which this CPU has instructions for"),
        (True, True, "0", torch.float32, "as SFTX_BF16=0 asks for"),
        (True, False, None, torch.float32, "which this CPU multiplies faster than bfloat16"),
        (False, False, None, torch.float32, "as this CPU has no instructions for bfloat16"),
    ],
)
def test_the_default_follows_what_the_processor_multiplies_fast(
    has_bf16: bool, is_faster: bool, asks: str | None, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(precision, "bf16_is_faster", lambda: is_faster)
    monkeypatch.delenv("SFTX_BF16")
    if asks is not None:
        monkeypatch.setenv("SFTX_BF16", asks)
    chosen = precision.choose(TrainConfig(use_cpu=True))
    assert (chosen.dtype, chosen.reason) == (dtype, reason)
    options = [({"bf16": True}, torch.bfloat16), ({"bf16": False}, torch.float32), ({"fp16": True}, torch.float16)]
    for option, asked in options:
        chosen = precision.choose(TrainConfig(use_cpu=True, **option))
        assert (chosen.dtype, chosen.reason) == (asked, "")


def test_another_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_BF16", "false")
    with pytest.raises(ConfigError, match=r"SFTX_BF16=false: expected 0, .* `--no-bf16` choose for one run"):
        precision.choose(TrainConfig(use_cpu=True))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads the flags of the processor")
def test_instructions_are_those_that_the_system_names() -> None:
    flags = Path("/proc/cpuinfo").read_text()
    assert precision._cpu_has_bf16() == any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))


@pytest.mark.skipif(not hasattr(torch.cpu, "_is_amx_tile_supported"), reason="no x86")
@pytest.mark.parametrize(
    ("maker", "has_amx", "is_faster"),
    [("AuthenticAMD", False, True), ("GenuineIntel", True, True), ("GenuineIntel", False, False)],
)
def test_bfloat16_without_amx_is_slow_on_intel(
    maker: str, has_amx: bool, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(precision, "_is_arm", lambda: False)
    monkeypatch.setattr(precision, "_description_of_cpu", lambda: f"vendor_id : {maker}")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert precision.bf16_is_faster.__wrapped__() == is_faster


@pytest.mark.parametrize("options", [{"fp16": True}, {"bf16": False}])
def test_weights_in_bfloat16_need_it(options: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match=r"adamw_bf16 keeps weights in bfloat16, which (fp16|bf16: false) excludes"):
        precision.choose(TrainConfig(use_cpu=True, optim="adamw_bf16", **options), bf16_weights=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_float16_trains_as_float32_does(model: Path, packed: bool, lora: bool) -> None:
    wide = trainer_of(model, packed=packed, lora=lora, dropout=0.1)
    narrow = trainer_of(model, packed=packed, lora=lora, dropout=0.1, fp16=True)
    assert all(p.dtype == torch.float32 for p in narrow.parameters)
    for number in range(1, 5):
        batches = batches_of(wide, number)
        right, got = wide.train_step(number, 0, batches), narrow.train_step(number, 0, batches)
        assert got.loss == pytest.approx(right.loss, rel=1e-3)
        assert got.grad_norm == pytest.approx(right.grad_norm, rel=1e-2), "of gradients without the loss scale"
        assert got.metrics["loss_scale"] == 2**16
        assert "loss_scale" not in right.metrics


def test_an_overflow_costs_no_row(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A scale that is far too large: the step is made again at a smaller one, and is what it would have been."""
    straight, forced = (trainer_of(model, dropout=0.1, fp16=True) for _ in range(2))
    forced.scaler.load_state_dict(forced.scaler.state_dict() | {"scale": 2.0**32, "_growth_tracker": 7})
    batches = batches_of(straight)
    with caplog.at_level(logging.INFO, "sftx"):
        got = forced.train_step(1, 0, batches)
    retries = [record.getMessage() for record in caplog.records if "overflowed" in record.getMessage()]
    scale = got.metrics["loss_scale"]
    assert 1 <= scale < 2**32
    assert len(retries) == round(math.log2(2**32 / scale))
    assert retries[0] == (f"step 1: gradients overflowed at a loss scale of {2.0**32:g}; computed again at {2.0**31:g}")
    straight.scaler.load_state_dict(straight.scaler.state_dict() | {"scale": scale})
    right = straight.train_step(1, 0, batches)
    assert (got.loss, got.grad_norm) == (right.loss, right.grad_norm)
    for one, other in zip(forced.parameters, straight.parameters, strict=True):
        assert torch.equal(one, other), "powers of two: the update does not depend on how the scale was found"


def test_what_no_scale_helps_is_an_error_that_names_the_rows(model: Path) -> None:
    trainer = trainer_of(model, fp16=True)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match=r"step 1: .* no update was made; rows: row 0, row 1, row 2, row 3;"):
        trainer.train_step(1, 0, batches_of(trainer))
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.parameters, strict=True))


def test_a_loss_that_is_not_finite_is_an_error_at_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(model, fp16=True)
    trainer.lm.model.get_decoder().norm.weight.data.fill_(math.nan)
    with caplog.at_level(logging.INFO, "sftx"), pytest.raises(TrainingError, match="the loss is nan"):
        trainer.train_step(1, 0, batches_of(trainer))
    assert not caplog.records


def test_the_scale_goes_on_where_it_was(model: Path) -> None:
    whole, resumed = (trainer_of(model, fp16=True) for _ in range(2))
    for trainer in (whole, resumed):
        trainer.scaler.set_growth_interval(3)
    for number in (1, 2):
        whole.train_step(number, 0, batches_of(whole, number))
    resumed.load_state_dict(*whole.state_dict())
    with torch.no_grad():
        for one, other in zip(resumed.parameters, whole.parameters, strict=True):
            one.copy_(other)
    for number in (3, 4):
        batches = batches_of(whole, number)
        expected, got = whole.train_step(number, 0, batches), resumed.train_step(number, 0, batches)
        assert (got.loss, got.grad_norm, got.metrics) == (expected.loss, expected.grad_norm, expected.metrics)
    assert got.metrics["loss_scale"] == 2**17, "grown after the third step"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))


def test_the_peak_is_this_process_s_own() -> None:
    """A notebook or a test runner with gigabytes starts a run; getrusage() would tell of theirs."""
    ours = "import torch; from sftx.trainer.precision import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    parent = f"import subprocess, sys; held = bytearray(2 * 10**9); subprocess.run([sys.executable, '-c', {ours!r}])"
    told = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, timeout=120)
    assert 10**8 < int(told.stdout) < 10**9
