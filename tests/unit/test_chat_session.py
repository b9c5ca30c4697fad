"""A conversation: streamed as it grows, the base beside, experts chosen, exported, alive after an error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srde_ds.data.inputs import read_records
from srde_ds.errors import SRDEError
from srde_ds.inference import session as session_module
from srde_ds.inference.generate import Generation, Sampling, generate
from srde_ds.inference.session import AnswerOptions, ChatSession, Turn, iterated
from srde_ds.model.adapter import SRDEModel
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import NAMES, tiny_model

GREEDY = Sampling(8, temperature=0.0)
DRAWN = Sampling(20, temperature=2.0, top_p=1.0)
HI = [{"role": "user", "content": "hi"}]


def _session(model: SRDEModel | None = None) -> ChatSession:
    return ChatSession(model or tiny_model(), tiny_tokenizer())


def _last(session: ChatSession, question: str, options: AnswerOptions) -> Turn:
    *_, turn = session.ask(question, options)
    return turn


def _text(generation: Generation | None) -> str:
    assert generation is not None
    return generation.text


def test_streamed_tokens_are_those_of_generate() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    torch.manual_seed(3)
    expected = generate(model, tokenizer, HI, DRAWN, show_routing=True)
    grown = []
    options = AnswerOptions(DRAWN, show_routing=True, seed=3)
    for turn in _session(model).ask("hi", options):
        grown.append(len(turn.answer.token_texts) if turn.answer else 0)
    assert turn.answer and turn.answer.tokens == expected.tokens and turn.answer.text == expected.text
    assert "".join(turn.answer.token_texts) == expected.text
    assert len(grown) > 5 and grown[-1] == len(expected.tokens) - expected.prompt_length
    assert turn.answer.routing and expected.routing
    torch.testing.assert_close(turn.answer.routing.weights_TE(), expected.routing.weights_TE(), rtol=0, atol=0)
    assert _text(_last(_session(model), "hi", AnswerOptions(DRAWN, seed=4)).answer) != expected.text


def test_the_base_answers_the_same_conversation_beside() -> None:
    model = tiny_model()
    session = _session(model)
    first = _last(session, "hi", AnswerOptions(GREEDY, base_beside=True))
    with model.no_experts():
        bare = generate(model, tiny_tokenizer(), HI, GREEDY)
    assert _text(first.base) == bare.text != _text(first.answer)
    conversation = [*HI, {"role": "assistant", "content": _text(first.answer)}, {"role": "user", "content": "more"}]
    second = _last(session, "more", AnswerOptions(GREEDY, base_beside=True))
    with model.no_experts():
        assert _text(second.base) == generate(model, tiny_tokenizer(), conversation, GREEDY).text
    assert _last(session, "and", AnswerOptions(GREEDY)).base is None


@pytest.mark.parametrize("chosen", [["logic"], ["math", "code"]])
def test_only_the_chosen_experts_are_used_and_only_once(chosen: list[str]) -> None:
    model = tiny_model()
    everyone = _text(_last(_session(model), "hi", AnswerOptions(DRAWN, seed=0)).answer)
    turn = _last(_session(model), "hi", AnswerOptions(DRAWN, show_routing=True, experts=chosen, seed=0))
    assert turn.experts == chosen and turn.answer and turn.answer.routing
    used_E = turn.answer.routing.weights_TE().sum(0) > 0
    assert [name for name, used in zip(NAMES, used_E.tolist(), strict=True) if used] == chosen
    assert turn.answer.text != everyone
    assert model.active_experts == NAMES  # other sessions of the model are not touched
    assert _text(_last(_session(model), "hi", AnswerOptions(DRAWN, seed=0)).answer) == everyone


def test_the_export_is_read_as_a_record(tmp_path: Path) -> None:
    session = _session()
    answers = [_text(_last(session, question, AnswerOptions(GREEDY)).answer) for question in ("hi", "é \u2028 <b>")]
    (tmp_path / "conversation.json").write_text(session.export(), encoding="utf-8")
    (record,) = read_records(tmp_path / "conversation.json", ["math"])
    said = [(message["role"], message["content"]) for message in record.messages]
    assert said == [("user", "hi"), ("assistant", answers[0]), ("user", "é \u2028 <b>"), ("assistant", answers[1])]
    assert json.loads(_session().export()) == [{"messages": []}]


def test_a_failed_turn_is_forgotten_and_the_next_one_answered() -> None:
    session = _session()
    _last(session, "hi", AnswerOptions(GREEDY))
    for question, options, message in (
        (" ", AnswerOptions(GREEDY), "'question' is empty"),
        ("\ud800", AnswerOptions(GREEDY), "half a surrogate pair"),
        ("a" * 300, AnswerOptions(GREEDY), "exceed the base's context"),
        ("hi", AnswerOptions(Sampling(8, temperature=-1.0)), "temperature=-1.0"),
        ("hi", AnswerOptions(GREEDY, experts=["nobody"]), "nobody"),
    ):
        with pytest.raises(SRDEError, match=message):
            list(session.ask(question, options))
    assert len(session.turns) == 1
    _last(session, "more", AnswerOptions(GREEDY))
    assert [turn.question for turn in session.turns] == ["hi", "more"]


def test_a_closed_turn_is_forgotten_and_its_model_is_free() -> None:
    session = _session()
    expected = _text(_last(_session(), "hi", AnswerOptions(DRAWN, seed=1)).answer)
    growing = session.ask("hi", AnswerOptions(Sampling(200, temperature=2.0, top_p=1.0), seed=1))
    next(growing)
    growing.close()  # type: ignore[attr-defined]
    assert session.turns == []
    assert _text(_last(session, "hi", AnswerOptions(DRAWN, seed=1)).answer) == expected


def test_sessions_of_one_model_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    inside = threading.Lock()

    def slow(
        model: Any, tokenizer: Any, messages: Any, sampling: Any, *, stream: Callable[..., None], **_: Any
    ) -> None:
        nonlocal running, most
        with inside:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        stream(Generation(messages[-1]["content"], [], 0))
        with inside:
            running -= 1

    monkeypatch.setattr(session_module, "generate", slow)
    model, lock = tiny_model(), threading.Lock()
    sessions = [ChatSession(model, tiny_tokenizer(), lock) for _ in range(4)]
    askers = [threading.Thread(target=_last, args=(s, str(n), AnswerOptions(GREEDY))) for n, s in enumerate(sessions)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [_text(session.turns[0].answer) for session in sessions] == ["0", "1", "2", "3"]
    assert most == 1


def test_an_iterator_of_what_a_function_hands_out() -> None:
    seen: list[int] = []

    def produce(emit: Callable[[int], None]) -> None:
        for number in range(100):
            emit(number)
            seen.append(number)
        raise ValueError("over")

    values = iterated(produce)
    assert [next(values) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="over"):
        list(values)
    assert len(seen) == 100

    go_on, ended = threading.Event(), threading.Event()

    def endless(emit: Callable[[int], None]) -> None:
        try:
            emit(0)
            while True:
                go_on.wait()
                emit(1)
        finally:
            ended.set()

    values = iterated(endless)
    assert next(values) == 0
    values.close()  # type: ignore[attr-defined]
    go_on.set()
    assert ended.wait(10)
