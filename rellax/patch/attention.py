"""Attention over a packed batch, one segment after another.

transformers gives SDPA a mask of T x T for a packed batch, and so does B times the work of a padded one. A
model that was loaded with SDPA gets this implementation instead. On a GPU all segments are one call of the
flash attention that torch carries; on a CPU each segment is a call of its own, as fast as if it stood alone,
and in bfloat16 the backward pass is one of this module's, of plain products: torch's takes twice as long for
prompts of a few hundred tokens. A batch that is not packed goes to transformers' SDPA.

What is imported of transformers here loads its models' code, and torch's flash attention loads its compiler:
only a call does that, no import of rellax.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "rellax_sdpa"
_QUERIES = 192
"""So many queries of each head take part in a product: their scores stay in the cache."""
_varlen_attn: Any = None
"""torch's flash attention, found by `register`: a compiler that traces a call must not meet the import."""


def register() -> None:
    """Let transformers find this attention by its name."""
    global _varlen_attn
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, segment_sdpa)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _varlen_attn = _find_varlen_attn()


def adopt(config: Any) -> None:
    """Make a model's attention this one, if it is transformers' SDPA."""
    register()
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME


def release(config: Any) -> None:
    """Undo `adopt`."""
    if config._attn_implementation == NAME:
        config._attn_implementation = "sdpa"


def segment_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it.

    Args:
        query, key, value: (B, heads, L, size); packed (1, heads, T, size). Keys may have fewer heads.
        attention_mask: of no account for a packed batch.
        sliding_window: how many tokens a token sees, itself included; None: all before it.
        cu_seq_lens_q: (B + 1,) int32, the offsets of a packed batch; None where it is not packed.
        max_length_q: the longest segment.

    Returns:
        (B, L, heads, size), and no attention weights.
    """
    if cu_seq_lens_q is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if _takes_flash(query) and query.shape[-1] <= 256 and max_length_q is not None and not dropout:
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        out = _varlen_attn(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            enable_gqa=True,
        )
        assert isinstance(out, Tensor), "no logarithms of sums were asked for"
        return out.unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _Segments.apply(query, key, value, lengths, scaling, sliding_window), None
    return _each_segment(query, key, value, lengths, dropout, scaling, sliding_window), None


def _each_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """(1, T, heads, size), by a call of SDPA for each segment."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        mask = _band(q, window)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


class _Segments(torch.autograd.Function):
    """`_each_segment`, with a backward pass of plain products.

    For a block of queries Q that sees keys K and values V, with P = softmax(s Q Kᵀ) and O = P V,

        dV = Pᵀ dO        dS = P ⊙ (dO Vᵀ - rowsum(O ⊙ dO))        dQ = s dS K        dK = s dSᵀ Q

    P is computed again, from scores in fp32. Queries of heads that share keys go through one product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        scale: float,
        window: int | None,
    ) -> Tensor:
        out = _each_segment(query, key, value, lengths, 0.0, scale, window)
        ctx.save_for_backward(query, key, value, out)
        ctx.options = lengths, scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        lengths, scale, window = ctx.options
        heads, tokens, size = key.shape[1:]
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        inner = (out.to(wide) * dout).sum(-1).squeeze(0).t()  # rowsum(O ⊙ dO), (heads, T)
        dout = dout.transpose(1, 2)
        dquery = torch.empty_like(query)
        dkey, dvalue = (key.new_zeros((heads, tokens, size), dtype=wide) for _ in range(2))
        for rows, seen in _blocks(lengths, window):
            count = rows.stop - rows.start
            k, v = key[0, :, seen], value[0, :, seen]
            q, dy, delta = (
                x[:, rows].reshape(heads, -1, x.shape[-1]) for x in (query[0], dout[0], inner.unsqueeze(-1))
            )
            scores = torch.bmm(q.to(wide) * scale, k.to(wide).mT)
            scores.view(-1, count, k.shape[1]).add_(_hidden(rows, seen, window))
            weights = scores.softmax(-1)
            dscores = (torch.bmm(dy, v.mT) - delta).mul_(weights).to(dtype)
            dquery[0, :, rows] = torch.bmm(dscores, k).mul_(scale).view(-1, count, size)
            dkey[:, seen] += torch.bmm(dscores.mT, q)
            dvalue[:, seen] += torch.bmm(weights.to(dtype).mT, dy)
        return dquery, dkey.mul_(scale).to(dtype)[None], dvalue.to(dtype)[None], None, None, None


def _blocks(lengths: Sequence[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries of a packed batch, and the keys that they see."""
    for start, end in pairwise(accumulate(lengths, initial=0)):
        for row in range(start, end, _QUERIES):
            last = min(row + _QUERIES, end)
            yield slice(row, last), slice(start if window is None else max(start, row + 1 - window), last)


def _hidden(rows: slice, seen: slice, window: int | None) -> Tensor:
    """What is added to scores: -inf where a query must not see a key."""
    query, key = torch.arange(rows.start, rows.stop)[:, None], torch.arange(seen.start, seen.stop)
    hidden = key > query if window is None else (key > query) | (key <= query - window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def runs_by_segment(config: Any, weight: Tensor) -> bool:
    """Whether `segment_sdpa` takes a packed batch of a model with weights like this.

    Where a graph is traced the host does not know the segments' lengths; flash attention alone needs none.
    """
    return config._attn_implementation == NAME and (not torch.compiler.is_compiling() or _takes_flash(weight))


def packing_pays(config: Any, weight: Tensor) -> bool:
    """Whether a model with weights like this is no slower on a packed batch than on a padded one."""
    if "flash" in config._attn_implementation:
        return True
    return config._attn_implementation == NAME and (weight.device.type == "cpu" or _takes_flash(weight))


def _band(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """What each token sees where that is not all before it, (L, L) bool."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return ones.tril().triu(1 - sliding_window)


def _find_varlen_attn() -> Any:
    """torch's flash attention over segments; None where this version has none, or none with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    return varlen_attn if "enable_gqa" in parameters else _for_each_head(varlen_attn)


def _for_each_head(varlen_attn: Any) -> Any:
    """Flash attention whose heads have keys of their own, for those that share some: torch before 2.12."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool, **options: Any
    ) -> Any:
        shared = query.shape[1] // key.shape[1]
        if enable_gqa and shared > 1:
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
        return varlen_attn(query, key, value, *args, **options)

    return attend


def _takes_flash(x: Tensor) -> bool:
    if _varlen_attn is None or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)
