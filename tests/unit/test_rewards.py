"""Scorers of evaluation as reward functions."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from srde_ds.errors import SRDEError
from srde_ds.evaluation import rewards
from srde_ds.evaluation.rewards import AnswerReward, FormatReward, gym_prompts, prompts_of
from tests.data_helpers import write_jsonl
from tests.unit.test_evaluation_sandbox import ADD, TESTS, _starts

SUM = {"domain": "math", "prompt": "What is 1/4 + 1/4?", "response": "1/2", "answer": "1/2"}
COLOUR = {"domain": "science", "prompt": "Which?", "response": "red", "choices": ["blue", "red"], "answer": "red"}
WORD = {"domain": "logic", "prompt": "Say yes.", "response": "yes", "answer": "yes"}
OPEN = {"domain": "logic", "prompt": "Talk.", "response": "Hello there."}
CODE = {"domain": "code", "prompt": "Write add.", "response": ADD, "tests": TESTS}


def rewards_of(reward: AnswerReward, rows: Any, *answers: str) -> list[float]:
    """Of a conversation's answers, one to each row."""
    completions = [[{"role": "assistant", "content": answer}] for answer in answers]
    return reward(completions=completions, **rows[:])


def test_rows_hold_what_is_asked_and_what_is_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = prompts_of(write_jsonl(tmp_path / "items.jsonl", [SUM, COLOUR, WORD, OPEN]))
    assert [row["prompt"] for row in rows] == [
        [{"role": "user", "content": item["prompt"]}] for item in (SUM, COLOUR, WORD)
    ]
    assert rows["domain"] == ["math", "science", "logic"]
    assert "items left out, since nothing says which answer is right: 1" in caplog.text
    with pytest.raises(SRDEError, match="no item has an 'answer', 'choices' or 'tests'"):
        prompts_of(write_jsonl(tmp_path / "open.jsonl", [OPEN]))


def test_prompts_that_use_tools_are_refused(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(SRDEError, match=r"items.jsonl:1: it uses tools"):
        prompts_of(write_jsonl(tmp_path / "items.jsonl", [SUM | {"tools": tools}]))


def test_a_thought_is_refused_only_where_rows_would_hold_it(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "1/2", "reasoning_content": "2/4"}
    asked = {"role": "user", "content": "What is 1/4 + 1/4?"}
    item = {"domain": "math", "messages": [asked, thought], "answer": "1/2"}
    rows = prompts_of(write_jsonl(tmp_path / "items.jsonl", [item]))
    assert rows["prompt"][0] == [asked]
    assert rewards_of(AnswerReward(), rows, "<think>is it 3?</think>1/2") == [1]
    assert rewards_of(AnswerReward(), rows, "<think>1/2</think>3") == [0]
    with pytest.raises(SRDEError, match="items.jsonl:1: 'reasoning_content' in a message"):
        prompts_of(write_jsonl(tmp_path / "items.jsonl", [item | {"messages": [asked, thought, asked, thought]}]))


def test_an_answer_is_judged_as_evaluation_judges_it(tmp_path: Path) -> None:
    rows, reward = prompts_of(write_jsonl(tmp_path / "items.jsonl", [SUM, COLOUR, WORD])), AnswerReward()
    assert rewards_of(reward, rows, "It is 1/4 more, so the answer is 0.5", "B", "Yes.") == [1, 1, 1]
    assert rewards_of(reward, rows, "1/4 + 1/4", "The answer is red", "<answer>yes</answer>") == [0, 1, 1]
    assert rewards_of(reward, rows, "1/2", "(B) red", "yes") == rewards_of(reward, rows, "1/2", "B", "yes") == [1, 1, 1]
    assert rewards_of(reward, rows, "The answer is 1/2 for 4 of them.", "B", "yes") == [1, 1, 1]
    assert rewards_of(reward, rows, "The answer is 4, not 1/2.", "A", "no") == [0, 0, 0]
    assert rewards_of(reward, rows, "", "A", "no") == [0, 0, 0]
    assert not reward.failures
    assert reward(completions=["yes"], item=[rows[2]["item"]]) == [1]  # not a conversation


@pytest.mark.skipif(not _starts(), reason="bubblewrap does not start on this machine")
def test_programs_run_in_the_sandbox(tmp_path: Path) -> None:
    rows = prompts_of(write_jsonl(tmp_path / "items.jsonl", [CODE]), run_code=True)
    assert rewards_of(AnswerReward(sandbox="bubblewrap"), rows, f"```python\n{ADD}```") == [1]
    assert rewards_of(AnswerReward(sandbox="bubblewrap"), rows, "def add(a, b): return 0") == [0]
    with pytest.raises(SRDEError, match=r"items.jsonl:1: the item is scored by running .* AnswerReward\(sandbox="):
        rewards_of(AnswerReward(), rows, ADD)


def test_programs_are_left_out_unless_they_may_be_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remedy = r"Keep them with run_code=True, and give AnswerReward\(sandbox='bubblewrap'\)"
    items = write_jsonl(tmp_path / "items.jsonl", [SUM, CODE, OPEN])
    assert prompts_of(items)["domain"] == ["math"]
    assert re.search(f"items with tests that are left out: 1. {remedy}", caplog.text)
    assert "nothing says which answer is right: 1" in caplog.text
    assert len(prompts_of(items, run_code=True)) == 2
    with pytest.raises(SRDEError, match=f"no item has an 'answer' or 'choices' to score it by. {remedy}"):
        prompts_of(write_jsonl(tmp_path / "programs.jsonl", [CODE]))


def test_tasks_are_scored_by_their_own_verifier() -> None:
    rows = gym_prompts("chain_sum", size=3, seed=1, domain="math", max_terms=2, max_digits=1)
    right = [json.loads(row["item"])["entry"]["answer"] for row in rows]
    reward = AnswerReward()
    assert rewards_of(reward, rows, *right) == [1, 1, 1]
    assert rewards_of(reward, rows, f"So <answer>{right[0]}</answer>", "none", "") == [1, 0, 0]
    assert not reward.failures
    with pytest.raises(SRDEError, match="task=no_such_task: "):
        gym_prompts("no_such_task", size=1, seed=1, domain="math")
    with pytest.raises(SRDEError, match="task=chain_sum: "):
        gym_prompts("chain_sum", size=1, seed=1, domain="math", terms=2)


def test_a_scorer_that_fails_gives_nothing_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, reward = prompts_of(write_jsonl(tmp_path / "items.jsonl", [SUM, WORD])), AnswerReward()

    def late(*_: Any) -> bool:
        raise TimeoutError("took too long")

    monkeypatch.setattr(rewards, "is_right", late)
    with caplog.at_level(logging.WARNING):
        assert rewards_of(reward, rows, "1/2", "yes") == [0, 0]
    assert reward.failures == {"TimeoutError: took too long": 2}
    logged: dict[str, float] = {}
    reward(completions=["1/2", "yes"], log_metric=logged.__setitem__, **rows[:])
    assert logged == {"scorer_failures": 2}
    assert caplog.text.count("its scorer failed, the reward is 0: took too long") == 1


def test_form() -> None:
    reward = FormatReward(r"[0-9]+", weight=0.5)
    assert reward(completions=["12", [{"role": "assistant", "content": "7"}], "x1", ""]) == [0.5, 0.5, 0, 0]
    assert FormatReward()(completions=["<think>so</think>\n<answer>4</answer>\n", "<answer>4</answer>"]) == [1, 0]
    assert reward(completions=[[{"role": "assistant", "content": None, "tool_calls": []}], []]) == [0, 0]
    assert reward(completions=[[{"content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}]]) == [0.5]
    with pytest.raises(SRDEError, match="weight=nan: must be finite"):
        FormatReward(weight=float("nan"))
    with pytest.raises(SRDEError, match="sandbox='zz': must be None or one of bubblewrap, none"):
        AnswerReward(sandbox="zz")  # type: ignore[arg-type]
    with pytest.raises(SRDEError, match=r"pattern='\(': "):
        FormatReward("(")
