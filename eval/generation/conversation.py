"""A conversation with a model: what it sees of it, its answers as they come, and the terminal around that."""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType

from common.errors import UserError
from common.os_errors import refusal
from common.paths import expand_path
from common.plain_text import as_typed, print_text
from common.publish import write_whole
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import ASSISTANT, SYSTEM, USER, Message
from eval.generation.decoding import COUNT, FULL, Decoding, goes_on
from eval.generation.options import Sampling
from eval.generation.text_stream import TextStream
from eval.shared.loading import Loaded

ROOM = 4  # of the context a quarter is kept for an answer, or as much as it may take
HELP = """\
/reset         start a new conversation
/system TEXT   start a new conversation with this system message (without TEXT: with none)
/save FILE     write the conversation as a line of JSON, as data_prep/conversations.py reads it
/help          this list
/quit          end, as Ctrl-D does"""
HOW_TO_END = "Ctrl-D ends"


def chat_tokenizer_of(loaded: Loaded) -> ChatTokenizer:
    """Raises UserError where the model has no template for conversations."""
    if not isinstance(loaded.tokenizer, ChatTokenizer):
        raise UserError(
            f"{loaded.checkpoint} has no chat template: train it on conversations first (docs/after-pretraining.md)"
        )
    return loaded.tokenizer


class Chat:
    """A conversation with a model.

    Attributes:
        messages: what has been said, oldest first, a system message before it.
        notes: what a person should know about the last answer.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling, max_tokens: int, seed: int, system: str | None) -> None:
        """Raises UserError where the model has no template, or the template no system messages."""
        self._tokenizer, self._model = chat_tokenizer_of(loaded), loaded.model
        self._sampling, self._max_tokens, self._seed = sampling, max_tokens, seed
        self._answers = 0
        self.notes: list[str] = []
        self.reset(system)

    @property
    def system(self) -> str | None:
        return self.messages[0].content if self.messages and self.messages[0].role == SYSTEM else None

    def reset(self, system: str | None) -> None:
        """Start a new conversation. Raises UserError where its template has no system messages."""
        messages = [] if system is None else [Message(SYSTEM, system)]
        self._tokenizer.prompt_of([*messages, Message(USER, "?")])
        self.messages = messages

    def answer(self, text: str) -> Generator[str, None, None]:
        """The model's answer in pieces, as it is generated; it joins the conversation when the last is taken, or as far
        as it is when the iterator is closed.

        Raises UserError where the message can't be answered; the conversation is then as before.
        """
        self.notes = []
        messages, prompt = self._fitting([*self.messages, Message(USER, text)])
        decoding = Decoding(
            self._model,
            [prompt],
            self._sampling,
            count=self._max_tokens,
            seed=self._seed + self._answers,
            end_ids=self._tokenizer.end_ids,
        )
        stream = TextStream(self._tokenizer, continues=True)
        try:
            for step in decoding:
                for _, token in step:
                    yield stream.push(token)
            yield stream.finish()
        finally:
            self._answers += 1
            self._keep(messages, stream.text, decoding.rows[0].ended)

    def _keep(self, messages: list[Message], answer: str, ended: str | None) -> None:
        if ended == FULL:
            self.notes.append(f"the answer ends where the context of {self._context} tokens is full")
        if ended == COUNT:
            self.notes.append(f"the answer ends after {self._max_tokens} tokens (--max-tokens)")
        if answer.strip():
            self.messages = [*messages, Message(ASSISTANT, answer)]
        else:
            why = "the answer was ended before it began" if ended is None else "the model has nothing to answer"
            self.notes.append(f"{why}: the message is left out of the conversation")

    @property
    def _context(self) -> int:
        return self._model.config.block_size

    def _fitting(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The conversation without as many of its oldest turns as the context can't hold, and the ids of its prompt."""
        prompt = self._tokenizer.prompt_of(messages)
        if goes_on(self._model.config):
            return messages, prompt
        room = self._context - min(self._max_tokens, max(1, self._context // ROOM))
        first = 0 if messages[0].role != SYSTEM else 1
        kept = messages[first:]
        while len(prompt) > room and len(kept) > 1:
            kept = kept[2:]  # a question and its answer
            prompt = self._tokenizer.prompt_of([*messages[:first], *kept])
        if forgotten := len(messages) - first - len(kept):
            self.notes.append(
                f"the context of {self._context} tokens is full: the model no longer sees the {forgotten} oldest turns"
            )
        if len(prompt) > self._context:
            raise UserError(
                f"the message takes {len(prompt)} tokens{' with the system message' * first}, and the model's context "
                f"holds {self._context}: shorten it"
            )
        return [*messages[:first], *kept], prompt


def talk(chat: Chat) -> int:
    """Read messages and commands from standard input until it ends; return the exit status."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (arrow keys and history)
        print(f"/help lists commands, {HOW_TO_END}")
    while True:
        try:
            line = as_typed(input("> " if asks else ""))
            if line.strip() == "/quit":
                return 0
            _respond(chat, line)
        except EOFError:
            print(end="\n" if asks else "")
            return 0
        except KeyboardInterrupt:  # the unfinished line is dropped; it may also have come as an answer just ended
            if not asks:
                return 0
            print(f"\n{HOW_TO_END}")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _respond(chat: Chat, line: str) -> None:
    """Do what a line asks. Raises UserError where that is impossible."""
    command, _, rest = line.strip().partition(" ")
    if not line.strip():
        return
    if not command.startswith("/"):
        _show_answer(chat, line)
    elif command == "/help":
        print(HELP)
    elif command == "/reset":
        chat.reset(chat.system)
        print("a new conversation", file=sys.stderr)
    elif command == "/system":
        chat.reset(rest.strip() or None)
        print("a new conversation", file=sys.stderr)
    elif command == "/save":
        _save(chat, rest.strip())
    else:
        raise UserError(f"there is no command {command}: /help lists them")


def _show_answer(chat: Chat, text: str) -> None:
    answer = chat.answer(text)
    with _noting_ctrl_c() as pressed, contextlib.suppress(KeyboardInterrupt):
        for piece in answer:
            print_text(piece)
            if pressed():
                break
    answer.close()
    print()
    for note in chat.notes:
        print(f"note: {note}", file=sys.stderr)


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within it a Ctrl-C is noted, and a second one raises KeyboardInterrupt; what it gives tells whether one has come.

    So an answer ends between two tokens, and not inside a function of a library, which may be in the middle of a change
    or suppress what is raised there.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _save(chat: Chat, name: str) -> None:
    if not name:
        raise UserError("/save needs the name of a file: /save talk.jsonl")
    path: Path = expand_path(name)
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        write_whole(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(refusal("write", error, path, otherwise="name another file")) from None
    print(f"{path}: {len(messages)} messages", file=sys.stderr)
