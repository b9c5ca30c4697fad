"""How items are scored beyond exact match, each expert alone, and McNemar's test."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srde_ds.data.conversation import only_last_trained
from srde_ds.data.packing import tokenize
from srde_ds.data.records import Record
from srde_ds.evaluation import equivalence
from srde_ds.evaluation import results as results_module
from srde_ds.evaluation.choices import likeliest_choices
from srde_ds.evaluation.compare import EvaluationSettings, evaluate
from srde_ds.evaluation.equivalence import equivalent, is_mathematical
from srde_ds.evaluation.figures import figures_by_group
from srde_ds.evaluation.perplexity import ItemLoss, response_losses
from srde_ds.evaluation.results import ItemResult
from srde_ds.evaluation.scoring import is_right, scoring_of
from srde_ds.evaluation.table import format_tables
from srde_ds.inference.many import Written
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import NAMES, records, scored_records, tiny_model


def settings(**given: Any) -> EvaluationSettings:
    values: dict[str, Any] = {"batch_size": 4, "max_new_tokens": 4, "max_samples": 100, "seed": 0}
    return EvaluationSettings(**values | {"compare_baseline": False} | given)


SAME = [
    ("1,000", "1000"),
    (r"\frac{1}{2}", "0.5"),
    (".5", r"\frac{1}{2}"),
    ("50%", "0.5"),
    ("The total is 42 apples.", "42"),
    ("17 * 3 = 51", "51"),
    ("First 3 + 4 = 7.\nThen 7 - 5 = 2.", "2"),
    (r"$1.5 \times 10^3$", "1500"),
    ("x = 7", "7"),
    ("1 + x^2", "x^2+1"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"So it is \boxed{\frac{3}{7}}.", "3/7"),
    ("24/56", "24/56"),
    ("(1, 2)", "$(1,2)$"),
    ("The answer is 12 apples for 5 children.", "12"),
    ("#### 12 (2 steps)", "12"),
    ("The answer is 12. (I used 3 steps)", "12"),
    ("The answer is **12**, not 5.", "12"),
    ("The answer is 17 * 3 = 51 apples for 5 children.", "51"),
    ("Answer: $1,000 for 5 children", "1000"),
    ("The answer is $x = 12$, since 3 times 4 is that.", "12"),
    (r"The answer is \frac{1}{2} of the 5 cakes.", "0.5"),
    ("The answer is 50 percent of the 5 cakes.", "0.5"),
    ("The answer is the sum of 5 and 7, which is 12", "12"),
    ("5 children, 12 apples", "12"),  # running text
    ("The answer is −12 degrees", "-12"),
    ("Answer: €12 for 5 children", "12"),
    ("Answer: “12” apples for 5 children", "12"),
    ("#### 9 eggs * $2 = $18", "18"),
    ("The answer is 9 eggs * $2 per egg = $18.", "18"),
    ("Answer: 20 - 5 apples = 15 apples", "15"),
    ("#### $20 per day + $5 fee = $25 total", "25"),
    ("The answer is 5 plus 7, which equals 12.", "12"),
    ("The answer is 5 plus 7, which is a total of 12.", "12"),
    ("Answer: 50 - 38 is 12", "12"),
    ("Answer: 2 hours 30 minutes = 150 minutes", "150"),
    ("The answer is 12 apples. Then 2 + 3 = 5 are left", "12"),  # another sentence
    ("The answer is 12, because Tom is 5 years old.", "12"),
    ("Answer: 12 apples, which is more than 5", "12"),
    ("18 dollars", "18"),
    ("**18 dollars**", "18"),
    (r"\boxed{18 dollars}", "18"),
    (r"\boxed{18\text{ dollars}}", "18"),
    ("<answer>10 people</answer>", "10"),
    ("about 42", "42"),
    ("1/2 cup", "0.5"),
    ("答案是42。", "42"),
    ("一共42个苹果", "42"),
    ("คำตอบคือ42บาท", "42"),
]
DIFFERENT = [
    ("17 * 3", "51"),
    (r"$17 \cdot 3$", "51"),
    ("17 - 12", "5"),
    ("24/56", "3/7"),
    (r"\frac{24}{56}", "3/7"),
    ("To reduce 24/56, we", "3/7"),
    ("10/2", "5"),
    ("-5", "5"),
    ("42.1", "42"),
    ("", "7"),
    (r"$\frac{1}{$", "5"),
    ("<think>the answer is 8</think>\n9", "8"),
    ("x", "$x^2$"),
    ("(2, 1)", "$(1,2)$"),
    ("The answer is 5, not 12.", "12"),
    ("The answer is 12 apples for 5 children.", "5"),
    ("The answer is 12 or 13.", "12"),
    ("The answer is 5 to 12.", "5"),
    ("#### 17 * 3 (as 3 rows of 51)", "51"),
    ("The answer is −12 degrees", "12"),
    ("#### −12 because it fell", "12"),
    ("Answer: √16 because", "16"),
    ("Answer: ±3 because", "3"),
    ("The answer is 5, which is less than 12.", "12"),
    ("The answer is 5, because Tom is 12.", "12"),
    ("2 pi", "2"),
    ("17 * 3 dollars", "51"),
    ("答案是42。", "2"),
]


@pytest.mark.parametrize(("prediction", "answer"), SAME)
def test_same_value(prediction: str, answer: str) -> None:
    assert is_mathematical(answer) and equivalent(prediction, answer)


@pytest.mark.parametrize(("prediction", "answer"), DIFFERENT)
def test_another_value(prediction: str, answer: str) -> None:
    assert is_mathematical(answer) and not equivalent(prediction, answer)


def test_the_explanation_that_is_looked_at_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    handled = []

    class Pattern:
        def match(self, text: str) -> re.Match[str] | None:
            handled.append(text)
            return pattern.match(text)

    pattern = equivalence._EXPLAINED
    monkeypatch.setattr(equivalence, "_EXPLAINED", Pattern())
    assert equivalent("#### 12" + " " * 16000 + "apples for 5 children", "12")
    assert equivalent("#### 12 apples" + " for 5 children" * 1000, "12")
    assert equivalence._explained("1" + " " * 16000 + "2") == "1" + " " * 16000 + "2"
    assert [len(text) for text in handled] == [len("12 apples for 5 children"), 500, len("1 2")]


def test_what_an_item_carries_says_how_it_is_scored() -> None:
    *_, chosen, _, program, text = scored_records()
    number, nothing = (record for record in records() if record.where in ("made:0", "made:4"))
    scorings = [scoring_of(record, run_code=True) for record in (number, nothing, chosen, program, text)]
    assert scorings == ["math", None, "choice", "code", "exact"]
    assert scoring_of(program, run_code=False) is None
    assert not is_mathematical("2015-03-01") and not is_mathematical("yes")
    assert is_right("3.0", replace(number, answer="3"), "math") and not is_right(
        "4", replace(number, answer="3"), "math"
    )
    assert is_right("Two words.", text, "exact") and not is_right("words", text, "exact")
    solved = replace(number, answer="7")
    assert is_right("3 + 4 is 7", solved, "math") and not is_right("3 + 4 is 7", solved, "math", cut=True)
    assert is_right("#### 7\nQuestion: 3", solved, "math", cut=True)
    assert not is_right("<think>it is 7", solved, "math")
    assert is_right("```python\ndef add(a, b):\n    return a + b\n```", program, "code", "bubblewrap")
    assert not is_right("def add(a, b):\n    return a - b", program, "code", "bubblewrap")


def _mean_loss_of_last(record: Record, choice: str) -> float:
    """Cross entropy per token of a choice and EOS behind the record's prompt, without batches."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = replace(record, messages=[*record.prompt, {"role": "assistant", "content": choice}])
    (document,) = tokenize([whole], tokenizer)
    ids = torch.from_numpy(document.input_ids).long()
    count = len(tokenizer(choice, add_special_tokens=False)["input_ids"]) + 1
    with torch.no_grad():
        scores: Tensor = model(ids[None]).logits[0].log_softmax(-1)
    assert ids[-1] == tokenizer.eos_token_id
    return -float(scores[-count - 1 : -1].gather(1, ids[-count:, None]).mean())


def test_the_choice_of_the_least_loss_per_token_is_taken() -> None:
    items = [record for record in scored_records() if record.choices]
    taken = likeliest_choices(tiny_model(), tiny_tokenizer(), items, batch_size=3, title="")
    direct = [min(record.choices or [], key=lambda text: _mean_loss_of_last(record, text)) for record in items]
    assert taken == direct


def test_of_several_responses_the_last_alone_is_counted() -> None:
    whole = scored_records()[10]
    assert [message["role"] for message in whole.messages] == ["user", "assistant"] * 2
    model, tokenizer, said = tiny_model(), tiny_tokenizer(), whole.messages[-1]["content"]
    only_last = replace(whole, messages=only_last_trained(whole.messages))
    (last,) = response_losses(model, tokenizer, [only_last], max_length=256, batch_size=1)
    (both,) = response_losses(model, tokenizer, [whole], max_length=256, batch_size=1)
    assert last.tokens == len(tokenizer(said, add_special_tokens=False)["input_ids"]) + 1 < both.tokens
    assert last.loss_sum / last.tokens == pytest.approx(_mean_loss_of_last(whole, said), rel=1e-5)


def test_all_kinds_of_items_in_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    items = scored_records()
    right = {"made:0": "0", "p:0": "def add(a, b):\n    return a + b", "p:1": "two words"}
    monkeypatch.setattr(
        results_module,
        "generated_answers",
        lambda model, tokenizer, asked, **_: [Written(right.get(r.where, "")) for r in asked],
    )
    result, lines = evaluate(
        tiny_model(),
        tiny_tokenizer(),
        items,
        settings(compare_baseline=True, run_code="bubblewrap", each_expert=True),
    )
    assert [line["scoring"] for line in lines[9:]] == ["choice", "choice", "code", "exact"]
    assert [line["srde"]["correct"] for line in lines[11:]] == [True, True]
    assert result["domains"]["code"]["srde"]["accuracy"] == 1.0
    assert {name: figures["srde"]["items"] for name, figures in result["sources"].items()} == {
        "made": 9,
        "chosen": 2,
        "programs": 2,
    }
    for line in lines[9:11]:
        assert line["srde"]["correct"] == (line["srde"]["prediction"] == line["answer"])
    tables = format_tables(result)
    assert "McNemar p" in tables and "\nprograms " in tables and "\nlogic alone " in tables and "\nas routed " in tables
    left, lines = evaluate(tiny_model(), tiny_tokenizer(), items, settings())
    assert lines[11]["scoring"] is None and left["domains"]["code"]["srde"]["scored"] == 1


def test_each_expert_alone_is_the_model_with_that_expert_alone() -> None:
    model, tokenizer, items = tiny_model(), tiny_tokenizer(), records()
    result, _ = evaluate(model, tokenizer, items, settings(each_expert=True))
    table = result["each_expert"]
    assert table["experts"] == NAMES and table["domains"] == ["math", "logic"]
    for name, losses in zip(NAMES, table["loss"], strict=True):
        model.set_active_experts([name])
        for domain, loss in zip(table["domains"], losses, strict=True):
            own = response_losses(
                model, tokenizer, [r for r in items if r.domain == domain], max_length=256, batch_size=4
            )
            assert loss == pytest.approx(sum(o.loss_sum for o in own) / sum(o.tokens for o in own), rel=1e-5)
    assert len({round(loss, 6) for losses in table["loss"] for loss in losses}) == 6


@pytest.mark.parametrize(
    ("only_srde", "only_base", "p"),
    [(8, 1, 2 * (1 + 9) / 2**9), (1, 8, 2 * (1 + 9) / 2**9), (3, 3, 1.0), (5, 0, 2 / 2**5), (0, 0, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_of_the_differing_items(only_srde: int, only_base: int, p: float) -> None:
    verdicts: list[Any] = [(True, False)] * only_srde + [(False, True)] * only_base
    verdicts += [(True, True)] * 4 + [(False, False)] * 3 + [(None, None)]
    loss = ItemLoss(1.0, 1, None)
    results = {
        name: [ItemResult(loss, None, pair[column]) for pair in verdicts]
        for column, name in enumerate(("srde", "base"))
    }
    difference = figures_by_group(results, {"all": range(len(verdicts))}, 0)["all"]["difference"]
    assert difference["mcnemar_p"] == pytest.approx(p)
    assert (difference["only_srde_right"], difference["only_base_right"]) == (only_srde, only_base)
    assert difference["accuracy"] == pytest.approx(
        (only_srde - only_base) / np.sum([v[0] is not None for v in verdicts])
    )
