"""Vocabularies of one's own: learned from a bounded sample, the same file every time, ids as the exported file's."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data_prep.corpora.text_sample import Document, Sample
from data_prep.token_sets.manifest import PADDING_MULTIPLE, Manifest
from data_prep.token_sets.token_set import TokenSet
from data_prep.tokenization import faster_encoding
from data_prep.tokenization.bpe_training import MEMORY_PER_BYTE, PATTERNS, describe_size, train_bpe
from data_prep.tokenization.byte_level import BYTE_SHOWN_AS, shown_bytes
from data_prep.tokenization.huggingface_tokenizer import HuggingFaceTokenizer
from data_prep.tokenization.loading import load_tokenizer
from data_prep.tokenization.own_vocabulary import read_tokenizer_file
from data_prep.tokenization.tokenizer_choice import choose_tokenizer
from eval.hugging_face.tokenizer_files import SPEC_FILE, write_tokenizer_files
from eval.hugging_face.tokenizer_import import recognise_tokenizer
from model.config import ModelConfig
from tests.helpers.parquet_files import texts

PROJECT = Path(__file__).resolve().parents[2]
Done = subprocess.CompletedProcess[str]
SPELT = "<|endoftext|> and <|endoftext|><|endoftext|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of documents, text without any space among them, and a vocabulary learned from them."""
    folder = tmp_path_factory.mktemp("own")
    documents = [text for text in texts(1500, seed=1) if text]
    (folder / "texts").mkdir()
    for name, part in (("a.jsonl", documents[::2]), ("b.jsonl", [*documents[1::2], SPELT, "日本語" * 50, "x" * 9999])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / "texts" / name).write_text(lines, encoding="utf-8")
    done = run(folder, "texts", "--vocab-size", "500", "--out", "own.json", "--json", "own-figures.json")
    assert done.returncode == 0, done.stderr
    assert "bytes per token" in done.stdout
    return folder


def run(
    folder: Path, *options: str, script: str = "train_tokenizer.py", **env: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "data_prep" / script), *options]
    return subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True, timeout=120)


def own(folder: Path) -> HuggingFaceTokenizer:
    return read_tokenizer_file(folder / "own.json")


def test_the_same_file_for_any_number_of_threads_and_hash_seed(folder: Path) -> None:
    for workers in ("1", "3"):
        done = run(folder, "texts", "--vocab-size", "500", "--workers", workers, "--out", f"{workers}.json",
                   PYTHONHASHSEED=workers)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert (folder / f"{workers}.json").read_bytes() == (folder / "own.json").read_bytes()


def test_figures_name_count_largest_id_and_padded_size(folder: Path) -> None:
    figures = json.loads((folder / "own-figures.json").read_text())
    assert (figures["tokens"], figures["largest_id"], figures["padded"]) == (500, 499, 512)
    assert set(figures["bytes_per_token"]) == {"own", "gpt2"}
    assert figures["held_back_bytes"] > 0
    assert ModelConfig().vocab_multiple == PADDING_MULTIPLE
    assert "(--vocab-size 640 or 768 leaves none of them unused)" in describe_size(700)
    assert describe_size(32768) == "32,768 ids, the largest 32,767; a model's table has 32,768 rows"


def naive_merges(pieces: list[bytes], most: int) -> list[tuple[bytes, bytes]]:
    """The most frequent pair first; of equally frequent ones that with the lower ids, bytes as they are shown."""
    ids = {bytes([byte]): number for number, (_, byte) in enumerate(sorted(BYTE_SHOWN_AS.items()))}
    words = [tuple(bytes([byte]) for byte in piece) for piece in pieces]
    made: list[tuple[bytes, bytes]] = []
    while len(made) < most:
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], ids[pair[0]], ids[pair[1]]))
        ids[b"".join(best)] = len(ids)
        made.append(best)
        words = [merged(word, best) for word in words]
    return made


def merged(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> tuple[bytes, ...]:
    found: list[bytes] = []
    for part in word:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return tuple(found)


def test_merges_are_those_of_a_naive_trainer() -> None:
    text = " ".join(filter(None, texts(60, seed=3)))[:6000] + " 日本語 naïve 1234567\n\n\t== == it's IT'S"
    learned = json.loads(train_bpe([text], 257 + 120, "gpt4", 2))["model"]["merges"]
    pieces = [piece.encode() for piece in pytest.importorskip("regex").findall(PATTERNS["gpt4"], text)]
    assert b"".join(pieces) == text.encode()
    assert [tuple(map(shown_bytes, pair)) for pair in learned] == naive_merges(pieces, 120)


def test_every_byte_is_an_id_and_the_end_of_a_text_is_the_last(folder: Path) -> None:
    tokenizer = own(folder)
    assert {tokenizer.text_bytes(np.array([i])) for i in range(256)} == {bytes([byte]) for byte in range(256)}
    assert (tokenizer.vocab_size, tokenizer.end_of_text_id, tokenizer.begin_of_text_id) == (500, 499, 499)


@given(text=st.text(max_size=200) | st.text(alphabet="<|endoftx>1 \n'sS\r\t", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_without_special_ids(own_tokenizer: HuggingFaceTokenizer, text: str) -> None:
    for whole in (text, f"{text}{SPELT}{text}"):
        ids = own_tokenizer.encode(whole)
        assert own_tokenizer.end_of_text_id not in ids
        assert own_tokenizer.decode(ids) == whole
        assert own_tokenizer.text_bytes(ids) == whole.encode()


@pytest.fixture(scope="module")
def own_tokenizer(folder: Path) -> HuggingFaceTokenizer:
    return own(folder)


def test_a_megabyte_of_one_character_is_encoded_in_time_that_grows_as_the_text(
    own_tokenizer: HuggingFaceTokenizer,
) -> None:
    for character in ("a", " ", "0", "日"):  # a quadratic search would take hours
        text = character * (1_000_000 // len(character.encode()))
        assert own_tokenizer.decode(own_tokenizer.encode(text)) == text


def test_ids_are_those_of_the_exported_file_and_an_import_is_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = own(folder)
    write_tokenizer_files(tokenizer, tmp_path, 64)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    exported.encode_special_tokens = True  # else it reads what spells a special token as one
    documents = [*filter(None, texts(10_500, seed=7))][:10_000]
    assert len(documents) == 10_000
    theirs = exported.encode_batch(documents, add_special_tokens=False)
    assert [tokenizer.encode(text).tolist() for text in documents] == [found.ids for found in theirs]
    config = {"eos_token_id": 499, "bos_token_id": 499}
    assert recognise_tokenizer(tmp_path, config).spec == tokenizer.spec
    (tmp_path / SPEC_FILE).unlink()  # then it is one that puts its end of text before a text, as the export does
    again = recognise_tokenizer(tmp_path, config)
    assert (again.begins_contexts, again.begin_of_text_id, again.vocab_size) == (True, 499, 500)
    assert [again.encode(text).tolist() for text in documents[:500]] == [found.ids for found in theirs[:500]]
    assert load_tokenizer(json.loads(json.dumps(tokenizer.spec))).spec == tokenizer.spec


def test_tiktoken_gives_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each pattern: words, digits, contractions, several scripts, and white space, of which tokens were learned."""
    monkeypatch.setattr(faster_encoding, "WORTH_IT", 0)
    white = "".join(f"x{space}\n1.{space}\r\n{space * 2}\ny" for space in (" ", "\t", "\u3000")) * 3
    learned = f"{' '.join(filter(None, texts(60, seed=3)))} it's IT'LL 1234  \n\n == é日 {white}"
    chance = random.Random(4)
    signs = "aBſsSKk'tlVeRdM 012٣ \n\r\t\x0b\x85\u2028\u3000\u00a0.,-日é́🙂\u200d"
    rows = [white, "", "a  \x10 b", "\ud800  x", *("".join(chance.choices(signs, k=40)) for _ in range(2000))]
    for pattern in PATTERNS:
        text = train_bpe([learned], 600, pattern, 1)
        tokenizer = HuggingFaceTokenizer.of(text, json.loads(text)["added_tokens"][0]["id"])
        assert faster_encoding.FasterEncoding(json.loads(text)).encode("a") is not None
        package = tokenizers.Tokenizer.from_str(text)
        theirs = package.encode_batch_fast([row.encode("utf-8", "replace").decode() for row in rows])
        assert [tokenizer.encode(row).tolist() for row in rows] == [found.ids for found in theirs]
        # a mark of ours, or a character that only one of both packages may know: left to `tokenizers`
        fast = faster_encoding.FasterEncoding(json.loads(text))
        assert [fast.encode(row) for row in ("a \x10", "a \U000e0fff")] == [None, None]


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_characters_are_of_the_same_kind_for_tiktoken_and_tokenizers(pattern: str) -> None:
    """A letter, digit or space makes one piece with another of its kind. (All 282,229 characters were tried once.)"""
    known = [
        point for point in range(0x20000) if unicodedata.category(chr(point)) not in ("Cn", "Cs") and point != 0x10
    ]
    some = [*known[:0x500], *known[0x500::9]]
    probes = [probe.format(chr(point)) for point in some for probe in ("x{}", "1{}", "\t{}", "'{}x")]
    whole = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(probe.encode() for probe in probes)])
    encoding = tiktoken.Encoding(
        "probes",
        pat_str=faster_encoding.WITHOUT_LOOK_AHEAD[pattern],
        mergeable_ranks={piece: rank for rank, piece in enumerate(whole)},
        special_tokens={},
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pattern]), "isolated")
    ours = [len(encoding.encode_ordinary(probe)) == 1 for probe in probes]
    assert ours == [len(split.pre_tokenize_str(probe)) == 1 for probe in probes]
    assert {True, False} == set(ours)


def test_a_vocabulary_that_tiktoken_would_merge_otherwise_is_left_to_tokenizers(
    own_tokenizer: HuggingFaceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bc` comes before `ab`, so the listed merge of `ab` and `c` never happens; tiktoken would merge `a` and `bc`."""
    monkeypatch.setattr(faster_encoding, "WORTH_IT", 0)
    description = json.loads(own_tokenizer.json)
    alphabet = {shown: number for number, shown in enumerate(BYTE_SHOWN_AS)}
    description["model"] |= {
        "vocab": alphabet | {"bc": 256, "ab": 257, "abc": 258},
        "merges": [["b", "c"], ["a", "b"], ["ab", "c"]],
    }
    assert faster_encoding.FasterEncoding(description).encode("abc") is None
    description["added_tokens"][0]["id"] = 259
    assert HuggingFaceTokenizer.of(json.dumps(description), 259).encode("abc").tolist() == [alphabet["a"], 256]


def test_a_preparation_takes_the_file_and_its_set_teaches_the_same_vocabulary(folder: Path) -> None:
    done = run(folder, "texts", "--tokenizer", "own.json", "--out", "set", "--workers", "0", script="text_files.py")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(folder / "set")
    assert manifest.vocabulary == {"tokens": 500, "largest_id": 499, "padded": 512}
    assert manifest.tokenizer == own(folder).spec
    stream = TokenSet.open(folder / "set").split("train")
    assert SPELT in own(folder).decode(stream.read(0, len(stream)))
    done = run(folder, "set", "--vocab-size", "500", "--out", "again.json")
    assert (done.returncode, "GPT-2's" in done.stdout) == (0, True), done.stderr
    assert read_tokenizer_file(folder / "again.json").vocab_size == 500
    stored = json.loads((folder / "set" / "manifest.json").read_text())
    stored["vocabulary"]["largest_id"] = 500
    (folder / "set" / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="vocabulary is"):
        Manifest.read(folder / "set")


class Corpus:
    """A corpus of 8 MB without spaces, in which no two stretches are alike."""

    text_bytes, held_bytes = 8_000_000, 250_000

    def documents(self) -> Iterator[Document]:
        generator = random.Random(5)
        for number in range(1000):
            yield Document(str(number), "".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=8000)), False)


def test_a_sample_is_seeded_and_bounded() -> None:
    def drawn(seed: int, most_bytes: int, most_distinct: int = 1 << 40) -> tuple[Sample, list[str]]:
        sample = Sample(Corpus(), seed, most_bytes, most_distinct, 10_000)
        return sample, list(sample.texts())

    sample, first = drawn(1, 800_000)
    assert 500_000 < sample.bytes <= 800_000
    assert drawn(1, 800_000)[1] == first
    assert drawn(2, 800_000)[1] != first
    few, _ = drawn(1, 8_000_000, 300_000)
    assert (few.bytes, few.ended_by) == (296_000, "it has as many distinct words as --max-distinct allows")


def test_memory_is_bounded_on_text_without_spaces(tmp_path: Path) -> None:
    with open(tmp_path / "long.txt", "w", encoding="utf-8") as file:
        file.writelines(document.text for document in Corpus().documents())
    script = (
        "from common.processes import peak_resident_bytes; from data_prep import train_tokenizer as command; "
        "before = peak_resident_bytes(); command.main(); print(peak_resident_bytes() - before)"
    )
    options = ["long.txt", "--vocab-size", "1000", "--max-distinct", "300K", "--out", "t.json"]
    done = subprocess.run([sys.executable, "-c", script, *options], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"PYTHONPATH": str(PROJECT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the sample ends before the corpus" in done.stdout
    taken = int(done.stdout.split()[-1])
    assert taken < 300_000 * MEMORY_PER_BYTE + 150e6 < 8_000_000 * MEMORY_PER_BYTE / 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "is no tokenizer.json"),
        ("{}", "has no token <|endoftext|>"),
        ('{"added_tokens": [1]}', "is no tokenizer.json"),
        (b"\xff\xfe", "is no tokenizer.json"),
    ],
)
def test_another_file_is_refused_in_a_line(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(words)):
        choose_tokenizer(str(path), ["gpt2"])


def test_what_can_not_work_is_refused_before_the_work(folder: Path) -> None:
    for options, words in (
        (["texts", "--out", "own.json"], "own.json is there already"),
        (["texts", "--out", "n.json", "--vocab-size", "200"], "--vocab-size is 200: use 258"),
        (["texts", "--out", "n.json", "--sample-bytes", "3B"], "counts in 32 bits"),
        (["nowhere", "--out", "n.json"], "there is no file or folder nowhere"),
    ):
        done = run(folder, *options)
        assert (done.returncode, words in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
