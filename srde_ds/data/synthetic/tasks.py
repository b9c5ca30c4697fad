"""The quick start's six domains: procedural tasks with short answers that can be checked.

Math, logic, code, planning and abstract items come from reasoning-gym, most of them put in shorter words;
science items are computed from `periodictable` and `scipy.constants` (see science.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Any

from srde_ds.config import DOMAINS
from srde_ds.data.synthetic.science import SCIENCE
from srde_ds.errors import SRDEError, nearest
from srde_ds.utils.files import write_text

Phrase = Callable[[dict[str, Any]], tuple[str, str]]
"""An item of reasoning-gym as (prompt, answer)."""
PATIENCE = 200
"""Known prompts in a row after which a task counts as exhausted."""


def _as_asked(hint: str = "") -> Phrase:
    return lambda item: (f"{item['question'].strip()}{hint}", str(item["answer"]).strip())


def _worded(words: Callable[[dict[str, Any]], str], answer: Callable[[dict[str, Any]], Any] | None = None) -> Phrase:
    """The prompt (and answer) from the item's metadata instead of its question."""
    return lambda item: (
        words(item["metadata"]),
        str(item["answer"] if answer is None else answer(item["metadata"])).strip(),
    )


def _python(expression: Callable[[dict[str, Any]], str], answer: Callable[[dict[str, Any]], Any]) -> Phrase:
    """A Python expression whose value is asked for."""
    return lambda item: (
        f"What is the value of this Python expression?\n{expression(item['metadata'])}\nAnswer with the value.",
        repr(answer(item["metadata"])),
    )


def _kinds_answer(meta: dict[str, Any]) -> str:
    terms = meta["knight_knave_terms"]
    return ", ".join(terms["knight" if honest else "knave"] for honest in meta["solution"])


def _knights(item: dict[str, Any]) -> tuple[str, str]:
    # The puzzle without its long introduction and format rule; the answer names the kinds in order.
    terms = item["metadata"]["knight_knave_terms"]
    said = item["question"].split("inhabitants: ", 1)[1].split(". ", 1)[1].split(" So who is", 1)[0]
    names = " and ".join(map(str, item["metadata"]["names"]))
    prompt = (
        f"{str(terms['a_knight']).capitalize()} always tells the truth, {terms['a_knave']} always lies. {said} "
        f"What are {names}? Answer with two words, like: {terms['knave']}, {terms['knight']}"
    )
    return prompt, _kinds_answer(item["metadata"])


def _program(item: dict[str, Any]) -> tuple[str, str]:
    program = item["question"].split("program:\n\n", 1)[1].split("\n", 1)[0]
    return (
        "Rewrite neighbours until nothing changes: A# #A and B# #B vanish, A# #B becomes #B A#, B# #A becomes #A B#."
        f"\n{program}\nAnswer with the final tokens, or with: empty",
        str(item["answer"]).strip() or "empty",
    )


def _digits(cells: list[int]) -> str:
    return "".join(map(str, cells))


def _arc(meta: dict[str, Any]) -> str:
    shown = "\n".join(f"{_digits(pair['input'])} -> {_digits(pair['output'])}" for pair in meta["train_examples"])
    return (
        f"Find the rule and apply it.\n{shown}\n{_digits(meta['test_example']['input'])} -> ?\nAnswer with the digits."
    )


def _matrix(rows: list[list[int]]) -> str:
    return "/".join(map(_digits, rows))


def _cube(meta: dict[str, Any]) -> str:
    sides = ", ".join(f"{side} {color}" for side, color in meta["initial_state"].items())
    return (
        f"A cube's sides are {sides}. It is turned so that the {meta['rotations'][0]} side comes to the top. "
        f"Which color is then the {meta['target_side']} side? Answer with the color."
    )


def _courses(meta: dict[str, Any]) -> str:
    needs = "; ".join(f"{course} needs {before}" for course, before in meta["prerequisites"])
    return f"Courses and what they need first: {needs}. Can all be taken? Answer True or False."


def _grid(meta: dict[str, Any]) -> str:
    rows = "\n".join("".join(row) for row in meta["matrix"])
    return (
        f"Grid (X is blocked, moves go up, down, left, right):\n{rows}\n"
        "How many moves does the shortest path from * to # take? Answer with the number, or 0 if there is none."
    )


def _path(item: dict[str, Any]) -> tuple[str, str]:
    edges, ends = item["question"].strip().splitlines()[-1].removesuffix("=").strip().strip("|").split("/")
    start, goal = ends.split()
    links = ", ".join(edge.replace(" ", "-") for edge in edges.split("|"))
    return f"One-way links: {links}. Answer with the nodes of the path from {start} to {goal}.", item["answer"]


def _moves(meta: dict[str, Any]) -> int:
    return 0 if meta["solution"] is None or meta["solution"] == ["infeasible"] else len(meta["solution"])


_FILTERS = {
    "keep_larger": lambda value: f"x > {value}",
    "keep_smaller": lambda value: f"x < {value}",
    "remove_larger": lambda value: f"not x > {value}",
    "remove_smaller": lambda value: f"not x < {value}",
}


def _whole(numbers: list[str]) -> list[int]:
    return [int(float(number)) for number in numbers]


def _filtered(meta: dict[str, Any]) -> str:
    condition = _FILTERS[meta["operation"]](_whole([meta["filter_value"]])[0])
    return f"[x for x in {_whole(meta['original_numbers'])} if {condition}]"


# domain -> [(task, dataset of reasoning-gym, its options, wording)]
TASKS: dict[str, list[tuple[str, str, dict[str, Any], Phrase]]] = {
    "math": [
        ("sum", "chain_sum", {"max_terms": 3, "max_digits": 2},
         _worded(lambda m: f"Calculate {m['expression']}. Answer with the number.")),
        ("product", "products", {"max_digits": 2},
         _worded(lambda m: f"Calculate {m['expression']}. Answer with the number.")),
        ("gcd", "gcd", {"max_value": 60},
         _worded(lambda m: "What is the greatest common divisor of {} and {}? Answer with the number.".format(
             *m["numbers"]))),
        ("fraction", "fraction_simplification", {"max_value": 20, "max_factor": 10, "styles": ("plain",)},
         _worded(lambda m: f"Reduce the fraction {m['numerator']}/{m['denominator']}. Answer with the fraction.")),
        ("equation", "simple_equations", {"max_terms": 2, "max_value": 20}, _as_asked(". Answer with the number.")),
    ],
    "logic": [
        ("syllogism", "syllogism", {}, _as_asked()),
        ("family", "family_relationships", {"max_family_size": 5}, _as_asked()),
        ("siblings", "aiw", {"task_type_weights": [0.5, 0.5, 0.0]},
         _as_asked(" Answer with the number.")),
        ("knights", "knights_knaves", {}, _knights),
    ],
    "code": [
        ("reverse", "spell_backward", {"max_word_len": 7},
         _python(lambda m: f"{m['word']!r}[::-1]", lambda m: m["word"][::-1])),
        ("sort", "number_sorting", {"max_numbers": 5, "max_decimals": 0},
         _python(lambda m: f"sorted({_whole(m['original_numbers'])}, reverse={m['direction'] == 'descending'})",
                 lambda m: _whole(m["sorted_numbers"]))),
        ("filter", "number_filtering", {"max_numbers": 5, "max_decimals": 0},
         _python(_filtered, lambda m: _whole(m["result"]))),
        ("words", "word_sequence_reversal", {"max_words": 4},
         _python(lambda m: f"{' '.join(m['words'])!r}.split()[-1]", lambda m: m["words"][-1])),
        ("letters", "letter_counting", {"min_words": 1, "max_words": 3},
         _python(lambda m: f"{' '.join(m['span']).lower()!r}.count({m['target_letter']!r})",
                 lambda m: " ".join(m["span"]).lower().count(m["target_letter"]))),
        ("base", "base_conversion", {"max_base": 16, "max_value": 255},
         _python(lambda m: f"int({m['source_repr']!r}, {m['source_base']})", lambda m: m["decimal_value"])),
    ],
    "planning": [
        ("weekday", "calendar_arithmetic",
         {"tasks": ["weekday_offset", "weekday_of_date_from_first_date"], "offset_upper_bound": 21}, _as_asked()),
        ("duration", "time_intervals", {"task_types": ["time"]}, _as_asked()),
        ("courses", "course_schedule",
         {"min_num_courses": 3, "max_num_courses": 5, "max_num_prerequisites": 1, "max_cycle_length": 3},
         _worded(_courses)),
        ("grid", "shortest_path", {"min_rows": 3, "max_rows": 4, "min_cols": 3, "max_cols": 4},
         _worded(_grid, _moves)),
        ("path", "path_star", {"degree": 2, "node_range": 100, "min_path_length": 2, "max_path_length": 3}, _path),
    ],
    "abstract": [
        ("sequence", "number_sequence", {"max_complexity": 2, "max_terms": 6},
         _as_asked("\nContinue the sequence. Answer with the next number.")),
        ("pattern", "arc_1d", {"min_size": 8, "max_size": 8, "num_train": 2},
         _worded(_arc, lambda m: _digits(m["test_example"]["output"]))),
        ("rotation", "rotate_matrix", {"min_n": 2, "max_n": 3, "min_rotations": 1, "max_rotations": 3},
         _worded(lambda m: f"Rotate the grid {_matrix(m['matrix'])} (rows parted by /) by {90 * m['num_rotations']} "
                 "degrees clockwise. Answer in the same form.", lambda m: _matrix(m["solution"]))),
        ("rewriting", "ab", {"length": 5}, _program),
        ("cube", "color_cube_rotation", {"max_rotations": 1}, _worded(_cube)),
    ],
}  # fmt: skip


def generate(domain: str, count: int, seed: int) -> list[dict[str, str]]:
    """Make `count` distinct items of a domain, with equal shares of its tasks if they have enough distinct items.

    Returns:
        dicts with `prompt`, `response`, `answer` (here the same text), `domain` and `source`. No two prompts are equal,
        even when case and white space are ignored. The same arguments give the same items.
    """
    if domain not in DOMAINS:
        raise SRDEError(f"unknown domain '{domain}', must be one of {', '.join(DOMAINS)}.{nearest(domain, DOMAINS)}")
    streams = _science_streams(seed) if domain == "science" else _gym_streams(domain, seed)
    seen: set[str] = set()
    items: list[dict[str, str]] = []
    while len(items) < count:
        if not streams:
            raise SRDEError(f"domain '{domain}' has only {len(items)} distinct items, but {count} are wanted.")
        for source, stream in list(streams.items()):
            item = _next_new(stream, seen)
            if item is None:
                del streams[source]
            else:
                prompt, answer = item
                items.append(
                    {"prompt": prompt, "response": answer, "answer": answer, "domain": domain, "source": source}
                )
    items = items[:count]
    random.Random(f"{seed}/{domain}/order").shuffle(items)
    return items


def write_quickstart_data(
    folder: str | Path, train_per_domain: int, held_out_per_domain: int, seed: int
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl` for all six domains. No held-out prompt occurs in training."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for domain in DOMAINS:
        items = generate(domain, train_per_domain + held_out_per_domain, seed)
        held_out += items[:held_out_per_domain]
        train += items[held_out_per_domain:]
    random.Random(f"{seed}/train").shuffle(train)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, items in zip(paths, (train, held_out), strict=True):
        write_text(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return paths


def _gym_streams(domain: str, seed: int) -> dict[str, Iterator[tuple[str, str]]]:
    import reasoning_gym  # takes two seconds, so only when items are made

    streams: dict[str, Iterator[tuple[str, str]]] = {}
    for task, name, options, phrase in TASKS[domain]:
        # Any index works: the size bounds only iteration, which is not used.
        dataset = reasoning_gym.create_dataset(name, size=1, seed=seed, **options)
        streams[f"reasoning_gym/{name}/{task}"] = map(phrase, map(dataset.__getitem__, count()))
    return streams


def _science_streams(seed: int) -> dict[str, Iterator[tuple[str, str]]]:
    return {
        f"science/{task}": map(make, repeat(random.Random(f"{seed}/science/{task}"))) for task, make in SCIENCE.items()
    }


def _next_new(stream: Iterator[tuple[str, str]], seen: set[str]) -> tuple[str, str] | None:
    """The next item whose prompt is new; None after PATIENCE known ones in a row."""
    for _ in range(PATIENCE):
        prompt, answer = next(stream)
        key = " ".join(prompt.lower().split())
        if key not in seen:
            seen.add(key)
            return prompt, answer
    return None
