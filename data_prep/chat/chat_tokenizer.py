"""A tokenizer that can hold conversations: another one's ids, the tokens around turns after them, and a template.

The one renderer of conversations, for training, evaluation and chat:

    chat = ChatTokenizer.of(load_tokenizer("gpt2"), read_template("chatml"))
    chat.render([Message("user", "2+2?"), Message("assistant", "4")])   # ids, and which of them an answer is
    chat.prompt_of([Message("user", "2+2?")])                           # the ids that the answer follows

The rendered text is cut where a special token of the template stands and where an answer starts, and each piece is
encoded by itself. So a prompt's ids are always the beginning of the whole's. `transformers` cuts at special tokens
only. Prompts have the same ids there; a whole conversation has, unless the text before an answer and its first
characters share a token, or a rule of the tokenizer looks from one to the other:

- ChatML with an answer that starts with white space, which may join the line break before it (Llama 3's strips it);
- Llama 3's template with GPT-2's pattern, which takes a line break off two that a word follows: at a prompt's end the
  two are one token, before an answer they are two. Llama 3's own pattern and `gpt4` keep them together;
- a SentencePiece vocabulary with tokens that have a line break and what follows it (Llama 2's has none).

A byte or character tokenizer has neither. Where they differ, training has what generation will see: the prompt's ids.

A special token's spelling within a message is text like any other: it never becomes that token.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.publish import canonical_json
from data_prep.chat.messages import ASSISTANT, USER, BadConversation, Message, Problem
from data_prep.chat.template import Template
from data_prep.tokenization.tokenizer import Ids, Tokenizer

FIRST_STAND_IN, PRIVATE = 0xF0000, 0xFFFE  # of the plane of private characters that no text needs: 65,534
PROBED = "abcd" + string.digits + string.ascii_letters  # of them those that a tokenizer of few characters has


@dataclass(frozen=True)
class Rendered:
    """A conversation's ids.

    Attributes:
        ids: (n,) of the tokenizer's dtype.
        counted: (n,) bool: the assistants' tokens, from the first of an answer to its end of turn.
        spellings: how many spellings of special tokens the messages have, which were encoded as text.
    """

    ids: Ids
    counted: npt.NDArray[np.bool_]
    spellings: int


class ChatTokenizer(Tokenizer):
    """Attributes:

    base: the tokenizer whose ids 0 … its vocab_size - 1 keep their meaning.
    turn_tokens: the tokens after them, in the order of their ids.
    template: of conversations.
    end_of_turn_id: the token that ends an answer.
    """

    def __init__(self, base: Tokenizer, turn_tokens: Sequence[str], template: Template) -> None:
        """Raises UserError where template and tokens don't make a renderer."""
        self.base, self.template, self.turn_tokens = base, template, tuple(turn_tokens)
        self._specials = dict(base.special_spellings)
        for name in self.turn_tokens:
            if not isinstance(name, str) or not name or name in self._specials:
                raise UserError(f"the token {name!r} around turns is empty or exists already: name each once")
            self._specials[name] = base.vocab_size + len(self._specials) - len(base.special_spellings)
        framing = {} if base.begin_of_text_id == base.end_of_text_id else {"begin_of_text_id": base.begin_of_text_id}
        also = canonical_json([base.spec["sha256"], list(self.turn_tokens), template.text])
        details = {"base": base.spec, "turn_tokens": list(self.turn_tokens), "chat_template": template.text}
        pieces = base.pieces() + [b""] * len(self.turn_tokens)
        super().__init__("chat", pieces, base.end_of_text_id, also=also, **framing, **details)  # type: ignore[arg-type]
        self.token_count = base.token_count + len(self.turn_tokens)
        self.begins_contexts = base.begins_contexts
        names = {number: name for name, number in self._specials.items()}
        ends = {"bos_token": base.begin_of_text_id, "eos_token": base.end_of_text_id}
        self._special_texts = {key: "" if number is None else names[number] for key, number in ends.items()}
        self._special = re.compile("|".join(map(re.escape, sorted(self._specials, key=len, reverse=True))) or r"(?!)")
        self.end_of_turn_id = self._check_template()
        others = () if self.end_of_turn_id == base.end_of_text_id else (self.end_of_turn_id,)
        self.other_end_ids = tuple(dict.fromkeys((*base.other_end_ids, *others)))

    @classmethod
    def of(cls, base: Tokenizer, template: Template) -> "ChatTokenizer":
        """A base with the template's tokens `<|…|>` that it lacks, in the order in which the template has them.

        A base that holds conversations already gives its own base; its turn tokens stay, with their ids.
        """
        kept: tuple[str, ...] = ()
        if isinstance(base, ChatTokenizer):
            kept, base = base.turn_tokens, base.base
        known = {*base.special_spellings, *kept}
        return cls(base, [*kept, *(name for name in template.spellings if name not in known)], template)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any], base: Tokenizer) -> "ChatTokenizer":
        """Args: base: the tokenizer of the spec's `base`."""
        return cls(base, spec["turn_tokens"], Template(spec["chat_template"]))

    @property
    def special_spellings(self) -> Mapping[str, int]:
        return self._specials

    def encode(self, text: str, *, continues: bool = False) -> Ids:
        return self.base.encode(text, continues=continues).astype(self.dtype)

    def cut(self, text: str, start: int) -> int | None:
        return self.base.cut(text, start)

    def decode(self, ids: Ids | Sequence[int], *, continues: bool = False) -> str:
        array = self._checked(ids)
        places = [-1, *np.flatnonzero(array >= self.base.vocab_size).tolist(), len(array)]
        texts = []
        for number, (before, after) in enumerate(pairwise(places)):
            goes_on = not self.base.spaces_after_special if number else continues
            texts.append(self.base.decode(array[before + 1 : after], continues=goes_on))
            if after < len(array):
                texts.append(self.turn_tokens[int(array[after]) - self.base.vocab_size])
        return "".join(texts)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """A whole conversation.

        Raises BadConversation where the template can't express it: it refuses it, writes a turn otherwise once others
        follow, or does not end an answer with a special token.
        """
        return self._render(messages, prompt=False)

    def prompt_of(self, messages: Sequence[Message]) -> list[int]:
        """The ids before an answer to the conversation, with the header of the assistant's turn.

        Raises BadConversation as `render` does.
        """
        ids: list[int] = self._render(messages, prompt=True).ids.tolist()
        return ids

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> Rendered:
        messages, stand_ins, spellings = self._without_spellings(messages)
        text = self._text(messages, prompt=prompt)
        ids: list[int] = []
        counted: list[bool] = []
        place = 0
        for start, stop in self._answers(messages, text):
            for first, last in ((place, start), (start, stop)):
                new = self._encode(text, first, last, stand_ins)
                ids += new
                counted += [first == start] * len(new)
            place = stop
        rest = self._encode(text, place, len(text), stand_ins)
        counted += [False] * len(rest)
        return Rendered(np.array(ids + rest, dtype=self.dtype), np.array(counted, dtype=np.bool_), spellings)

    def _text(self, messages: Sequence[Message], *, prompt: bool) -> str:
        return self.template.render(messages, self._special_texts, prompt=prompt)

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Where each answer starts in the rendered text, and where its end of turn ends."""
        spans = []
        for number, message in enumerate(messages):
            if message.role != ASSISTANT:
                continue
            before = self._text(messages[:number], prompt=True)
            if not text.startswith(before):
                raise BadConversation(Problem.TEMPLATE, "what it renders before an answer is not what precedes it")
            end = self._special.search(text, len(before))
            if end is None or end.start() == len(before):
                raise BadConversation(Problem.TEMPLATE, "an answer has no text, or no special token after it")
            spans.append((len(before), end.end()))
        return spans

    def _encode(self, text: str, start: int, stop: int, stand_ins: Mapping[str, str]) -> list[int]:
        """Ids of a part of the rendered text: of the special tokens in it, and of what is between them."""
        ids: list[int] = []
        place = start
        for found in self._special.finditer(text, start, stop):
            ids += self._encode_text(text, place, found.start(), stand_ins)
            ids.append(self._specials[found[0]])
            place = found.end()
        return ids + self._encode_text(text, place, stop, stand_ins)

    def _encode_text(self, text: str, start: int, stop: int, stand_ins: Mapping[str, str]) -> list[int]:
        if start == stop:
            return []
        part = text[start:stop]
        for character, spelling in stand_ins.items():
            part = part.replace(character, spelling)
        after_special = any(text.endswith(name, 0, start) for name in self._specials)
        continues = start > 0 and not (after_special and self.base.spaces_after_special)
        ids: list[int] = self.base.encode(part, continues=continues).tolist()
        return ids

    def _without_spellings(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str], int]:
        """The messages with a private character for each spelling of a special token, what each such character stands
        for, and the number of spellings.
        """
        found = [name for message in messages for name in self._special.findall(message.content)]
        if not found:
            return list(messages), {}, 0
        used = {character for message in messages for character in message.content}
        free = (chr(point) for point in range(FIRST_STAND_IN, FIRST_STAND_IN + PRIVATE) if chr(point) not in used)
        names = dict(zip(dict.fromkeys(found), free, strict=False))
        changed = [
            Message(message.role, self._special.sub(lambda name: names[name[0]], message.content))
            for message in messages
        ]
        return changed, {character: name for name, character in names.items()}, len(found)

    def _probe(self) -> list[Message]:
        """Two turns of each role, in characters that the base has."""
        known = [character for character in PROBED if self._has(character)][:4] or ["a"]
        roles = (USER, ASSISTANT, USER, ASSISTANT)
        return [Message(role, known[number % len(known)]) for number, role in enumerate(roles)]

    def _has(self, character: str) -> bool:
        try:
            return len(self.base.encode(character)) > 0
        except UserError:
            return False

    def _check_template(self) -> int:
        """The id that ends an answer. Raises UserError where the template can't be used with these tokens."""
        try:
            rendered = self.render(self._probe())
        except BadConversation as error:
            raise UserError(f"the chat template can't be used: {error}") from None
        ends = rendered.ids[:-1][rendered.counted[:-1] & ~rendered.counted[1:]].tolist()
        ends += rendered.ids[-1:][rendered.counted[-1:]].tolist()
        if len(set(ends)) != 1:
            raise UserError("the chat template can't be used: it ends answers with different tokens")
        return int(ends[0])
