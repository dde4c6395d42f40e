"""The Yes/No answer of a language model: only supervised positions reach the vocabulary product."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rellax.errors import InputError
from rellax.ops._check import bad, can_read, check_positive, check_tensor, is_token
from rellax.ops.answer import LOSSES, answer_loss, check_choice, check_choice_labels, loss_denominator
from rellax.reference.answer import choices, select_rows


class Answers(NamedTuple):
    """Where the labels of a batch are predicted."""

    positions: Tensor  # (n,) int64 into the flattened tokens
    labels: Tensor  # (n,) int64, -100 = ignored
    first: Tensor  # (B,) int64, the entry of positions that is an instance's first; n where it has none


class AnswerHead(nn.Module):
    """Loss and [No, Yes] logits from hidden states and Hugging Face labels.

    The label at token t is predicted from the hidden state of token t - 1 of the same instance.

    Args:
        answer_ids: (no_id, yes_id), token ids of the two answers; None where only the vocab loss is needed.
        loss: "choice": binary cross-entropy over the two answers at the first label of each instance;
            "vocab": cross-entropy over the whole vocabulary at every label.
        softcap: c of logits = c · tanh(logits / c), or None.

    Raises:
        InputError: not two different token ids, an unknown loss, or a softcap that is no positive number.
    """

    def __init__(
        self, answer_ids: tuple[int, int] | None, loss: str = "choice", softcap: float | None = None
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise InputError(f"loss: expected one of {LOSSES}, got {loss!r}")
        if softcap is not None:
            check_positive("softcap", softcap)
        self.answer_ids = None if answer_ids is None else check_answer_ids(answer_ids)
        self.loss, self.softcap = loss, None if softcap is None else float(softcap)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        positions: Tensor | None = None,
        denominator: Tensor | float | None = None,
        base_logit: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, a scalar in fp32, and the logits (B, 2) of [No, Yes] at each instance's first label.

        The logits carry no gradient. An instance without a label has NaN logits. They are None where there
        are no `answer_ids`.

        Args:
            hidden: (B, L, d), or packed (1, T, d) with `cu_seqlens` (B + 1,) int32.
            labels: int64 in the shape of the tokens, -100 where nothing is supervised.
            lm_head_weight: (V, d).
            bias: (V,), or None.
            positions: (n,) int64, rising: where the labels are predicted, for who knows; see `find_answers`.
            denominator: a number of labels, perhaps of several batches, that the sum of losses is divided by;
                the choice loss takes the share of it that it reads of this batch's labels. None: the number
                of labels that are read.
            base_logit: (B,), added to the logit of Yes; for the choice loss alone.

        Raises:
            InputError: labels do not fit hidden, the choice loss has no `answer_ids`, or another loss has a
                `base_logit`.
        """
        if labels.shape != hidden.shape[:-1] or labels.device != hidden.device or not labels.shape[1]:
            raise bad("labels", f"shape {tuple(hidden.shape[:-1])}, L at least 1, on {hidden.device}", labels)
        if self.loss == "choice":
            self._require_answer_ids()
        elif base_logit is not None:
            raise InputError(f'base_logit: expected None with loss={self.loss!r}, or loss="choice"')
        answers = find_answers(labels, cu_seqlens, positions, first_only=self.loss == "choice")
        if denominator is not None and self.loss == "choice":
            read, given = ((each != -100).sum().clamp(min=1) for each in (answers.labels, labels[:, 1:]))
            denominator = loss_denominator(denominator, labels) * read / given
        if base_logit is not None:
            return self._boosted(hidden, answers, lm_head_weight, bias, denominator, base_logit)
        loss, logits = answer_loss(
            hidden.flatten(0, 1),
            lm_head_weight,
            answers.positions,
            answers.labels,
            choice_ids=self.answer_ids,
            loss=self.loss,
            bias=bias,
            softcap=self.softcap,
            denominator=denominator,
        )
        if self.answer_ids is None:
            return loss, None
        return loss, F.pad(logits, (0, 0, 0, 1), value=torch.nan)[answers.first]

    @torch.no_grad()
    def logits(
        self, hidden: Tensor, positions: Tensor, lm_head_weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The logits (n, 2) of [No, Yes] at `positions` (n,) of the flattened hidden states, in fp32."""
        self._require_answer_ids()
        ignored = torch.full_like(positions, -100)
        return answer_loss(
            hidden.flatten(0, 1),
            lm_head_weight,
            positions,
            ignored,
            choice_ids=self.answer_ids,
            bias=bias,
            softcap=self.softcap,
        )[1]

    def _boosted(
        self,
        hidden: Tensor,
        answers: Answers,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        denominator: Tensor | float | None,
        base_logit: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The choice loss with a base: B rows of `hidden` and two of the head are little to compute.

        Products and sums are elementwise: autocast leaves them in fp32.
        """
        assert self.answer_ids is not None, "`forward` has asked for them"
        check_choice(self.answer_ids, "choice", lm_head_weight.shape[0])
        if can_read(answers.labels):
            check_choice_labels(answers.labels, self.answer_ids)
        two, two_bias = select_rows(lm_head_weight, bias, self.answer_ids)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, lm_head_weight.dtype), torch.float32)
        rows = hidden.flatten(0, 1)[answers.positions].to(dtype)
        logits = (rows[:, None] * two.to(dtype)).sum(2)
        if two_bias is not None:
            logits = logits + two_bias.to(dtype)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = add_base(logits, base_logit)
        answered = answers.labels != -100
        chosen = choices(answers.labels, self.answer_ids)
        known = torch.where(chosen < 2, 1.0, torch.nan)[:, None]
        loss = F.cross_entropy(logits * known, chosen.clamp(max=1), reduction="sum")
        loss = loss / loss_denominator(denominator, answers.labels)
        return loss, logits.detach().where(answered[:, None], torch.nan)

    def _require_answer_ids(self) -> None:
        if self.answer_ids is None:
            raise InputError(
                "answer_ids: expected the token ids (no_id, yes_id) in CFLoRAConfig, got None; "
                "rellax.ctr.prompts.answer_ids(tokenizer) finds them"
            )

    def extra_repr(self) -> str:
        return f"answer_ids={self.answer_ids}, loss={self.loss!r}, softcap={self.softcap}"


def check_answer_ids(ids: Any) -> tuple[int, int]:
    """The two answers' tokens as integers of Python; an InputError for what is something else."""
    listed = isinstance(ids, (list, tuple)) and len(ids) == 2 and all(map(is_token, ids))
    if not listed or ids[0] == ids[1]:
        raise bad("answer_ids", "two different token ids (no_id, yes_id)", repr(ids))
    return int(ids[0]), int(ids[1])


def add_base(logits: Tensor, base_logit: Tensor) -> Tensor:
    """[No, Yes] logits (B, 2) with the log-odds `base_logit` (B,) that they begin from added to Yes's."""
    check_tensor("base_logit", base_logit, (logits.shape[0],), "(B,)", logits.device)
    return logits + F.pad(base_logit.to(logits.dtype)[:, None], (1, 0))


def find_answers(
    labels: Tensor, cu_seqlens: Tensor | None, positions: Tensor | None = None, *, first_only: bool
) -> Answers:
    """The positions that predict the labels (B, L), or packed (1, T): all of them, or one for each instance.

    With `first_only` the result's shapes depend on the shape of the batch alone: position i is that of
    instance i's first label, and the label is ignored (-100) where it has none. All labels of a batch on a
    GPU can be counted without waiting for it only where `positions` (n,) tells what would be found.
    """
    tokens, length = labels.numel(), labels.shape[1]
    token = torch.arange(tokens, device=labels.device)
    starts = token[::length].contiguous() if cu_seqlens is None else cu_seqlens[:-1].long()
    labels = labels.flatten()
    instance = torch.bucketize(token, starts, right=True) - 1
    supervised = (labels != -100) & (token != starts[instance])  # nothing predicts an instance's first token
    if positions is not None and can_read(positions):
        _check_positions(positions, supervised)
    first = starts.new_full(starts.shape, tokens, dtype=torch.int64)
    first = first.scatter_reduce(0, instance, token.where(supervised, tokens), "amin")
    if first_only:
        answered = first < tokens
        return Answers(
            positions=(first - 1).where(answered, 0),
            labels=labels[first.clamp(max=tokens - 1)].where(answered, -100),
            first=torch.arange(len(first), device=labels.device).where(answered, len(first)),
        )
    found = supervised.nonzero().squeeze(1) if positions is None else positions + 1
    return Answers(found - 1, labels[found], torch.searchsorted(found, first))


def _check_positions(positions: Tensor, supervised: Tensor) -> None:
    expected = supervised.nonzero().squeeze(1) - 1
    if not torch.equal(positions, expected):
        raise InputError(
            f"answer_positions: expected the tokens before the labels, {expected.tolist()}, "
            f"got {positions.tolist()}"
        )
