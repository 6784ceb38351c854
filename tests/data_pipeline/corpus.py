"""A small corpus with planted defects, as a folder of text files."""

import random
from pathlib import Path

WORDS = [
    first + second
    for first in ("river", "stone", "garden", "paper", "silver", "winter")
    for second in ("side", "field", "man", "craft", "bridge")
]


JOINTS = (" of the ", " and a ", " with ", " ", " in the ", " has a ", " by a ", " that was ", " for this ", " or ")


def prose(seed: int, sentences: int = 30) -> str:
    """Sentences of random words with the small words of English between them: no two seeds share long runs of words."""
    generator = random.Random(seed)
    lines = []
    for _ in range(sentences):
        words = generator.choices(WORDS, k=generator.randint(6, 14))
        line = "".join(word + generator.choice(JOINTS) for word in words[:-1]) + words[-1]
        lines.append(f"{line.capitalize()} {generator.randint(0, 9999)}.")
    return "\n".join(lines) + "\n"


def plant(folder: Path, good: int = 40) -> dict[str, set[str]]:
    """Writes the corpus; returns the names of the files planted for each filter that must drop them. Of duplicates, all
    but one of each name's group go."""
    folder.mkdir(parents=True)
    for number in range(good):
        (folder / f"good{number:03d}.txt").write_text(prose(number))
    (folder / "tiny.txt").write_text("nothing")
    (folder / "binary.txt").write_bytes(random.Random(1).randbytes(4000))
    (folder / "noise.txt").write_text("".join(random.Random(2).choices("!@#$%^&*()_+{}|:<>?", k=3000)))
    (folder / "again.txt").write_text("Buy the very same thing here today.\n" * 60)
    for number in range(3):
        (folder / f"copy{number}.txt").write_text(prose(1000))
        (folder / f"near{number}.txt").write_text(prose(2000).replace("river", f"brook{number}", 1))
    return {
        "length": {"tiny.txt"},
        "garbled": {"binary.txt"},
        "symbols": {"noise.txt"},
        "repetition": {"again.txt"},
        "exact_duplicate": {f"copy{number}.txt" for number in range(3)},
        "near_duplicate": {f"near{number}.txt" for number in range(3)},
    }
