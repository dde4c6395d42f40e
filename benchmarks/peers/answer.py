"""What users run today for the loss of a language model's answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def full_logits(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """A causal language model's forward with labels: the head over all tokens, widened, -100 ignored."""
    logits = F.linear(hidden, weight).float()
    targets = _targets(hidden, positions, labels)
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED)


def liger(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """The same by Liger-Kernel, which makes the logits in chunks; it needs a GPU and the package."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    result: Tensor = loss(weight, hidden.flatten(0, 1), _targets(hidden, positions, labels))
    return result


def _targets(hidden: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Of all tokens, one after another."""
    targets = labels.new_full((hidden.shape[:-1].numel(),), IGNORED)
    targets[positions] = labels
    return targets


def gathered(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """The same of the supervised tokens alone, as one writes it by hand; autograd keeps the logits."""
    logits = F.linear(hidden.flatten(0, 1)[positions], weight).float()
    return F.cross_entropy(logits, labels)
