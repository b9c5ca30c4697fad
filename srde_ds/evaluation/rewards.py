"""The scorers of evaluation as reward functions for TRL, for reinforcement learning with verifiable rewards.

The same file of items serves for training and for evaluation:

    trainer = GRPOTrainer(
        model=model,
        train_dataset=prompts_of("train.jsonl"),
        reward_funcs=[AnswerReward(), FormatReward()],
    )

TRL passes a reward function the completions and the dataset's columns, and gets a number for each completion.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, get_args

import datasets

from srde_ds.config import DOMAINS
from srde_ds.data.inputs import read_records
from srde_ds.data.records import Record
from srde_ds.errors import SRDEError
from srde_ds.evaluation.sandbox import Sandbox, check_sandbox
from srde_ds.evaluation.scoring import is_right, scoring_of
from srde_ds.inference.answers import exact_match, extract_answer

Completion = str | Sequence[dict[str, Any]]
"""Text, or for conversations the generated messages"""
ANSWER_TAGS = r"(?s)\s*<think>.+?</think>\s*<answer>.+?</answer>\s*"
_log = logging.getLogger(__name__)


def prompts_of(files: str | Path, domains: Sequence[str] = DOMAINS, *, run_code: bool = False) -> datasets.Dataset:
    """The items of a file, as for `srde-ds evaluate`, that can be scored.

    Args:
        files: a file, a folder or a pattern.
        domains: domains that the items may name.
        run_code: keep items with tests, which only an `AnswerReward` with a sandbox can score.

    Returns:
        Rows with `prompt` (messages before the last response), `domain`, and `item`, the record as JSON.

    Raises:
        SRDEError: a record is bad, uses tools, or holds a thought before its last response; or no item has an answer,
            choices or tests.

    Examples:
        >>> from pathlib import Path
        >>> from srde_ds.evaluation.rewards import prompts_of
        >>> written = Path("items.jsonl").write_text('{"prompt": "2 + 2?", "response": "4", "answer": "4"}')
        >>> prompts_of("items.jsonl", domains=["math"])["prompt"][0]
        [{'role': 'user', 'content': '2 + 2?'}]
    """
    records = list(read_records(files, domains, option="files"))
    usable = [record for record in records if scoring_of(record, run_code=run_code) is not None]
    programs = 0 if run_code else sum(scoring_of(record, run_code=True) == "code" for record in records)
    remedy = "Keep them with run_code=True, and give AnswerReward(sandbox='bubblewrap')." if programs else ""
    if not usable:
        wanted = "an 'answer' or 'choices'" if programs else "an 'answer', 'choices' or 'tests'"
        raise SRDEError(f"files={files}: no item has {wanted} to score it by. {remedy}".rstrip())
    if programs:
        _log.warning("%s: items with tests that are left out: %d. %s", files, programs, remedy)
    if left_out := len(records) - len(usable) - programs:
        _log.warning("%s: items left out, since nothing says which answer is right: %d", files, left_out)
    return _rows(usable, [{}] * len(usable))


def gym_prompts(task: str, *, size: int, seed: int, domain: str, **options: Any) -> datasets.Dataset:
    """Items of a reasoning-gym task, to be scored by its verifier.

    Args:
        task: the task's name, such as `chain_sum`.
        size: number of items.
        options: options of the task.

    Returns:
        Rows like those of `prompts_of`.

    Raises:
        SRDEError: there is no such task, or it does not take these options.
    """
    import reasoning_gym

    try:
        entries = list(reasoning_gym.create_dataset(task, size=size, seed=seed, **options))
    except (ValueError, TypeError, AssertionError) as error:
        raise SRDEError(f"task={task}: {error}. Give the name and the options of a reasoning-gym task.") from None
    records, verifiers = [], []
    for number, entry in enumerate(entries):
        turns = [{"role": "user", "content": entry["question"]}, {"role": "assistant", "content": str(entry["answer"])}]
        records.append(Record(domain, turns, str(entry["answer"]), task, f"{task}, item {number}"))
        verifiers.append({"verifier": task, "entry": json.loads(json.dumps(entry, default=str))})
    return _rows(records, verifiers)


def _rows(records: Sequence[Record], more: Sequence[dict[str, Any]]) -> datasets.Dataset:
    def row(record: Record, verifier: dict[str, Any]) -> dict[str, Any]:
        prompt = record.plain_messages(prompt_only=True)
        item = json.dumps({"record": asdict(record), **verifier})
        return {"prompt": prompt, "domain": record.domain, "item": item}

    return datasets.Dataset.from_list([row(*pair) for pair in zip(records, more, strict=True)])


class AnswerReward:
    """1 for an answer that evaluation would judge right, else 0; the verifier of a reasoning-gym task may give less
    than 1.

    Choices are judged by the text or the letter in the answer. An item whose scorer fails gets 0 and is counted.

    Args:
        sandbox: the sandbox for programs of items with tests; None: such items are refused.

    Attributes:
        failures: number of failed scorers, by kind of error.

    Raises:
        SRDEError: the sandbox does not exist or does not start here.

    Examples:
        >>> import json
        >>> from srde_ds.evaluation.rewards import AnswerReward
        >>> item = {"record": {"domain": "math", "messages": [], "answer": "12", "source": ""}}
        >>> AnswerReward()(completions=["The answer is 12.", "13"], item=[json.dumps(item)] * 2)
        [1.0, 0.0]
    """

    def __init__(self, *, sandbox: Sandbox | None = None) -> None:
        if sandbox not in (None, *get_args(Sandbox)):
            raise SRDEError(f"sandbox={sandbox!r}: must be None or one of {', '.join(get_args(Sandbox))}.")
        if sandbox is not None:
            check_sandbox(sandbox)
        self.sandbox = sandbox
        self.failures: Counter[str] = Counter()
        self.__name__ = "answer_reward"  # the name in TRL's logs

    def __call__(self, *, completions: Sequence[Completion], item: Sequence[str], **columns: Any) -> list[float]:
        """The rewards of the completions; `item` is a column of `prompts_of`. TRL logs how many scorers failed."""
        before = self.failures.total()
        rewards = [self._reward(_text(answer), json.loads(own)) for answer, own in zip(completions, item, strict=True)]
        if "log_metric" in columns:
            columns["log_metric"]("scorer_failures", self.failures.total() - before)
        return rewards

    def _reward(self, answer: str, item: dict[str, Any]) -> float:
        record = Record(**item["record"])
        if record.tests is not None and self.sandbox is None:
            raise SRDEError(
                f"{record.where}: the item is scored by running the program that the model writes. Give "
                "AnswerReward(sandbox='bubblewrap'), or leave such items out."
            )
        try:
            if "verifier" in item:
                return float(_verifier(item["verifier"])(extract_answer(answer), item["entry"]))
            return float(_is_right(answer, record, self.sandbox))
        except Exception as error:  # from a library or a sandbox: one item must not end a run
            self.failures[f"{type(error).__name__}: {error}"[:200]] += 1
            if self.failures.total() == 1:
                _log.warning("%s: its scorer failed, the reward is 0: %s", record.where, error)
            return 0.0


class FormatReward:
    """`weight` for a completion that matches the pattern, else 0.

    Args:
        pattern: regular expression that the whole completion must match.

    Raises:
        SRDEError: the pattern is not a regular expression, or the weight is not finite.

    Examples:
        >>> from srde_ds.evaluation.rewards import FormatReward
        >>> FormatReward(weight=0.2)(completions=["<think>2 + 2</think><answer>4</answer>", "4"])
        [0.2, 0.0]
    """

    def __init__(self, pattern: str = ANSWER_TAGS, *, weight: float = 1.0) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise SRDEError(f"pattern={pattern!r}: {error}. Give a regular expression.") from None
        if not math.isfinite(weight):
            raise SRDEError(f"weight={weight}: must be finite.")
        self.weight = weight
        self.__name__ = "format_reward"

    def __call__(self, *, completions: Sequence[Completion], **columns: Any) -> list[float]:
        """Rewards of the completions."""
        return [self.weight * bool(self._pattern.fullmatch(_text(completion))) for completion in completions]


def _text(completion: Completion) -> str:
    """The text of the last message, with parts joined; empty if there is no message or it calls a tool."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content or "")


def _is_right(answer: str, record: Record, sandbox: Sandbox | None) -> bool:
    if record.choices is not None and record.answer is not None:
        letter = chr(ord("A") + record.choices.index(record.answer))
        return exact_match(answer, record.answer) or exact_match(answer, letter)
    scoring = scoring_of(record, run_code=sandbox is not None)
    assert scoring is not None, "prompts_of leaves out what cannot be scored"
    return is_right(answer, record, scoring, sandbox)


@cache
def _verifier(task: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
