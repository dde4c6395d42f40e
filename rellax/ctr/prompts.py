"""Samples as token sequences: who the user is, what they rated before, the target, and a yes/no question."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2
from tokenizers import AddedToken

from rellax.ctr.dataset import Dataset
from rellax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("No", "Yes")
PLACEHOLDER = "<|item|>"
_CONTENT = "[content]"


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it.

    Attributes:
        input_ids: all tokens up to where the answer begins.
        item_ids: the item behind each placeholder, in order; empty without placeholders.
        behaviours: how many behaviours are in the prompt.
    """

    input_ids: list[int]
    item_ids: list[int]
    behaviours: int


def recent(position: int, k: int) -> list[int]:
    """The `k` most recent of `position` earlier behaviours, newest first."""
    return list(range(position - 1, max(position - k, 0) - 1, -1))


def add_placeholder(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the placeholder token to the tokenizer; its id may lie beyond the model's vocabulary."""
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True)])
    return tokenizer.get_added_vocab()[PLACEHOLDER]


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the tokens (No, Yes) that would follow a prompt.

    Raises:
        InputError: an answer is not one token of its own.
    """
    suffix = _frame(tokenizer)[1]
    encode = functools.partial(_encode, tokenizer, after=".", special=True)
    before = encode(suffix)
    bare = suffix[-1:].isspace() or before[-1] in tokenizer.get_added_vocab().values()
    ids = []
    for answer in ANSWERS:
        both = encode(suffix + ("" if bare else " ") + answer)
        if both[:-1] != before:
            raise InputError(
                f"tokenizer: expected the answer {answer!r} to be one token, "
                f"got {tokenizer.convert_ids_to_tokens(both[len(before) :])}"
            )
        ids.append(both[-1])
    if ids[0] == ids[1]:
        raise InputError(f"tokenizer: expected distinct answer tokens, got {ids[0]} for both")
    return ids[0], ids[1]


class PromptBuilder:
    """Builds prompts from a data set, in the tokenizer's chat template where it has one.

    Every part (profile, behaviour, target) is tokenised once, on its own, and prompts are put together from
    these pieces. With `placeholder`, that token stands after each behaviour and after the target.

    Args:
        k: most behaviours in a prompt.
        max_tokens: most tokens in a prompt; behaviours are left out, whole, until it fits.
        placeholder: id of the placeholder token, see `add_placeholder`; None leaves placeholders out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset,
        *,
        k: int,
        max_tokens: int,
        placeholder: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.k = k
        self.max_tokens = max_tokens
        self.placeholder = placeholder
        noun, (low, high) = dataset.meta["item_noun"], dataset.meta["rating_scale"]
        prefix, suffix = _frame(tokenizer)
        self._newline = _encode(tokenizer, "\n", after=".")
        self._opening = _bos(tokenizer) + _encode(tokenizer, f"{prefix}User:", after="", special=True)
        self._header = self._line(f"{noun.capitalize()} ratings from {low:g} to {high:g}, oldest first:")
        self._question = _encode(
            tokenizer, f"Will the user rate it above {dataset.meta['positive_above']:g}? Answer Yes or No."
        ) + _encode(tokenizer, suffix, after=".", special=True)
        self._profile_of = functools.cache(self._profile)
        self._behaviour_of = functools.cache(self._behaviour)
        self._target_of = functools.cache(self._target)

    def build(self, sample: int, positions: Sequence[int]) -> Prompt:
        """Prompt of one sample with those behaviours of its history that `positions` names.

        `positions` (within the user's history) come in order of importance: beyond `k`, or where the prompt
        would grow longer than `max_tokens`, the last ones are left out. The prompt shows them in time order.

        Raises:
            InputError: a position not before the target, or a prompt too long even without behaviours.
        """
        history = self.dataset.history(sample)
        end = history.stop - history.start
        for position in positions:
            if not 0 <= position < end:
                raise InputError(f"positions: sample {sample} has behaviours 0 to {end - 1}, got {position}")
        item = int(self.dataset.samples.item[sample])
        head = self._opening + self._profile_of(int(self.dataset.samples.user[sample])) + self._header
        tail = self._target_of(item) + self._question
        room = self.max_tokens - len(head) - len(tail)
        if room < 0:
            raise InputError(
                f"max_tokens: sample {sample} needs {len(head) + len(tail)} tokens without any behaviour, "
                f"got {self.max_tokens}"
            )
        rows = [history.start + int(position) for position in positions[: self.k]]
        lengths = itertools.accumulate(len(self._behaviour_at(row)) for row in rows)
        rows = sorted(rows[: sum(length <= room for length in lengths)])
        body = [token for row in rows for token in self._behaviour_at(row)]
        items = [*self.dataset.behaviour_items[rows].tolist(), item] if self.placeholder is not None else []
        return Prompt(head + body + tail, items, len(rows))

    def render(self, sample: int, positions: Sequence[int]) -> str:
        """The prompt as text, exactly as the model reads it."""
        ids = self.build(sample, positions).input_ids
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _behaviour_at(self, row: int) -> list[int]:
        return self._behaviour_of(
            int(self.dataset.behaviour_items[row]), float(self.dataset.behaviour_ratings[row])
        )

    def _profile(self, user: int) -> list[int]:
        return self._line(f" {self.dataset.profiles[user]}", after=":")

    def _behaviour(self, item: int, rating: float) -> list[int]:
        # The rating stands first: the title then starts with a space, as most words of a vocabulary do.
        return self._line(f"{rating:g}: {self.dataset.titles[item]}", soft=True)

    def _target(self, item: int) -> list[int]:
        return self._line(f"New {self.dataset.meta['item_noun']}: {self.dataset.texts[item]}", soft=True)

    def _line(self, text: str, *, after: str = "\n", soft: bool = False) -> list[int]:
        """One line, whatever white space `text` has; `soft` puts the placeholder at its end."""
        placeholder = [self.placeholder] if soft and self.placeholder is not None else []
        line = re.sub(r"\s+", " ", text)
        return _encode(self.tokenizer, line, after=after) + placeholder + self._newline


def _encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, after: str = "\n", special: bool = False
) -> list[int]:
    """Tokens of `text` where it follows `after`: on its own, some tokenizers would put a space before it.

    Text from the data never makes special tokens (`special=False`), whatever it spells.
    """
    options = {"add_special_tokens": False, "split_special_tokens": not special}
    before, both = (tokenizer.encode(part, **options) for part in (after, after + text))
    if both[: len(before)] != before:  # the seam was merged: `text` starts with white space, as `after` ends
        return tokenizer.encode(text, **options)
    return both[len(before) :]


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after a user's message; a plain frame where there is none.

    Where a template adds a system message of its own, an empty one takes its place if that is shorter.
    """
    if tokenizer.chat_template is None:
        return "", "\nAnswer:"
    user = {"role": "user", "content": _CONTENT}
    texts = [_render(tokenizer, [user])]
    with contextlib.suppress(jinja2.TemplateError):  # raised by templates that know no system role
        texts.append(_render(tokenizer, [{"role": "system", "content": ""}, user]))
    shown = [text for text in texts if _CONTENT in text]
    if not shown:
        raise InputError(
            f"tokenizer: expected a chat template that shows the user's message, got {texts[0]!r}"
        )
    prefix, _, suffix = min(shown, key=len).partition(_CONTENT)
    return prefix, suffix


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    # Templates that let a model think before its answer take the last argument; others ignore it.
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that begins a text, where the tokenizer adds one; chat templates write theirs out."""
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins and tokenizer.chat_template is None else []
