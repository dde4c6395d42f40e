"""Item texts to embeddings: the mean of a language model's last hidden states over an item's own tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rellax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def embed_items(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> Tensor:
    """Embed every text as the mean of its tokens' last hidden states: no template, special tokens or padding.

    The model runs in the dtype and on the device it has. Texts of like length share a batch, so that little
    is padded; which ones do changes the result by rounding alone.

    Args:
        texts: N texts of at least one token each.
        model: any model with hidden states, or its body; of an encoder and decoder the encoder is used.
        tokenizer: the one it was trained with.
        batch_tokens: at most this many tokens, padding included, run at once (one text always does).
        progress: show a bar.

    Returns:
        (N, d) fp32 on the CPU, in the order of `texts`.

    Raises:
        InputError: a text has no token, or more of them than the model has positions for.
    """
    tokens = _tokenise(texts, tokenizer)
    check_lengths(np.array([len(ids) for ids in tokens]), model.config)
    embeddings = torch.empty((len(texts), model.config.get_text_config().hidden_size))
    with _evaluating(model), tqdm(total=len(texts), desc="embed", unit="item", disable=not progress) as bar:
        for batch in _batches(tokens, batch_tokens):
            embeddings[batch] = _mean_hidden_states([tokens[i] for i in batch], model)
            bar.update(len(batch))
    return embeddings


def token_lengths(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """How many tokens :func:`embed_items` makes of each text, (N,) int32."""
    parts = (texts[start : start + _TEXTS] for start in range(0, len(texts), _TEXTS))
    return np.fromiter((len(ids) for part in parts for ids in _tokenise(part, tokenizer)), np.int32)


def check_lengths(lengths: np.ndarray, config: object, ids: Sequence[str] | None = None) -> None:
    """Raise unless all texts, of these numbers of tokens, have a token and fit a model of this configuration.

    Args:
        ids: of the items, for the error; None has their numbers.

    Raises:
        InputError: names the first that does not.
    """
    longest = getattr(config, "max_position_embeddings", None)
    names = range(len(lengths)) if ids is None else ids
    if not lengths.all():
        item = int(np.argmin(lengths))
        raise InputError(f"texts: expected at least one token each, got none for item {names[item]!r}")
    if longest is not None and (lengths > longest).any():
        item = int(np.argmax(lengths > longest))
        raise InputError(
            f"texts: expected at most {longest} tokens each, got {lengths[item]} for item {names[item]!r}; "
            "shorten its text in the data"
        )


_TEXTS = 1 << 14
"""Texts whose tokens are held at once where only their number is wanted."""


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _batches(tokens: Sequence[Sequence[int]], batch_tokens: int) -> list[list[int]]:
    """Indices by falling length, cut where the padded batch would hold more than `batch_tokens`."""
    batches: list[list[int]] = []
    for index in sorted(range(len(tokens)), key=lambda i: len(tokens[i]), reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(tokens[batches[-1][0]]) > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _mean_hidden_states(tokens: Sequence[Sequence[int]], model: PreTrainedModel) -> Tensor:
    lengths = torch.tensor([len(ids) for ids in tokens])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in tokens], batch_first=True)
    own = torch.arange(padded.shape[1]) < lengths[:, None]
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    hidden = body(
        input_ids=padded.to(model.device), attention_mask=own.long().to(model.device), use_cache=False
    ).last_hidden_state
    total = hidden.float().masked_fill(~own[:, :, None].to(model.device), 0.0).sum(1)
    return total.cpu() / lengths[:, None]
