"""A template: the text of a conversation, as jinja renders it, by the rules that `transformers` has for such templates.

Templates come with models, perhaps a stranger's: they run in jinja's sandbox, which reaches neither files nor Python.
Two are known by name: ChatML (OpenAI 2023, as Qwen and others have it) and Llama 3's (Meta 2024, of its model card).
Both start with the id that starts a document, as all that a base model has seen does.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.os_errors import refusal
from common.paths import expand_path
from common.plain_text import one_line
from common.regular_file import read_at_most
from data_prep.chat.messages import BadConversation, Message, Problem

MOST_BYTES = 1 << 18  # of a template: the longest in use have 20 KB
SPELLING = re.compile(r"<\|[A-Za-z0-9_]+\|>")  # of the tokens around turns, in templates
NAMED = {
    "chatml": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim "
        "+ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
}


class Template:
    """A chat template in jinja.

    Attributes: text: its source, as exports carry it. spellings: the tokens `<|…|>` that it has, each once, in order.
    """

    def __init__(self, text: str) -> None:
        """Raises UserError for what is no template."""
        self.text = text
        if len(text.encode("utf-8", "replace")) > MOST_BYTES:
            raise UserError(f"the chat template has more than {MOST_BYTES:,} bytes: it can't be one")
        self.spellings = tuple(dict.fromkeys(SPELLING.findall(text)))
        try:
            self._compiled = _environment().from_string(text)
        except Exception as error:  # jinja's own kinds, and Python's for what it compiles
            raise UserError(f"the chat template is not valid jinja: {_words(error)}") from None

    def render(self, messages: Sequence[Message], special: Mapping[str, str], *, prompt: bool) -> str:
        """The text of a conversation.

        Args:
            special: values of `bos_token` and `eos_token`, where the tokenizer has such.
            prompt: with the header of an assistant's turn at the end, which the model then continues.

        Raises BadConversation where the template refuses the conversation, or fails.
        """
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._compiled.render(messages=turns, add_generation_prompt=prompt, **special)
        except Exception as error:  # foreign code may fail in any way
            raise BadConversation(Problem.TEMPLATE, _words(error)) from None
        return text


def read_template(asked: str) -> Template:
    """A template by its name, or from a file. Raises UserError where there is none."""
    if asked in NAMED:
        return Template(NAMED[asked])
    path = expand_path(asked)
    try:
        text = read_at_most(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise UserError(
            f"{refusal('read', error, path)} (a template is {', '.join(NAMED)}, or a file with jinja)"
        ) from None
    except (OverflowError, UnicodeDecodeError):
        raise UserError(f"{path} is no chat template: give {', '.join(NAMED)}, or a file with jinja") from None
    return Template(text)


@functools.cache
def _environment() -> Any:
    """As `transformers` sets it up, but for today's date, which would make training and its repetition differ."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("chat templates need the package jinja2: pip install jinja2") from None

    class Generation(Extension):
        """`{% generation %}` marks answers for other trainers; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _words(error: Exception) -> str:
    return one_line(str(error) or type(error).__name__)[:200]
