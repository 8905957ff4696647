"""Writes the prompts of the quickstart's conversation set (templates with slots, ours).

    python assets/make_quickstart_prompts.py > assets/quickstart_prompts.jsonl
    python -m data.regenerate --target <SmolLM2 .gguf> --prompts assets/quickstart_prompts.jsonl \
        --output assets/quickstart.jsonl --max-new-tokens 72

The first HELD_OUT rows use slot values that no later row uses.
"""

from __future__ import annotations

import itertools
import json
import random

HELD_OUT = 18

NAMES = [
    "Maria", "Tom", "Aisha", "Ken", "Olga", "Pedro", "Nina", "Sam", "Lena", "Raj", "Zoe", "Ivan",
    "Mei", "Paul", "Sofia", "Omar", "Ruth", "Leo", "Emma", "Hugo", "Clara", "Felix", "Amina",
    "Jonas", "Vera", "Diego",
]  # fmt: skip
CITIES = [
    "Paris", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Rome", "Kyoto", "Accra", "Dublin",
    "Boston", "Vienna", "Madrid", "Havana", "Lisbon", "Nairobi", "Prague", "Sydney", "Berlin",
    "Athens", "Bogota", "Manila", "Warsaw", "Geneva", "Tunis", "Seoul",
]  # fmt: skip
THINGS = [
    "milk", "bread", "tea", "paper", "pens", "glue", "apples", "rice", "salt", "soap", "plates",
    "cups", "beans", "butter", "eggs", "honey", "lemons", "nuts", "oil", "pasta", "sugar",
    "grapes", "cheese", "onions", "candles", "spoons", "towels", "figs",
]  # fmt: skip


def prompts() -> list[dict[str, str]]:
    """Returns all rows, the held-out ones first."""
    draw = random.Random(7)
    each = HELD_OUT // 3
    ages = [str(draw.randint(18, 80)) for _ in NAMES]
    jobs = itertools.cycle(["teacher", "pilot", "baker", "nurse", "farmer", "painter"])
    held_out_things = [draw.sample(THINGS[:9], 3) for _ in range(each)]
    other_things = [draw.sample(THINGS[9:], 3) for _ in range(len(NAMES) - each)]
    templates = {
        "Write a JSON object with the keys name and age for {0}, who is {1}.": zip(
            NAMES, ages, strict=True
        ),
        "Write a JSON object with the keys name, city and job for {0}, a {2} from {1}.": zip(
            NAMES, CITIES, jobs, strict=False
        ),
        "Write an HTML list with the items {0}, {1} and {2}.": held_out_things + other_things,
    }
    held_out, training = [], []
    for template, values in templates.items():
        rows = [{"prompt": template.format(*value)} for value in values]
        held_out += rows[:each]
        training += rows[each:]
    draw.shuffle(training)
    return held_out + training


if __name__ == "__main__":
    for row in prompts():
        print(json.dumps(row))
