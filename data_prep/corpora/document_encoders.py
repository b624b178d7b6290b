"""What becomes of a document that was read: the key that decides its split, and its ids.

A text is framed as the tokenizer's model expects it. A conversation is a record as JSON; its ids come with marks
(`data_prep.token_sets.marked_writer`), made together with them.
"""

import json
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import (
    ASSISTANT,
    BadConversation,
    Conversation,
    Preference,
    Problem,
    conversation_of,
    preference_of,
    question_key,
)
from data_prep.corpora.preparation import document_key
from data_prep.corpora.readers import Fragment
from data_prep.token_sets.marked_writer import MARKED_DTYPE, with_marks
from data_prep.tokenization.tokenizer import Ids, Tokenizer

SPELLINGS = "spellings of special tokens in messages, which were read as text"


class LeftOut(Exception):
    """A document that can't be used, and why in words that reports count by."""


class Encoded(NamedTuple):
    """A document's ids as it is stored, (n,), and what else reports count of it, in words."""

    ids: Ids
    told: tuple[str, ...] = ()


class DocumentEncoder(Protocol):
    """How the documents of a set are encoded. dtype: of what `encode` gives."""

    dtype: np.dtype[Any]

    def key(self, fragment: Fragment) -> int:
        """A document's key, 64 bits. Raises LeftOut where it can't be used."""
        ...

    def encode(self, fragment: Fragment) -> Encoded:
        """Raises LeftOut where it can't be used."""
        ...


class TextEncoder:
    """Of texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.dtype, self._tokenizer, self._nothing = tokenizer.dtype, tokenizer, tokenizer.opening[:0]

    def key(self, fragment: Fragment) -> int:
        return document_key(fragment.key)

    def encode(self, fragment: Fragment) -> Encoded:
        before = self._tokenizer.opening if fragment.begins else self._nothing
        after = self._tokenizer.closing if fragment.ends else self._nothing
        ids = self._tokenizer.encode(fragment.text, continues=not fragment.begins)
        return Encoded(np.concatenate([before, ids, after]))


class ConversationEncoder:
    """Of records with conversations."""

    dtype = MARKED_DTYPE

    def __init__(self, tokenizer: ChatTokenizer, longest: int | None) -> None:
        """Args: longest: tokens that a conversation may have; None: any number."""
        self._tokenizer, self._longest = tokenizer, longest
        self._last: tuple[str, Conversation] = ("", ())

    def key(self, fragment: Fragment) -> int:
        """That of what was asked first, whatever the system's message: equal questions stay on one side."""
        return question_key(self._conversation(fragment))

    def encode(self, fragment: Fragment) -> Encoded:
        try:
            rendered = self._tokenizer.render(self._conversation(fragment))
        except BadConversation as error:
            raise LeftOut(str(error.problem)) from None
        if not rendered.counted[1:].any():
            raise LeftOut(str(Problem.NO_ANSWER))
        if self._longest is not None and len(rendered.ids) > self._longest:
            raise LeftOut(f"more than {self._longest:,} tokens (--longest)")
        return Encoded(with_marks(rendered.ids, rendered.counted), (SPELLINGS,) * bool(rendered.spellings))

    def _conversation(self, fragment: Fragment) -> Conversation:
        if self._last[0] == fragment.text:  # asked for its key a moment ago
            return self._last[1]
        try:
            messages = conversation_of(json.loads(fragment.text))
        except BadConversation as error:
            raise LeftOut(str(error.problem)) from None
        if not any(message.role == ASSISTANT for message in messages):
            raise LeftOut(str(Problem.NO_ANSWER))
        self._last = (fragment.text, messages)
        return messages


class PreferenceEncoder:
    """Of records with preferences. Each becomes two conversations, the chosen one first, of which only the last answer
    counts: what was said before is the prompt of both.
    """

    dtype = MARKED_DTYPE

    def __init__(self, tokenizer: ChatTokenizer, longest: int | None) -> None:
        """Args: longest: tokens that each conversation may have; None: any number."""
        self._tokenizer, self._longest = tokenizer, longest
        self._last: tuple[str, Preference] = ("", Preference((), ()))

    def key(self, fragment: Fragment) -> int:
        """That of what was asked first, as for conversations."""
        return question_key(self._preference(fragment).chosen)

    def encode(self, fragment: Fragment) -> Encoded:
        parts, spellings = [], 0
        for turns in self._preference(fragment):
            try:
                rendered, prompt = self._tokenizer.render(turns), self._tokenizer.prompt_of(turns[:-1])
            except BadConversation as error:
                raise LeftOut(str(error.problem)) from None
            counted = rendered.counted & (np.arange(len(rendered.ids)) >= len(prompt))
            if self._longest is not None and len(rendered.ids) > self._longest:
                raise LeftOut(f"more than {self._longest:,} tokens (--longest)")
            parts.append(with_marks(rendered.ids, counted))
            spellings += rendered.spellings
        return Encoded(np.concatenate(parts), (SPELLINGS,) * bool(spellings))

    def _preference(self, fragment: Fragment) -> Preference:
        if self._last[0] != fragment.text:
            try:
                self._last = (fragment.text, preference_of(json.loads(fragment.text)))
            except BadConversation as error:
                raise LeftOut(str(error.problem)) from None
        return self._last[1]


def document_encoder(
    tokenizer: Tokenizer, *, conversations: bool, longest: int | None = None, pairs: bool = False
) -> DocumentEncoder:
    """What encodes a corpus's documents. Args: pairs: of conversations, those of preferences."""
    if not conversations:
        return TextEncoder(tokenizer)
    assert isinstance(tokenizer, ChatTokenizer), tokenizer.spec["kind"]
    return PreferenceEncoder(tokenizer, longest) if pairs else ConversationEncoder(tokenizer, longest)
