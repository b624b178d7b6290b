"""Conversations: who said what, checked turn by turn.

A record is what data sets on the hub have: `messages` (each with `role` and `content`), or `prompt` and `completion`,
which are texts or lists of messages. One of a preference has `prompt`, `chosen` and `rejected`, of the same kinds.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from common.errors import UserError
from common.plain_text import one_line

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = (SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True)
class Message:
    """A turn. role: one of ROLES. content: what was said, never empty."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class Problem(StrEnum):
    """Why a conversation can't be used, in words that reports count by."""

    NO_MESSAGES = "no messages"
    NOT_TEXT = "content that is not text"
    OTHER_ROLE = "a role other than system, user and assistant"
    EMPTY = "an empty turn"
    SYSTEM_LATER = "a system message that is not the first message, or a second one"
    ASSISTANT_FIRST = "an assistant's turn before any user's"
    REPEATED_ROLE = "two turns of the same role in a row"
    NO_ANSWER = "no answer to learn from"
    NO_PAIR = "no chosen and rejected answer"
    OTHER_PROMPT = "chosen and rejected answer different prompts"
    EQUAL = "chosen and rejected are the same answer"
    TEMPLATE = "the template can't express it"


class BadConversation(UserError):
    """A conversation that can't be used. `problem` is the kind of reason, the message says where."""

    def __init__(self, problem: Problem, detail: str = "") -> None:
        super().__init__(f"{problem}{f' ({one_line(detail)})' if detail else ''}")
        self.problem = problem


def conversation_of(record: object) -> Conversation:
    """The turns of a JSON record, checked as `check_turns` does.

    Raises BadConversation where there are none, or they can't be used.
    """
    if not isinstance(record, Mapping):
        raise BadConversation(Problem.NO_MESSAGES, "the record is not an object")
    if record.get("messages") is not None:
        turns = _messages(record["messages"])
    elif record.get("prompt") is not None and record.get("completion") is not None:
        turns = _messages(record["prompt"], USER) + _messages(record["completion"], ASSISTANT)
    else:
        raise BadConversation(Problem.NO_MESSAGES, "the record has neither messages nor prompt and completion")
    check_turns(turns)
    return turns


class Preference(NamedTuple):
    """Two conversations that differ in their last answer only: the one that was preferred, and the other."""

    chosen: Conversation
    rejected: Conversation


def preference_of(record: object) -> Preference:
    """The two conversations of a JSON record, checked as `check_turns` does.

    `chosen` and `rejected` are answers to `prompt`, as texts or as lists of messages; or lists of messages that start
    with the prompt themselves, as many sets on the hub have them beside a `prompt` that repeats it.

    Raises BadConversation where they are missing, can't be used, answer different prompts, or are equal.
    """
    if not isinstance(record, Mapping) or record.get("chosen") is None or record.get("rejected") is None:
        raise BadConversation(Problem.NO_PAIR)
    found = Preference(_answered(record, "chosen"), _answered(record, "rejected"))
    for turns in found:
        check_turns(turns)
        if turns[-1].role != ASSISTANT:
            raise BadConversation(Problem.NO_ANSWER)
    if found.chosen[:-1] != found.rejected[:-1]:
        raise BadConversation(Problem.OTHER_PROMPT)
    if found.chosen[-1] == found.rejected[-1]:
        raise BadConversation(Problem.EQUAL)
    return found


def _answered(record: Mapping[str, Any], name: str) -> Conversation:
    """The prompt with one of its answers."""
    answer = _messages(record[name], ASSISTANT)
    if answer and answer[0].role != ASSISTANT:
        return answer
    if record.get("prompt") is None:
        raise BadConversation(Problem.NO_MESSAGES, f"the record has no prompt, and {name} does not start with it")
    return _messages(record["prompt"], USER) + answer


def prompt_and_answer(record: object) -> tuple[Conversation, str | None]:
    """The turns of a JSON record before its last answer, checked; and that answer, where it has one.

    Raises BadConversation where there are none, or they can't be used.
    """
    if isinstance(record, Mapping) and record.get("messages") is None and record.get("prompt") is not None:
        turns = _messages(record["prompt"], USER)
        if record.get("completion") is not None:
            turns += _messages(record["completion"], ASSISTANT)
        check_turns(turns)
    else:
        turns = conversation_of(record)
    answer = turns[-1].content if turns[-1].role == ASSISTANT else None
    return (turns if answer is None else turns[:-1]), answer


def question_key(turns: Conversation) -> int:
    """A hash, 64 bits, of what was asked first, whatever the system's message: equal questions go to one split."""
    asked = next(message.content for message in turns if message.role != SYSTEM)
    return int.from_bytes(hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def check_turns(turns: Sequence[Message]) -> None:
    """A system message first if any, then a user's turn and an assistant's by turns; none is empty.

    Raises BadConversation, which names the first turn that breaks this, counted from 1.
    """
    before: str | None = None
    for number, turn in enumerate(turns, 1):
        where = f"turn {number}, {turn.role}"
        if turn.role not in ROLES:
            raise BadConversation(Problem.OTHER_ROLE, where)
        if not turn.content.strip():
            raise BadConversation(Problem.EMPTY, where)
        if turn.role == SYSTEM and number > 1:
            raise BadConversation(Problem.SYSTEM_LATER, where)
        if turn.role == ASSISTANT and before in (None, SYSTEM):
            raise BadConversation(Problem.ASSISTANT_FIRST, where)
        if turn.role == before:
            raise BadConversation(Problem.REPEATED_ROLE, where)
        before = turn.role
    if not turns:
        raise BadConversation(Problem.NO_MESSAGES)


def _messages(value: Any, role: str = "") -> Conversation:
    """Args: role: of a bare text."""
    if role and isinstance(value, str):
        return (Message(role, value),)
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(turn, Mapping) for turn in value)
    ):
        raise BadConversation(Problem.NO_MESSAGES, "they are not a list of objects with role and content")
    return tuple(_message(turn, number) for number, turn in enumerate(value, 1))


def _message(turn: Mapping[str, Any], number: int) -> Message:
    role = str(turn.get("role"))
    if turn.get("tool_calls") or role not in ROLES:
        raise BadConversation(Problem.OTHER_ROLE, f"turn {number}, {'a tool call' if role in ROLES else role[:40]}")
    content = turn.get("content")
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise BadConversation(Problem.NOT_TEXT, f"turn {number}, {role}")
    return Message(role, content)
