"""Talking to a model: eval/chat.py from a pipe, eval/generate.py --chat, and the exports that others talk to."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import UserError
from data_prep.chat.chat_tokenizer import ChatTokenizer
from data_prep.chat.messages import ASSISTANT, SYSTEM, USER, Message, conversation_of
from data_prep.chat.template import read_template
from data_prep.corpora.workers import ignoring_interrupts
from data_prep.tokenization.bpe_training import train_bpe
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.loading import load_tokenizer
from eval.generation.conversation import Chat, talk
from eval.generation.options import Sampling
from eval.hugging_face.export import export
from eval.hugging_face.import_model import import_model
from eval.shared.loading import Loaded, load_checkpoint
from tests.eval.checkpoints import generate_always, write_checkpoint
from tests.helpers.hf_tokenizers import CORPUS
from tests.helpers.ranks import _CONTEXT, _PRELOADED
from tests.helpers.terminal_session import CTRL_C, CTRL_D, UP, TerminalSession
from tests.model.small import random_tokens

EVAL = Path(__file__).resolve().parents[2] / "eval"
GREEDY = Sampling(temperature=0.0)


def chat_spec(kind: str = "byte", template: str = "chatml") -> dict[str, Any]:
    if kind == "own":
        base = HuggingFaceTokenizer.of(train_bpe(CORPUS, 320, "gpt4", threads=1), 319)
        return ChatTokenizer.of(base, read_template(template)).spec
    return ChatTokenizer.of(load_tokenizer(kind), read_template(template)).spec


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    write_checkpoint(folder / "checkpoints", tokenizer=chat_spec(), noise=0.3, block_size=128)
    return folder


def script(name: str, *arguments: object, text: str = "", status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, str(EVAL / name), *map(str, arguments)],
        input=text.encode(),
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_a_conversation_from_a_pipe(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    options = (run, "--system", "Be brief.", "--preset", "greedy", "--max-tokens", 8)
    lines = ["Hello", "", "/nothing", "And <|im_end|>?", f"/save {saved}", "/reset", "Hello", "/quit", "never read"]
    out, said = script("chat.py", *options, text="\n".join(lines))
    (record,) = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    system, *turns = conversation_of(record)

    assert (system, [turn.role for turn in turns]) == (Message(SYSTEM, "Be brief."), [USER, ASSISTANT] * 2)
    assert [turns[0].content, turns[2].content] == ["Hello", "And <|im_end|>?"]
    first, second = turns[1].content, turns[3].content
    assert out == f"{first}\n{second}\n{first}\n"
    assert "there is no command /nothing" in said and "5 messages" in said
    tokenizer, loaded = load_tokenizer(chat_spec()), load_checkpoint(run)
    assert isinstance(tokenizer, ChatTokenizer)
    with torch.no_grad():
        logits = loaded.model(torch.tensor([tokenizer.prompt_of([system, turns[0]])]))
    assert int(logits[0, -1].argmax()) == tokenizer.encode(first)[0]


def always(loaded: Loaded, token: int) -> Loaded:
    generate_always(loaded.model, token)
    return loaded


def test_the_oldest_turns_are_forgotten_where_the_context_is_full(run: Path) -> None:
    chat = Chat(always(load_checkpoint(run), ord("A")), GREEDY, 10, 0, "Brief.")
    notes = []
    for text in ("1" * 20, "2" * 20, "3" * 20):
        assert "".join(chat.answer(text)) == "A" * 10
        notes.append(chat.notes)

    cut = "the answer ends after 10 tokens (--max-tokens)"
    full = "the context of 128 tokens is full: the model no longer sees the 2 oldest turns"
    assert notes == [[cut], [cut], [full, cut]]
    kept = [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]
    assert [message.role for message in chat.messages] == kept and chat.messages[1].content == "2" * 20
    before = chat.messages
    with pytest.raises(UserError, match="with the system message, and the model's context holds 128: shorten it"):
        list(chat.answer("x" * 200))
    assert chat.messages == before
    chat.reset(None)
    pieces = chat.answer("one")
    next(pieces)
    pieces.close()
    assert chat.messages == [Message(USER, "one"), Message(ASSISTANT, "A")]


def test_a_model_that_always_ends_its_turn_has_nothing_to_answer(run: Path) -> None:
    loaded = load_checkpoint(run)
    tokenizer = loaded.tokenizer
    assert isinstance(tokenizer, ChatTokenizer)
    always(loaded, tokenizer.end_of_turn_id)
    chat = Chat(loaded, GREEDY, 10, 0, None)

    assert "".join(chat.answer("Hello")) == "" and chat.messages == []
    assert chat.notes == ["the model has nothing to answer: the message is left out of the conversation"]


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints", tokenizer=chat_spec(), always=ord("A"), block_size=128)
    options = ["--system", "Brief.", "--preset", "greedy", "--max-tokens", "10"]
    with TerminalSession(["eval/chat.py", "run", *options], tmp_path) as chat:
        chat.until("/help lists commands, Ctrl-D ends")
        for text in ("1" * 20, "2" * 20, "3" * 20):
            chat.until("> ")
            chat.type(f"{text}\r")
            shown = chat.until("the answer ends after 10 tokens (--max-tokens)")
            assert f"\n{'A' * 10}\r\n" in shown
        assert "the context of 128 tokens is full: the model no longer sees the 2 oldest turns" in shown
        chat.until("> ")
        for line, said in (
            ("/save kept.jsonl", "kept.jsonl: 5 messages"),
            ("/reset", "a new conversation"),
            ("/save reset.jsonl", "reset.jsonl: 1 messages"),
            ("/system Be kind.", "a new conversation"),
            ("x" * 200, "error: the message takes "),
            ("/nothing", "error: there is no command /nothing: /help lists them"),
        ):
            chat.type(f"{line}\r")
            chat.until(said)
            chat.until("> ")
        chat.type(UP + UP + UP)  # what was typed before, to be sent again
        chat.until("/system Be kind.")
        chat.type("er\r")
        chat.until("a new conversation")
        chat.until("> ")
        chat.type("/save again.jsonl\r")
        chat.until("again.jsonl: 1 messages")
        chat.type(CTRL_D)
        assert chat.status() == 0

    def saved(name: str) -> list[str]:
        return [message["content"] for message in json.loads((tmp_path / name).read_text())["messages"]]

    assert saved("kept.jsonl") == ["Brief.", "2" * 20, "A" * 10, "3" * 20, "A" * 10]
    assert (saved("reset.jsonl"), saved("again.jsonl")) == (["Brief."], ["Be kind.er"])


@pytest.fixture
def server_of_a_preparation() -> None:
    """The fork server is one that a preparation has started, which blocks SIGINT there."""
    forkserver._forkserver._stop()  # type: ignore[attr-defined] # made for unit tests
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    with ignoring_interrupts():
        forkserver.ensure_running()


@pytest.mark.usefixtures("server_of_a_preparation")
def test_ctrl_c_ends_an_answer_and_not_the_chat(tmp_path: Path) -> None:
    endless = {"position": "rope", "window": 64, "block_size": 64}
    write_checkpoint(tmp_path / "run" / "checkpoints", tokenizer=chat_spec(), always=ord("A"), **endless)
    with TerminalSession(["eval/chat.py", "run", "--max-tokens", "1000000000"], tmp_path) as chat:
        for message in ("Hello", "Again"):
            chat.until("> ")
            chat.type(f"{message}\r")
            chat.until("A" * 20)  # while it is generated
            chat.type(CTRL_C)
        chat.until("> ")
        chat.type("half a line")
        chat.until("half a line")
        chat.until_it_waits()
        chat.type(CTRL_C)
        chat.until("Ctrl-D ends")
        chat.until("> ")
        chat.type("/save talk.jsonl\r")
        chat.until("4 messages")
        chat.type("/quit\r")
        assert chat.status() == 0
    turns = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["Hello", "Again"]
    assert all(set(turn["content"]) == {"A"} and len(turn["content"]) >= 20 for turn in turns[1::2])


class Deaf(Chat):
    """Drops a KeyboardInterrupt, as a library may that suppresses what it calls raises."""

    def answer(self, text: str) -> Generator[str, None, None]:
        self.taken = 0
        for self.taken in range(1, 1000):
            if self.taken == 3:
                with contextlib.suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            yield "A"


def test_a_ctrl_c_ends_an_answer_wherever_it_comes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, before = Deaf(load_checkpoint(run), GREEDY, 6, 0, None), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    assert talk(chat) == 0
    assert chat.taken == 3 and signal.getsignal(signal.SIGINT) is before


def test_generate_answers_messages(run: Path, tmp_path: Path) -> None:
    options = ("--preset", "greedy", "--max-tokens", 6)
    script("generate.py", run, "--chat", "--prompt", "Hello", "--prompt", "2+2?", *options, "--json", tmp_path / "a")
    texts = [text["text"] for text in json.loads((tmp_path / "a").read_text())["texts"]]
    chat = Chat(load_checkpoint(run), GREEDY, 6, 0, None)
    for prompt, text in zip(("Hello", "2+2?"), texts, strict=True):
        chat.reset(None)
        assert "".join(chat.answer(prompt)) == text
    base = write_checkpoint(tmp_path / "base")
    for name, more in (("generate.py", ("--chat", "--prompt", "Hello")), ("chat.py", ())):
        assert "has no chat template: train it on" in script(name, base, *more, status=2)[1]


@pytest.mark.parametrize(
    ("kind", "template"), [("gpt2", "chatml"), ("own", "llama3"), ("byte", "chatml")], ids=["gpt2", "own", "byte"]
)
def test_exports_talk_by_the_same_ids_stop_and_come_back(tmp_path: Path, kind: str, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    spec = chat_spec(kind, template)
    checkpoint = write_checkpoint(tmp_path / "run", tokenizer=spec, noise=0.3, block_size=64)
    export(checkpoint, tmp_path / "out")
    loaded, tokenizer = load_checkpoint(checkpoint), load_tokenizer(spec)
    assert isinstance(tokenizer, ChatTokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "Is it  é?\n"}]
    prompt = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == tokenizer.prompt_of([Message(USER, turns[0]["content"])])
    assert set(model.generation_config.eos_token_id) == {tokenizer.end_of_text_id, tokenizer.end_of_turn_id}
    with torch.no_grad():  # the next token is the end of turn
        hidden = model.base_model(torch.tensor([prompt]))[0][0, -1]
        model.lm_head.weight[tokenizer.end_of_turn_id] = hidden * 100
    generated = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=9)
    assert generated[0, len(prompt) :].tolist() == [tokenizer.end_of_turn_id]

    import_model(tmp_path / "out", tmp_path / "back", None)
    back, tokens = load_checkpoint(tmp_path / "back"), random_tokens(1, 16, vocab=spec["vocab_size"])
    assert back.tokenizer.spec == spec
    with torch.no_grad():
        torch.testing.assert_close(back.model(tokens), loaded.model(tokens))
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(UserError, match="describes another tokenizer than the files beside it"):
        import_model(tmp_path / "out", tmp_path / "changed", None)
    (tmp_path / "out" / "longhaul_tokenizer.json").unlink()
    if kind != "own":
        return
    (tmp_path / "out" / "chat_template.jinja").write_text(read_template("llama3").text, encoding="utf-8")
    import_model(tmp_path / "out", tmp_path / "foreign", None)  # as a stranger's: all tokens are its own
    foreign = load_checkpoint(tmp_path / "foreign").tokenizer
    assert isinstance(foreign, ChatTokenizer) and foreign.turn_tokens == ()
    assert foreign.prompt_of([Message(USER, turns[0]["content"])]) == prompt
