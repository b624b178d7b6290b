"""Tokenizers: reversible, equal to tiktoken's own, offline, and with an identity that notices a change."""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.tokenization import tokenizer as tokenization
from data_prep.tokenization.cached_files import GPT2_FILES, GPT2_URL, gpt2_cache_file, place_gpt2_files
from data_prep.tokenization.gpt2_encoding import MARK
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.tokenizer import ByteTokenizer, CharTokenizer

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def tiktoken_gpt2(gpt2):
    return tiktoken.get_encoding("gpt2")


TEXTS = st.text(alphabet=st.sampled_from("ab Zé1\n\t !'’s<|>中😀\u00a0\u0085\x1c\u2028\u200b\u3000"), max_size=200)


@given(text=TEXTS)
def test_gpt2_8k_has_the_ids_of_gpt2s_first_merges(text, tiktoken_gpt2):
    tokenizer = load_tokenizer("gpt2-8k")
    first = {piece: i for piece, i in tiktoken_gpt2._mergeable_ranks.items() if i < 8191}
    short = tiktoken.Encoding("short", pat_str=tiktoken_gpt2._pat_str, mergeable_ranks=first, special_tokens={})
    ids = tokenizer.encode(text + MARK + text)
    assert ids.tolist() == short.encode_ordinary(text + MARK + text)
    assert tokenizer.encode(text).tolist() == short.encode_ordinary(text)
    assert tokenizer.decode(ids) == text + MARK + text
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id) == (8192, 8191)


@given(text=TEXTS)
def test_gpt2_ids_are_tiktokens(text, gpt2, tiktoken_gpt2):
    ids = gpt2.encode(text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2.decode(ids) == text
    assert gpt2.piece_bytes[ids].sum() == len(text.encode())


@given(text=st.text(alphabet=f"a1 .\n{MARK}", max_size=50))
def test_texts_with_the_mark_as_tiktoken_does(text, gpt2, tiktoken_gpt2):
    assert gpt2.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


def test_every_character_between_white_space_as_tiktoken_does(gpt2, tiktoken_gpt2):
    """Whether a character counts as white space, letter, digit or other, alone or several, is tiktoken's word."""
    characters = [chr(point) for point in range(0x30000) if not 0xD800 <= point < 0xE000]
    for start in range(0, len(characters), 1 << 14):
        text = "".join(f"a {c}{c}b \t{c} 1" for c in characters[start : start + (1 << 14)])
        assert gpt2.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)


@settings(max_examples=300)
@given(text=TEXTS, characters=st.integers(1, 12))
def test_long_texts_in_pieces_have_the_ids_of_the_whole(text, characters, gpt2, tiktoken_gpt2):
    before = tokenization.SEGMENT_CHARACTERS
    tokenization.SEGMENT_CHARACTERS = characters
    try:
        assert gpt2.encode(text).tolist() == tiktoken_gpt2.encode_ordinary(text)
    finally:
        tokenization.SEGMENT_CHARACTERS = before


def test_text_never_becomes_end_of_text(gpt2):
    ids = gpt2.encode("a <|endoftext|> b")
    assert gpt2.end_of_text_id == 50256
    assert 50256 not in ids
    assert gpt2.decode(ids) == "a <|endoftext|> b"


def test_lone_surrogates_as_tiktoken_does(gpt2, tiktoken_gpt2):
    assert gpt2.encode("a\ud800b").tolist() == tiktoken_gpt2.encode_ordinary("a\ud800b")


def test_broken_utf8_decodes_to_replacement_characters(gpt2):
    several = gpt2.encode("龘")
    assert len(several) > 1
    assert "\ufffd" in gpt2.decode(several[:1])
    assert ByteTokenizer().decode([0xE4, 256, 0x61]) == "\ufffd<|endoftext|>a"


@pytest.mark.parametrize("bad", [[-1], [50257]])
def test_ids_outside_the_vocabulary_are_refused(bad, gpt2):
    with pytest.raises(ValueError, match="0 … 50256"):
        gpt2.decode(bad)


@given(st.text(max_size=60))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    clean = text.encode("utf-8", "replace").decode()
    assert tokenizer.encode(text).tolist() == list(clean.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == clean


@given(st.text(alphabet="ab中😀\n", max_size=60))
def test_characters_round_trip(text):
    tokenizer = load_tokenizer(CharTokenizer("\nab中😀").spec)
    ids = tokenizer.encode(text)
    assert ids.tolist() == ["\nab中😀".index(symbol) for symbol in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes[ids].sum() == len(text.encode())


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match="'z'"):
        CharTokenizer("abc").encode("abzc")
    with pytest.raises(UserError, match="'中'"):
        CharTokenizer("abc").encode("a中")


def test_specs_tell_vocabularies_apart():
    specs = [
        load_tokenizer("gpt2").spec,
        load_tokenizer("byte").spec,
        CharTokenizer("ab").spec,
        CharTokenizer("ba").spec,
    ]
    specs.append(CharTokenizer("ab", end_of_text=True).spec)
    assert len({spec["sha256"] for spec in specs}) == len(specs)
    for spec in specs:
        assert load_tokenizer(spec).spec == spec


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError, match="prepare the data again"):
        load_tokenizer(ByteTokenizer().spec | {"sha256": "0" * 64})
    with pytest.raises(UserError, match="unknown tokenizer"):
        load_tokenizer("gpt5")


def test_uint32_above_65536_ids():
    symbols = "".join(map(chr, range(0x10000, 0x10000 + 65536)))
    assert CharTokenizer(symbols).dtype == np.uint16
    larger = CharTokenizer(symbols, end_of_text=True)
    assert larger.dtype == np.uint32
    assert larger.encode(symbols[-1]).tolist() == [65535]


ENCODE = (
    "from data_prep.tokenization.loading import load_tokenizer\n"
    "print(load_tokenizer('gpt2').encode('hello world').tolist())"
)


def start_encoding(
    environment: dict[str, str], *, code: str = ENCODE, project: Path = PROJECT
) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TIKTOKEN_CACHE_DIR", "LONGHAUL_CACHE")}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_many_processes_fill_an_empty_cache_together(tmp_path):
    processes = [start_encoding({"LONGHAUL_CACHE": str(tmp_path)}) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (out.strip(), process.returncode) == ("[31373, 995]", 0), err
    assert len(list((tmp_path / "tiktoken").iterdir())) == 2  # nothing left aside


def test_a_damaged_cache_file_is_put_right(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    place_gpt2_files()
    gpt2_cache_file("vocab.bpe").write_bytes(b"torn")
    place_gpt2_files()
    assert hashlib.sha256(gpt2_cache_file("vocab.bpe").read_bytes()).hexdigest() == GPT2_FILES["vocab.bpe"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")), "its SHA-256 differs"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"e r\n", b"r e\n", 1)), "its SHA-256 differs"),
    ],
)
def test_a_damaged_vocabulary_is_one_line_and_no_download(tmp_path, damage, words):
    for folder in ("common", "data_prep"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    damage(tmp_path / "data_prep" / "tokenization" / "gpt2_vocabulary" / "vocab.bpe")
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise SystemExit('it went to the network')\n"
        "socket.socket.connect = refuse\n"
        "from common.errors import exit_on_user_error\n"
        "from data_prep.tokenization.loading import load_tokenizer\n"
        "exit_on_user_error(lambda: load_tokenizer('gpt2') and 0)"
    )
    process = start_encoding({"LONGHAUL_CACHE": str(tmp_path / "cache")}, code=code, project=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert words in err
    assert "git checkout -- vocab.bpe" in err


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_leaves_the_line_ends_as_they_are(tmp_path):
    """Also where it is set up to change them, as on Windows: the hashes of what is read would differ."""
    vocabulary = Path("data_prep/tokenization/gpt2_vocabulary/vocab.bpe")

    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "core.autocrlf=true", *arguments], check=True, capture_output=True)

    (tmp_path / vocabulary).parent.mkdir(parents=True)
    for name in (vocabulary, Path(".gitattributes")):
        shutil.copy(PROJECT / name, tmp_path / name)
    git("init")
    git("add", ".")
    (tmp_path / vocabulary).unlink()
    git("checkout", "--", str(vocabulary))
    assert (tmp_path / vocabulary).read_bytes() == (PROJECT / vocabulary).read_bytes()


def test_tiktoken_still_names_the_files_that_are_placed():
    openai_public = importlib.import_module("tiktoken_ext.openai_public")

    named = [value for value in openai_public.gpt2.__code__.co_consts if isinstance(value, str)]
    for name, sha256 in GPT2_FILES.items():
        assert any(value.endswith(f"/{name}") and value.startswith(GPT2_URL) for value in named)
        assert sha256 in named
