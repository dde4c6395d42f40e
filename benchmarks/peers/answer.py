"""What users run today for the loss of a language model's answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def full_logits(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """A causal language model's forward with labels: the head over all tokens, widened, -100 ignored."""
    logits = F.linear(hidden, weight).float()
    targets = labels.new_full(hidden.shape[:-1], IGNORED)
    targets.view(-1)[positions] = labels
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def gathered(hidden: Tensor, weight: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """The same of the supervised tokens alone, as one writes it by hand; autograd keeps the logits."""
    logits = F.linear(hidden.flatten(0, 1)[positions], weight).float()
    return F.cross_entropy(logits, labels)
