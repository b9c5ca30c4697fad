"""The conversation, and the inference verb."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from srde_ds.errors import SRDEError
from srde_ds.inference import chat as chat_module
from srde_ds.inference.chat import chat
from srde_ds.inference.command import inference_command
from srde_ds.inference.generate import Generation, generate
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import save_model, tiny_model


def _chat(lines: str, **changes: Any) -> str:
    target = io.StringIO()
    options = {"max_tokens": 6, "temperature": 0.0, "top_p": 1.0, "stream": False, "show_routing": False} | changes
    chat(tiny_model(), tiny_tokenizer(), source=io.StringIO(lines), target=target, **options)
    return target.getvalue()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The conversations that the model was given."""
    calls: list[list[str]] = []

    def fake(model: Any, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Generation:
        calls.append([message["content"] for message in messages])
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        return Generation(f"answer {len(calls)}", [], 0, None)

    monkeypatch.setattr(chat_module, "generate", fake)
    return calls


def test_history_grows_and_reset_forgets_it(heard: list[list[str]]) -> None:
    _chat("one\n\n two \n/reset\nthree\n")
    assert heard == [["one"], ["one", "answer 1", "two"], ["three"]]


def test_quit_ends_before_the_rest(heard: list[list[str]]) -> None:
    _chat("one\n/quit\ntwo\n")
    assert heard == [["one"]]


def test_a_stopped_answer_is_forgotten_with_its_question(heard: list[list[str]]) -> None:
    printed = _chat("one\nstop\ntwo\n")
    assert heard == [["one"], ["one", "answer 1", "stop"], ["one", "answer 1", "two"]]
    assert "Stopped" in printed


def test_ctrl_c_at_the_prompt_ends() -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> str:
            raise KeyboardInterrupt

    target = io.StringIO()
    options: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "top_p": 1.0}
    chat(
        tiny_model(),
        tiny_tokenizer(),
        source=Interrupted(),
        target=target,
        stream=False,
        show_routing=False,
        **options,
    )
    assert target.getvalue().endswith("> \n")


def test_unknown_commands_are_answered_and_not_sent(heard: list[list[str]]) -> None:
    assert "Did you mean '/reset'?" in _chat("/rest\n")
    assert heard == []


@pytest.mark.parametrize("stream", [False, True])
def test_real_answers_streamed_or_not(stream: bool) -> None:
    said = generate(tiny_model(), tiny_tokenizer(), [{"role": "user", "content": "hi"}], max_tokens=6, temperature=0)
    assert f"> {said.text}\n> " in _chat("hi\n", stream=stream)


def test_experts_are_shown_on_request() -> None:
    shown, hidden = _chat("/experts\nhi\n"), _chat("/experts\n/experts\nhi\n")
    assert "answer, mean:" in shown
    assert "answer, mean:" not in hidden
    assert "answer, mean:" in _chat("hi\n", show_routing=True)


def test_a_conversation_that_grew_too_long_goes_on() -> None:
    printed = _chat("a" * 300 + "\nhi\n")
    assert "exceed the base's context" in printed
    assert printed.rstrip().endswith(">")


def _options(**changes: Any) -> dict[str, Any]:
    options = {"srde_weights": "", "base": None, "prompt": None, "interactive": False, "max_tokens": 5}
    options |= {"temperature": 0.0, "top_p": 1.0, "stream": False, "show_routing": False, "bf16": False, "seed": 0}
    return options | changes


def test_one_prompt_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_model(tmp_path)
    said = generate(tiny_model(), tiny_tokenizer(), [{"role": "user", "content": "hi"}], max_tokens=5, temperature=0)
    for path, stream in ((weights, False), (weights.parent, True)):
        inference_command(**_options(srde_weights=str(path), prompt="hi", stream=stream))
        assert capsys.readouterr().out == said.text + "\n"
    inference_command(**_options(srde_weights=str(weights), prompt="hi", show_routing=True))
    assert "prompt:" in capsys.readouterr().out


def test_interactive_reads_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/experts\n"))
    inference_command(**_options(srde_weights=str(save_model(tmp_path)), interactive=True))
    assert "Experts are shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--prompt TEXT or --interactive"),
        ({"prompt": "a", "interactive": True}, "--prompt TEXT or --interactive"),
        ({"prompt": " "}, "prompt=''"),
        ({"prompt": "a", "srde_weights": "/nowhere"}, "no such file or folder"),
    ],
)
def test_bad_input_is_refused_before_anything_loads(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        inference_command(**_options(**changes))


def test_a_folder_without_weights_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="srde-ds convert"):
        inference_command(**_options(srde_weights=str(tmp_path), prompt="a"))
