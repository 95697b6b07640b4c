"""Retrieval at any depth and length: key-value pairs (2307.03172) and a needle in a haystack (2404.06654)."""

from __future__ import annotations

import json
import random
import uuid
from dataclasses import dataclass
from typing import Any

from ..prompts import Example, Prompt, tokenise
from .base import TARGET_LIMIT, TaskSettings, TextTask
from .sources import read_rows, read_text, spread

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Shares of the longest prompt that fits.
LENGTHS = (0.3, 0.6, 1.0)
PAIRS_OF_EACH_DEPTH = 20
NEEDLES_OF_EACH = 4
CITIES = ("Tokyo", "Lagos", "Lima", "Oslo", "Cairo", "Delhi", "Quito", "Minsk", "Rabat", "Hanoi", "Perth", "Dakar")


@dataclass
class Retrieval(TextTask):
    """What was asked for stands in the answer: 100, else 0. Prompts are made to fit; nothing is cut away."""

    def score(self, answer: str, prompt: Prompt) -> float:
        return 100.0 * (prompt.answers[0] in answer)

    def examples(self, source: str, settings: TaskSettings) -> list[Example]:
        raise NotImplementedError

    def room(self, settings: TaskSettings) -> int:
        return settings.limit - max(settings.max_new_tokens, TARGET_LIMIT)


@dataclass
class KeyValues(Retrieval):
    """The value of one UUID among many: pairs of a file, or made here; as many as fit, the asked one at its depth."""

    tokens: int = 64

    def lacks(self, settings: TaskSettings) -> str | None:
        return None

    def prompts(self, tokenizer: Any, settings: TaskSettings) -> list[Prompt]:
        rows = [r | {"pairs": json_list(r["pairs"])} for r in read_rows(settings.source)] if settings.source else None
        rows = spread(rows or make_pairs(settings.seed), settings.fraction)
        return [self._fit(row, tokenizer, self.room(settings)) for row in rows]

    def _fit(self, row: dict[str, Any], tokenizer: Any, room: int) -> Prompt:
        pairs = row["pairs"]
        place = next(i for i, pair in enumerate(pairs) if pair[0] == row["key"])
        depth = place / max(len(pairs) - 1, 1)
        count = len(pairs)
        while True:
            # The asked pair and its neighbours, so that it stays at its depth.
            start = min(max(place - round(depth * (count - 1)), 0), len(pairs) - count)
            prompt = tokenise(self._example(row, pairs[start : start + count], depth), tokenizer, 10**9, TARGET_LIMIT)
            if prompt.length <= room:
                return prompt
            if count == 1:
                raise ValueError(f"not one pair fits into {room} tokens: this model is too short for the task")
            count = max(1, min(count - 1, count * room // prompt.length))

    def _example(self, row: dict[str, Any], pairs: list[tuple[str, str]], depth: float) -> Example:
        data = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs)
        context = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        # The quotation mark is open: the answer follows without a space.
        opens = '\nCorresponding value: "'
        group = f"depth {round(4 * depth) * 25} %"
        question = f'Key: "{row["key"]}"'
        return Example(str(row["id"]), f"{context}{{{data}}}\n\n", question, [row["answer"]], group, opens)


@dataclass
class Needle(Retrieval):
    """A magic number in a running text, at five depths of three lengths."""

    def lacks(self, settings: TaskSettings) -> str | None:
        return None if settings.haystack else "no text to hide needles in: pass --haystack FILE, or data for wikitext"

    def prompts(self, tokenizer: Any, settings: TaskSettings) -> list[Prompt]:
        self.require(settings)
        text = read_text(str(settings.haystack), settings.haystack_name)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        rng = random.Random(settings.seed)
        cases = [(s, d, n) for s in LENGTHS for d in DEPTHS for n in range(NEEDLES_OF_EACH)]
        prompts = []
        # The needle, the question and the words around; names and numbers may take some tokens more or less.
        bare = tokenise(self._example("", 0.0, random.Random(0), "bare"), tokenizer, 10**9, TARGET_LIMIT).length + 8
        for share, depth, number in spread(cases, settings.fraction):
            length = int(share * self.room(settings)) - bare
            if length < 1:
                raise ValueError(f"{self.room(settings)} tokens are too few for a needle")
            start = rng.randrange(max(len(offsets) - length, 1))
            hay = text[offsets[start][0] : offsets[min(start + length, len(offsets)) - 1][1]]
            example = self._example(hay, depth, rng, f"{share:g}-{depth:g}-{number}")
            prompts.append(tokenise(example, tokenizer, 10**9, TARGET_LIMIT))
        return prompts

    def _example(self, hay: str, depth: float, rng: random.Random, name: str) -> Example:
        # Between two words.
        cut = hay.find(" ", int(depth * len(hay)))
        cut = len(hay) if cut < 0 else cut
        city, magic = rng.choice(CITIES), str(rng.randrange(10**6, 10**7))
        needle = f" One of the special magic numbers for {city} is: {magic}."
        context = (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the number afterwards.\n{hay[:cut]}{needle}{hay[cut:]}\n\n"
        )
        question = f"What is the special magic number for {city}?"
        opens = f" One of the special magic numbers for {city} is:"
        group = f"depth {depth:.0%}".replace("%", " %")
        return Example(f"needle-{name}", context, question, [magic], group, opens)


def json_list(value: Any) -> list[tuple[str, str]]:
    """The pairs of a row: a list, or its JSON."""
    return [tuple(pair) for pair in (json.loads(value.replace("'", '"')) if isinstance(value, str) else value)]


def make_pairs(seed: int) -> list[dict[str, Any]]:
    """Rows like those of a file, with 75 random pairs each and the asked one spread over all depths."""
    rng = random.Random(seed)
    rows = []
    for i in range(len(DEPTHS) * PAIRS_OF_EACH_DEPTH):
        pairs = [tuple(str(uuid.UUID(int=rng.getrandbits(128))) for _ in range(2)) for _ in range(75)]
        # In the order of depth, so that a fraction, evenly spaced, has all of them.
        key, answer = pairs[round(DEPTHS[i // PAIRS_OF_EACH_DEPTH] * 74)]
        rows.append({"id": f"kv-{i}", "pairs": pairs, "key": key, "answer": answer})
    return rows
