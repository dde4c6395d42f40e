"""The hypernetwork that turns an instance embedding into the gates of every adapted projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.ops._check import bad, check_count, is_strided
from rellax.ops.gate_bank import gate_bank

INTERACTIONS = ("full", "diagonal")
GATE_INITS = ("identity", "kaiming")


class GateBank(nn.Module):
    """G_m = reshape(W2_m GELU(W1_m LN_m(u) + b1_m) + b2_m) for all M projections at once (ReLLaX).

    Args:
        num_projections: M, the number of adapted projections.
        rank: r of the low-rank updates.
        cond_dim: d_u, the size of an instance embedding.
        interaction: "full": G is r x r; "diagonal": only its diagonal is predicted.
        gate_init: "identity": every G starts as exactly I (W2 = 0, b2 = vec(I)), so the model starts as plain
            LoRA; "kaiming": as published, Kaiming weights and zero biases.

    Raises:
        InputError: a size is no whole number above 0, or `interaction` or `gate_init` is unknown.
    """

    def __init__(
        self,
        num_projections: int,
        rank: int,
        cond_dim: int,
        interaction: str = "full",
        gate_init: str = "identity",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_projections", num_projections), ("rank", rank), ("cond_dim", cond_dim)):
            check_count(name, size)
        if interaction not in INTERACTIONS:
            raise InputError(f"interaction: expected one of {INTERACTIONS}, got {interaction!r}")
        if gate_init not in GATE_INITS:
            raise InputError(f"gate_init: expected one of {GATE_INITS}, got {gate_init!r}")
        self.rank, self.cond_dim = rank, cond_dim = int(rank), int(cond_dim)
        self.interaction, self.gate_init = interaction, gate_init
        hidden = 2 * rank * rank
        outputs = rank * rank if interaction == "full" else rank

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_projections, *shape, device=device, dtype=dtype))

        self.ln_weight, self.ln_bias = parameter(cond_dim), parameter(cond_dim)
        self.w1, self.b1 = parameter(hidden, cond_dim), parameter(hidden)
        self.w2, self.b2 = parameter(outputs, hidden), parameter(outputs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value."""
        self.ln_weight.fill_(1.0)
        for zero in (self.ln_bias, self.b1, self.b2):
            zero.zero_()
        for weights in (self.w1, self.w2):
            for weight in weights:  # one matrix at a time: the fan of a stack is not the fan of its matrices
                nn.init.kaiming_uniform_(weight, nonlinearity="relu")
        if self.gate_init == "identity":
            self.w2.zero_()
            identity = torch.eye(self.rank) if self.interaction == "full" else torch.ones(self.rank)
            self.b2.copy_(identity.flatten())

    def forward(self, u: Tensor) -> Tensor:
        """The gates (M, B, r, r) of the instance embeddings u (B, d_u).

        Raises:
            InputError: u is not (B, d_u).
        """
        if not is_strided(u) or u.dim() != 2 or u.shape[1] != self.cond_dim or u.device != self.w1.device:
            expected = f"shape (B, cond_dim = {self.cond_dim}) on {self.w1.device}"
            raise bad("instance_embed", expected, u)
        u = u.to(self.w1.dtype)
        return gate_bank(u, self.ln_weight, self.ln_bias, self.w1, self.b1, self.w2, self.b2)

    def extra_repr(self) -> str:
        return (
            f"num_projections={self.w1.shape[0]}, rank={self.rank}, cond_dim={self.cond_dim}, "
            f"interaction={self.interaction!r}, gate_init={self.gate_init!r}"
        )
