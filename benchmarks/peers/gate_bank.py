"""How gates are predicted today: one small multi-layer perceptron per adapted projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallMLPs(nn.Module):
    """LayerNorm, Linear, GELU, Linear, M times, as published; each is called with the same u (B, d_u)."""

    def __init__(self, projections: int, rank: int, d_u: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank = rank
        hidden, outputs = 2 * rank * rank, rank * rank
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(d_u), nn.Linear(d_u, hidden), nn.GELU(), nn.Linear(hidden, outputs)
            ).to(dtype)
            for _ in range(projections)
        )

    def forward(self, u: Tensor) -> list[Tensor]:
        return [mlp(u).view(len(u), self.rank, self.rank) for mlp in self.mlps]


class StackedMLPs(nn.Module):
    """The same by torch's batched products over stacked weights."""

    def __init__(self, projections: int, rank: int, d_u: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank = rank
        hidden, outputs = 2 * rank * rank, rank * rank

        def stacked(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(projections, *sizes, dtype=dtype) * 0.1)

        self.ln_weight, self.ln_bias = stacked(1, d_u), stacked(1, d_u)
        self.w1, self.b1 = stacked(d_u, hidden), stacked(1, hidden)
        self.w2, self.b2 = stacked(hidden, outputs), stacked(1, outputs)

    def forward(self, u: Tensor) -> list[Tensor]:
        normed = nn.functional.layer_norm(u, u.shape[1:]) * self.ln_weight + self.ln_bias
        hidden = nn.functional.gelu(torch.baddbmm(self.b1, normed, self.w1))
        gates = torch.baddbmm(self.b2, hidden, self.w2)
        return list(gates.unflatten(-1, (self.rank, self.rank)).unbind())
