"""Samples as token sequences: who the user is, a yes/no question, its answers before, and the target.

The target's line is like those of the behaviours, up to where the answer would stand: even an untrained model
then goes on as the lines before went.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tokenizers import AddedToken
from tqdm import tqdm

from rellax.ctr.dataset import Dataset
from rellax.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("No", "Yes")
PLACEHOLDER = "<|item|>"
_COLON = ":"
_CONTENT = "[content]"
_ITEM_TOKENS = 64  # of an item's text, at most: a longer one is cut, so that K of them fit
_CACHED = 1 << 17  # pieces of each kind that are kept
_CHECKED = 1 << 12  # targets, or prompts, that are looked at at once


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


@dataclass(frozen=True)
class Wording:
    """How the prompts of a data set put it, from its dataset.json.

    Attributes:
        question: the line before the behaviours, which their answers and the target's follow.
        positive_above: the answer is Yes where the rating is larger.
        unrated: the rating that means that there is none.
        answers: what the ratings 0 and 1 are called, where they are labels.
    """

    question: str
    positive_above: float
    unrated: float | None
    answers: tuple[str, str] | None

    @classmethod
    def of(cls, meta: dict[str, Any]) -> Wording:
        noun, (low, high) = meta["item_noun"], meta["rating_scale"]
        order = "oldest first" if meta["timed"] else "in no order"
        if meta["answers"] is not None:
            question, answer = f"Did the user choose the {noun}?", "Yes or No"
        else:
            question = f"Did the user rate the {noun} above {meta['positive_above']:g}?"
            answer = f"Yes or No, then the rating from {low:g} to {high:g}"
        question = f"{meta['question'] or question} {answer}, {order}:"
        return cls(question, meta["positive_above"], meta["unrated"], meta["answers"])

    def answer(self, rating: float) -> str:
        """How a behaviour's line ends."""
        is_liked = np.float32(rating) > np.float32(self.positive_above)  # as the label compares them
        liked, said = ANSWERS[int(is_liked)], self.said(rating)
        return liked if said.lower() in ("yes", "no") else f"{liked}, {said}"

    def said(self, rating: float) -> str:
        """What the user gave a behaviour."""
        if self.answers is not None:
            return self.answers[int(rating)]
        return "unrated" if rating == self.unrated else f"{rating:g}"


def recent(position: np.ndarray, k: int) -> np.ndarray:
    """The `k` most recent of `position` (n,) earlier behaviours, newest first: (n, k), then -1."""
    return np.maximum(position[:, None] - 1 - np.arange(k), -1)


def with_recent(nearest: np.ndarray, position: np.ndarray, count: int) -> np.ndarray:
    """The `count` most recent behaviours, then the nearest of the others: (n, k), then -1.

    Args:
        nearest: (n, k) positions by falling similarity, then -1.
        position: (n,) how many behaviours are before each target.
    """
    others = np.where(nearest < position[:, None] - count, nearest, -1)
    others = np.take_along_axis(others, np.argsort(others < 0, axis=1, kind="stable"), axis=1)
    return np.concatenate([recent(position, count), others], axis=1)[:, : nearest.shape[1]]


def add_placeholder(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the placeholder token to the tokenizer; its id may lie beyond the model's vocabulary."""
    tokenizer.add_tokens([AddedToken(PLACEHOLDER, special=True)])
    return tokenizer.get_added_vocab()[PLACEHOLDER]


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the tokens (No, Yes) that would follow a prompt.

    Raises:
        InputError: an answer is not one token of its own.
    """
    before = _encode(tokenizer, _COLON, after=".")
    ids = []
    for answer in ANSWERS:
        both = _encode(tokenizer, f"{_COLON} {answer}", after=".")
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

    The user's message has the profile, the question and the behaviours with their answers; the model's answer
    begins with the target, and the prompt ends where Yes or No follows. Every part is tokenised once, on its
    own, and prompts are put together from these pieces. With `placeholder`, that token stands after each
    behaviour's text and after the target's. A text is cut after 64 tokens.

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
        self.k = k
        self.max_tokens = max_tokens
        self.placeholder = placeholder
        self.wording = Wording.of(dataset.meta)
        self._prefix, suffix = _frame(tokenizer)
        self._newline = _encode(tokenizer, "\n", after=".")
        self._turn = _encode(tokenizer, suffix, after="\n", special=True)
        self._after_turn = suffix or "\n"
        self._head_of = functools.lru_cache(_CACHED)(self._head)
        self._behaviour_of = functools.lru_cache(_CACHED)(self._behaviour)
        self._target_of = functools.lru_cache(_CACHED)(self._target)
        self._read(dataset)

    def of(self, dataset: Dataset) -> PromptBuilder:
        """The same builder for other users and samples of the same items; it shares the tokenised parts."""
        other = copy.copy(self)
        other._read(dataset)
        return other

    def _read(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._ratings = np.unique(dataset.behaviour_ratings)
        # Tokens of an item's line by rating, of it as a target, of a user's head; 0 is not known yet.
        self._behaviour_tokens = np.zeros((dataset.items.num_rows, len(self._ratings)), dtype=np.int32)
        self._target_tokens = np.zeros(dataset.items.num_rows, dtype=np.int32)
        self._head_tokens = np.zeros(dataset.users.num_rows, dtype=np.int32)

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
        head = self._head_of(self.dataset.profiles[self.dataset.samples.user[sample]])
        tail = self._target_of(item)
        room = self.max_tokens - len(head) - len(tail)
        if room < 0:
            raise self._too_long(sample, len(head) + len(tail))
        rows = [history.start + int(position) for position in positions[: self.k]]
        lengths = itertools.accumulate(len(self._behaviour_at(row)) for row in rows)
        rows = sorted(rows[: sum(length <= room for length in lengths)])
        body = [token for row in rows for token in self._behaviour_at(row)]
        items = [*self.dataset.behaviour_items[rows].tolist(), item] if self.placeholder is not None else []
        return Prompt(head + body + tail, items, len(rows))

    def lengths(self, samples: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Tokens of the prompts that `build` would make, (n,) int32, without making them.

        Args:
            samples: (n,) samples.
            positions: (n, k) of each sample's behaviours, in order of importance, then -1.

        Raises:
            InputError: a prompt too long even without behaviours.
        """
        data, chosen = self.dataset, positions[:, : self.k]
        user = data.samples.user[samples]
        rows = np.where(chosen >= 0, data.offsets[user][:, None] + chosen, 0)
        keys = data.behaviour_items[rows], np.searchsorted(self._ratings, data.behaviour_ratings[rows])
        behaviours = _counted(self._behaviour_tokens, keys, self._count_behaviour)
        fixed = self.fixed_lengths(samples)
        growing = np.cumsum(np.where(chosen >= 0, behaviours, 0), axis=1) + fixed[:, None]
        kept = np.where(growing <= self.max_tokens, growing, 0)
        return np.maximum(kept.max(axis=1, initial=0), fixed).astype(np.int32)

    def check(self, samples: np.ndarray, *, progress: bool = False) -> None:
        """Raise an InputError where a sample's prompt would be too long even without behaviours."""
        data = self.dataset.samples
        users, items = _distinct(data.user[samples]), _distinct(data.item[samples])
        longest = _counted(self._head_tokens, (users,), self._count_head).max(initial=0)
        blocks = np.array_split(items, 1 + len(items) // _CHECKED)
        longest += max(
            _counted(self._target_tokens, (block,), self._count_target).max(initial=0)
            for block in tqdm(blocks, "tokens", unit="block", disable=not progress, delay=2)
        )
        if longest > self.max_tokens:  # but maybe not of one sample
            for start in range(0, len(samples), _CHECKED):
                self.fixed_lengths(samples[start : start + _CHECKED])

    def fixed_lengths(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of the samples' prompts without any behaviour, (n,) int32.

        Raises:
            InputError: a prompt too long even so.
        """
        user, item = self.dataset.samples.user[samples], self.dataset.samples.item[samples]
        fixed = _counted(self._head_tokens, (user,), self._count_head)
        fixed += _counted(self._target_tokens, (item,), self._count_target)
        if (fixed > self.max_tokens).any():
            row = int(np.argmax(fixed > self.max_tokens))
            raise self._too_long(int(samples[row]), int(fixed[row]))
        return fixed

    def render(self, sample: int, positions: Sequence[int]) -> str:
        """The prompt as text, exactly as the model reads it."""
        ids = self.build(sample, positions).input_ids
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _behaviour_at(self, row: int) -> list[int]:
        return self._behaviour_of(
            int(self.dataset.behaviour_items[row]), float(self.dataset.behaviour_ratings[row])
        )

    def _too_long(self, sample: int, tokens: int) -> InputError:
        user = self.dataset.users["user_id"][int(self.dataset.samples.user[sample])].as_py()
        return InputError(
            f"max_tokens: sample {sample} needs {tokens} tokens without any behaviour, got "
            f"{self.max_tokens}; raise it, or shorten the profile of user {user!r} or the question"
        )

    def _count_behaviour(self, item: int, rating: int) -> int:
        return len(self._behaviour_of(item, float(self._ratings[rating])))

    def _count_head(self, user: int) -> int:
        return len(self._head_of(self.dataset.profiles[user]))

    def _count_target(self, item: int) -> int:
        return len(self._target_of(item))

    def _head(self, profile: str) -> list[int]:
        """All before the behaviours; the line about the user is left out where nothing is known."""
        question = self.wording.question
        if not profile:
            return _bos(self.tokenizer) + self._opened(question) + self._newline
        who = self._opened("User:") + self._line(f" {profile}", after=":") + self._newline
        return _bos(self.tokenizer) + who + self._line(question) + self._newline

    def _opened(self, text: str) -> list[int]:
        """`text` where the prompt begins, after what the chat template puts before it."""
        return _encode(self.tokenizer, self._prefix + text, after="", special=True)

    def _behaviour(self, item: int, rating: float) -> list[int]:
        answer = f"{_COLON} {self.wording.answer(rating)}"
        return self._item(item) + self._line(answer, after=".") + self._newline

    def _target(self, item: int) -> list[int]:
        """All after the behaviours."""
        return self._turn + self._item(item, self._after_turn) + self._line(_COLON, after=".")

    def _item(self, item: int, after: str = "\n") -> list[int]:
        placeholder = [] if self.placeholder is None else [self.placeholder]
        return self._line(self.dataset.texts[item], after=after)[:_ITEM_TOKENS] + placeholder

    def _line(self, text: str, *, after: str = "\n") -> list[int]:
        """One line, whatever white space `text` has."""
        return _encode(self.tokenizer, re.sub(r"\s+", " ", text), after=after)


def _distinct(ids: np.ndarray) -> np.ndarray:
    """The distinct ones of small non-negative integers, rising."""
    seen = np.zeros(ids.max(initial=-1) + 1, dtype=bool)
    seen[ids] = True
    return np.flatnonzero(seen)


def _counted(known: np.ndarray, keys: tuple[np.ndarray, ...], count: Callable[..., int]) -> np.ndarray:
    """`known[keys]`, where `count` first fills in what is still 0."""
    missing = np.unique(np.stack(keys)[..., known[keys] == 0], axis=1)
    for key in missing.T.tolist():
        known[tuple(key)] = count(*key)
    return known[keys]


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
        return "", ""
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
