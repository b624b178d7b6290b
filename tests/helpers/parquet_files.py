"""Parquet files in FineWeb-Edu's schema, made of nothing but a seed."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
        ("score", pa.float64()),
        ("int_score", pa.int64()),
    ]
)
_WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "his",
    "but",
    "at",
    "are",
    "this",
    "have",
    "from",
    "or",
    "had",
    "an",
    "they",
    "which",
    "energy",
    "photosynthesis",
    "students",
    "history",
    "river",
    "algorithm",
    "naïve",
    "Zürich",
    "中文",
    "1789",
    "3.14",
    "e.g.",
    "don't",
    "<|endoftext|>",
    "😀",
    "experiment",
    "temperature",
    "civilisation",
    "molecule",
    "equation\n\n",
]


def texts(count: int, seed: int, mean_words: int = 60) -> list[str]:
    """`count` documents; some empty, some alike, one long."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        words = generator.integers(0, len(_WORDS), size=1 + generator.poisson(mean_words))
        found.append(" ".join(_WORDS[word] for word in words) + f" ({seed}.{number})")
    if count > 10:
        found[3], found[7] = "", found[2]
        found[5] = found[5] * 40
    return found


def write_parquet(path: Path, documents: list[str], *, row_group: int = 100) -> None:
    """A file with the documents as its text column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(documents)
    table = pa.table(
        {
            "text": documents,
            "id": [f"<urn:uuid:{path.stem}-{number}>" for number in range(count)],
            "dump": ["CC-MAIN-2024-10"] * count,
            "url": [f"https://example.org/{number}" for number in range(count)],
            "file_path": ["s3://commoncrawl/x.warc.gz"] * count,
            "language": ["en"] * count,
            "language_score": [0.97] * count,
            "token_count": [len(text) // 4 for text in documents],
            "score": [3.2] * count,
            "int_score": [3] * count,
        },
        schema=SCHEMA,
    )
    pq.write_table(table, path, row_group_size=row_group, compression="zstd")


def make_source(folder: Path, *, files: int = 3, documents: int = 400, row_group: int = 100) -> list[list[str]]:
    """A folder laid out as sample/10BT on the hub; returns every file's documents."""
    made = []
    for number in range(files):
        found = texts(documents, seed=number)
        write_parquet(folder / "sample" / "10BT" / f"{number:03d}_00000.parquet", found, row_group=row_group)
        made.append(found)
    return made
