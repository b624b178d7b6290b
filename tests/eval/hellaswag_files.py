"""HellaSwag examples made up for tests, in the official form."""

import json
import random
from pathlib import Path

_WORDS = ["the", "a", "man", "woman", "is", "on", "Roof", "they", "[header]", "[title]", "3", "times!", "café", "cube."]


def official_rows(count: int, seed: int = 0, *, words_at_most: int = 20) -> list[dict]:
    """Rows with everything that the official file has: WikiHow's marks, second halves with capitals, and without."""
    chance = random.Random(seed)

    def words(least, most):
        return " ".join(chance.choice(_WORDS) for _ in range(chance.randint(least, most)))

    rows = []
    for number in range(count):
        first, second = words(1, words_at_most), chance.choice(["", "He", "the Lady", "she (Anna)"])
        rows.append(
            {
                "ind": number,
                "activity_label": chance.choice(["Roof shingle removal", "Personal Care  and Style", "Canoeing"]),
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}",  # with a space at its end where there is no second half
                "endings": [f"{words(0, words_at_most)} end{chance.choice(['', '.', '  '])}" for _ in range(4)],
                "label": number % 4 if number % 2 else str(number % 4),
            }
        )
    return rows


def write_official(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
