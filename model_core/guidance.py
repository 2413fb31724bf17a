"""Classifier guidance (paper, Section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model_core.classifier import Classifier


def classifier_gradient(classifier: Classifier, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Gradient of log p(y | x_t) with respect to x_t.

    Parameters get no gradient (their graph is not built, as long as they do not require one) and no
    activation is recomputed.

    Args:
        classifier: in eval mode, its parameters with ``requires_grad`` off.
        x_t: (B, C, H, W) float32.
        t: (B,) timesteps as the network is shown them.
        label: (B,) int64.

    Returns:
        (B, C, H, W) float32.
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        log_p = F.log_softmax(classifier(x, t).float(), dim=-1)
        selected = log_p.gather(1, label[:, None]).sum()
        (gradient,) = torch.autograd.grad(selected, x)
    return gradient
