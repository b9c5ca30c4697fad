"""Rows of our own making in the exact schema of each source of the registry, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Features, List, Value

TEXT = Value("string")


def texts(*names: str) -> dict[str, Any]:
    return {name: TEXT for name in names}


@dataclass(frozen=True)
class Fixture:
    """`rows` of a source; the first one becomes `prompt`, `response`, `answer` and `group`.

    `none`: how many of the rows have no answer; `broken`: how many are not what they should be.
    """

    features: dict[str, Any]
    rows: list[dict[str, Any]]
    prompt: str
    response: str
    answer: str | None
    group: str | None
    none: int = 0
    broken: int = 0


_ARC = Fixture(
    {"id": TEXT, "question": TEXT, "choices": {"text": List(TEXT), "label": List(TEXT)}, "answerKey": TEXT},
    [
        {"id": "a", "question": "Which melts?", "choices": {"text": ["ice", "rock"], "label": ["1", "2"]},
         "answerKey": "1"},
        {"id": "b", "question": "Which is hot?", "choices": {"text": ["ice", "sun"], "label": ["A", "B"]},
         "answerKey": "B"},
        {"id": "c", "question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "E"},
        {"id": "d", "question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": ""},
    ],
    "Which melts?\nA. ice\nB. rock", "A. ice\nAnswer: A", "A", "Which melts?", none=1, broken=1,
)  # fmt: skip

FIXTURES: dict[str, Fixture] = {
    "gsm8k": Fixture(
        texts("question", "answer"),
        [
            {"question": "Ann has 2 apples and buys 1,000. How many?",
             "answer": "2+1000=<<2+1000=1002>>1002\n#### 1,002"},
            {"question": "How many?", "answer": "No number here."},
        ],
        "Ann has 2 apples and buys 1,000. How many?", "2+1000=1002\nAnswer: 1002", "1002",
        "Ann has 2 apples and buys 1,000. How many?", broken=1,
    ),
    "metamath": Fixture(
        texts("type", "query", "original_question", "response"),
        [
            {"type": "GSM_Rephrased", "query": "What is two plus two?", "original_question": "2 + 2?",
             "response": "We add.\n#### 4\nThe answer is: 4"},
            {"type": "MATH_AnsAug", "query": "x?", "original_question": "x?", "response": "It is unclear."},
        ],
        "What is two plus two?", "We add.\nAnswer: 4", "4", "2 + 2?", broken=1,
    ),
    "orca_math": Fixture(
        texts("question", "answer"),
        [{"question": "Jo has 3 pens, loses 1. How many?", "answer": "3 - 1 = 2, so Jo has 2 pens."}],
        "Jo has 3 pens, loses 1. How many?", "3 - 1 = 2, so Jo has 2 pens.", None, None,
    ),
    "logiqa": Fixture(
        texts("context", "query") | {"options": List(TEXT), "correct_option": Value("int32")},
        [
            {"context": "All cats purr.", "query": "What follows?", "options": ["Tom purrs.", "Cats purr."],
             "correct_option": 1},
            {"context": "All cats purr.", "query": "What else?", "options": ["a", "b"], "correct_option": 7},
        ],
        "All cats purr.\n\nWhat follows?\nA. Tom purrs.\nB. Cats purr.", "B. Cats purr.\nAnswer: B", "B",
        "All cats purr.", broken=1,
    ),
    "reclor": Fixture(
        texts("context", "question") | {"answers": List(TEXT), "label": Value("int64"), "id_string": TEXT},
        [{"context": "Sales rose.", "question": "Which weakens it?", "answers": ["Costs rose.", "It rained."],
          "label": 0, "id_string": "train_0"}],
        "Sales rose.\n\nWhich weakens it?\nA. Costs rose.\nB. It rained.", "A. Costs rose.\nAnswer: A", "A",
        "Sales rose.",
    ),
    "hellaswag": Fixture(
        {"ind": Value("int32")} | texts("activity_label", "ctx_a", "ctx_b", "ctx") | {"endings": List(TEXT)}
        | texts("source_id", "split", "split_type", "label"),
        [
            {"ind": 4, "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "Then",
             "ctx": "[header] How to bake [title] Mix. Then", "endings": ["stir [step] it.", "fly."],
             "source_id": "wikihow~1", "split": "train", "split_type": "indomain", "label": "0"},
            {"ind": 5, "activity_label": "Baking", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", "endings": ["c", "d"],
             "source_id": "wikihow~2", "split": "test", "split_type": "zeroshot", "label": ""},
        ],
        "Baking: How to bake Mix. Then\n\nWhich continuation makes the most sense?\nA. stir it.\nB. fly.",
        "A. stir it.\nAnswer: A", "A", "wikihow~1", none=1,
    ),
    "code_alpaca": Fixture(
        texts("instruction", "input", "output"),
        [{"instruction": "Sort the list.", "input": "[2, 1]", "output": "sorted([2, 1])"},
         {"instruction": "Sort.", "input": "", "output": "sorted(x)"},
         {"instruction": "Sort.", "input": "", "output": ""}],
        "Sort the list.\n\n[2, 1]", "sorted([2, 1])", None, None, broken=1,
    ),
    "code_feedback": Fixture(
        texts("query", "answer", "resource", "lang"),
        [{"query": "Reverse a string in Python.", "answer": "Use `s[::-1]`.", "resource": "evol", "lang": "python"}],
        "Reverse a string in Python.", "Use `s[::-1]`.", None, None,
    ),
    "sciq": Fixture(
        texts("question", "distractor3", "distractor1", "distractor2", "correct_answer", "support"),
        [
            {"question": "What do plants take in?", "distractor3": "gold", "distractor1": "iron", "distractor2": "salt",
             "correct_answer": "light", "support": "Plants live on light."},
            {"question": "What?", "distractor3": "a", "distractor1": "b", "distractor2": "c", "correct_answer": "a",
             "support": ""},
        ],
        "What do plants take in?\nA. gold\nB. iron\nC. salt\nD. light", "Plants live on light.\nAnswer: D", "D",
        "What do plants take in?", broken=1,
    ),
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "scibench": Fixture(
        texts("doc_id", "problem_text", "answer_latex", "answer_number", "unit", "source", "problemid", "comment",
              "solution"),
        [{"doc_id": "", "problem_text": "Find the pressure.", "answer_latex": " 50.7", "answer_number": "50.7",
          "unit": "$\\mathrm{atm}$ ", "source": "atkins", "problemid": " e1.1", "comment": " ",
          "solution": "p = nRT/V."}],
        "Find the pressure.\nGive the answer in $\\mathrm{atm}$.", "p = nRT/V.\nAnswer: 50.7", "50.7", None,
    ),
    "aqua_rat": Fixture(
        {"question": TEXT, "options": List(TEXT), "rationale": TEXT, "correct": TEXT},
        [{"question": "3 * 7 = ?", "options": ["A)21", "B)24"], "rationale": "Three sevens.", "correct": "A"},
         {"question": "3 * 8 = ?", "options": ["A)21", "B)24"], "rationale": "Three eights.", "correct": "F"}],
        "3 * 7 = ?\nA. 21\nB. 24", "Three sevens.\nAnswer: A", "A", "3 * 7 = ?", broken=1,
    ),
    "boardgame_qa": Fixture(
        texts("proof", "example", "label", "rules", "preferences", "theory", "goal", "facts", "config"),
        [{"proof": "We know the cat sings.", "example": "The cat sings. Does the dog run?", "label": "proved",
          "rules": "r", "preferences": "p", "theory": "t", "goal": "g", "facts": "f", "config": "Main-depth1"}],
        "The cat sings. Does the dog run?\nAnswer with proved, disproved or unknown.",
        "We know the cat sings.\nAnswer: proved", "proved", None,
    ),
    "piqa": Fixture(
        texts("goal", "sol1", "sol2") | {"label": ClassLabel(names=["0", "1"])},
        [{"goal": "Open a jar.", "sol1": "Hit it.", "sol2": "Turn the lid.", "label": 1},
         {"goal": "Cut.", "sol1": "a", "sol2": "b", "label": -1}],
        "Which way is better to reach this goal?\nOpen a jar.\nA. Hit it.\nB. Turn the lid.",
        "B. Turn the lid.\nAnswer: B", "B", "Open a jar.", none=1,
    ),
    "winogrande": Fixture(
        texts("sentence", "option1", "option2", "answer"),
        [{"sentence": "Ann thanked Bea because _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
         {"sentence": "Ann thanked Bea because _ helped.", "option1": "Ann", "option2": "Bea", "answer": ""}],
        "Which option fits the blank?\nAnn thanked Bea because _ helped.\nA. Ann\nB. Bea", "B. Bea\nAnswer: B", "B",
        "Which option fits the blank?\nAnn thanked Bea because _ helped.", none=1,
    ),
}  # fmt: skip


def features(name: str) -> Features:
    return Features(FIXTURES[name].features)
