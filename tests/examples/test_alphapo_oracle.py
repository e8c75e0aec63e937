"""The example sftx-alphapo compared with the AlphaPO of TRL's CPOTrainer: losses and gradients of given answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

ALPHAPO = Path(__file__).parents[2] / "examples" / "sftx-alphapo"


@pytest.mark.filterwarnings("ignore:.*[Ee]xperimental")
@pytest.mark.parametrize("alpha", [0.25, 1.5, -0.5, 0.0])
def test_losses_and_gradients_are_those_of_trl(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.nn.functional import logsigmoid
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    monkeypatch.syspath_prepend(ALPHAPO)
    from sftx_alphapo import AlphaPOLoss

    beta, gamma = 2.5, 1.3
    generator = torch.Generator().manual_seed(0)
    means_P2 = -3 * torch.rand(6, 2, generator=generator, dtype=torch.float64)
    options = {"alpha": alpha, "loss_type": "simpo", "beta": beta, "simpo_gamma": gamma, "label_smoothing": 0.0}
    trainer = SimpleNamespace(**options, accelerator=SimpleNamespace(device="cpu"))
    sides = []
    for compute in ("ours", "theirs"):
        log_probs_P2 = means_P2.clone().requires_grad_()
        if compute == "ours":
            rewards_P2 = AlphaPOLoss(alpha, beta, gamma).rewards(log_probs_P2)
            loss_P = -logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1] - gamma)
        else:
            loss_P, chosen_P, rejected_P = CPOTrainer.cpo_loss(trainer, *log_probs_P2.unbind(1))  # type: ignore[arg-type]
            rewards_P2 = torch.stack([chosen_P, rejected_P], 1)
        (gradient_P2,) = torch.autograd.grad(loss_P.sum(), log_probs_P2)
        sides.append((loss_P.detach(), rewards_P2.detach(), gradient_P2))
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
