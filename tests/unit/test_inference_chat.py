"""The conversation, and the inference verb."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

from srde_ds.errors import SRDEError
from srde_ds.inference import chat as chat_module
from srde_ds.inference import session as session_module
from srde_ds.inference.chat import Chat, side_by_side
from srde_ds.inference.command import inference_command
from srde_ds.inference.generate import Generation, Sampling, answer_length, generate
from srde_ds.inference.options import InferenceOptions
from srde_ds.utils.escape import terminal
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import save_model, tiny_model

GREEDY = Sampling(6, temperature=0.0, top_p=1.0)


def _chat(lines: str, **changes: Any) -> str:
    target = io.StringIO()
    shown = {"stream": False, "show_routing": False} | changes
    Chat(tiny_model(), tiny_tokenizer(), GREEDY, source=io.StringIO(lines), target=target, **shown).run()
    return target.getvalue()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The conversations that the model was given."""
    calls: list[list[str]] = []

    def fake(model: Any, tokenizer: Any, messages: list[dict[str, str]], sampling: Any, **options: Any) -> Generation:
        calls.append([message["content"] for message in messages])
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "fail":
            raise RuntimeError("out of memory")
        answer = Generation(f"answer {len(calls)}", [], 0)
        options["stream"](answer)
        return answer

    monkeypatch.setattr(session_module, "generate", fake)
    return calls


def test_history_grows_and_reset_forgets_it(heard: list[list[str]]) -> None:
    _chat("one\n\n two \n/reset\nthree\n")
    assert heard == [["one"], ["one", "answer 1", "two"], ["three"]]


def test_an_error_ends_the_answer_and_not_the_chat(heard: list[list[str]]) -> None:
    printed = _chat("one\nfail\n/expert nobody\ntwo\n")
    assert heard == [["one"], ["one", "answer 1", "fail"], ["one", "answer 1", "two"]]
    assert "The answer failed (out of memory)" in printed and "the experts are math, logic, code" in printed


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("one \\\ntwo\n", "one \ntwo"),
        ('"""one\n\n /reset\ntwo"""\n', "one\n\n /reset\ntwo"),
        ('"""one"""\n', "one"),
    ],
)
def test_messages_of_several_lines(lines: str, message: str, heard: list[list[str]]) -> None:
    assert "... " in _chat(lines) or "\n" not in message
    assert heard == [[message]]


def test_an_expert_is_pinned_and_unpinned() -> None:
    hi = [{"role": "user", "content": "hi"}]
    model = tiny_model()
    everyone = generate(model, tiny_tokenizer(), hi, Sampling(6, temperature=0)).text
    model.set_active_experts("logic")
    alone = generate(model, tiny_tokenizer(), hi, Sampling(6, temperature=0)).text
    printed = _chat("/expert logic\nhi\n/reset\n/expert\nhi\n")
    assert alone != everyone
    assert f"From now on: logic.\n> {terminal(alone)}\n" in printed
    assert f"From now on: math, logic, code.\n> {terminal(everyone)}\n" in printed


def test_the_base_answers_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model, hi = tiny_model(), [{"role": "user", "content": "hi"}]
    ours = generate(model, tiny_tokenizer(), hi, Sampling(6, temperature=0)).text
    with model.no_experts():
        theirs = generate(model, tiny_tokenizer(), hi, Sampling(6, temperature=0)).text
    shown = side_by_side(terminal(ours), terminal(theirs), titles=("with experts", "base"))
    assert ours != theirs and shown in _chat("/base\nhi\n", stream=True)
    assert "with experts" not in _chat("/base\n/base\nhi\n")
    columns = side_by_side("one two\nthree", "four", titles=("a", "b"), width=11)
    assert columns.splitlines() == ["a    | b", "---- | ----", "one  | four", "two  |", "thre |", "e    |"]


def test_help_names_every_command() -> None:
    assert all(name.split()[0] in _chat("/help\n") for name in chat_module.COMMANDS)


def test_quit_ends_before_the_rest(heard: list[list[str]]) -> None:
    _chat("one\n/quit\ntwo\n")
    assert heard == [["one"]]


def test_a_stopped_answer_is_forgotten_with_its_question(heard: list[list[str]]) -> None:
    printed = _chat("one\nstop\ntwo\n")
    assert heard == [["one"], ["one", "answer 1", "stop"], ["one", "answer 1", "two"]]
    assert "Stopped" in printed


def test_ctrl_c_at_the_prompt_ends() -> None:
    class Interrupted(io.StringIO):
        def readline(self, *_: Any) -> Any:
            raise KeyboardInterrupt

    target = io.StringIO()
    shown = {"stream": False, "show_routing": False}
    Chat(tiny_model(), tiny_tokenizer(), GREEDY, source=Interrupted(), target=target, **shown).run()
    assert target.getvalue().endswith("> \n")


def test_unknown_commands_are_answered_and_not_sent(heard: list[list[str]]) -> None:
    assert "Did you mean '/reset'?" in _chat("/rest\n")
    assert heard == []


@pytest.mark.parametrize("stream", [False, True])
def test_real_answers_streamed_or_not(stream: bool) -> None:
    said = generate(tiny_model(), tiny_tokenizer(), [{"role": "user", "content": "hi"}], Sampling(6, temperature=0))
    assert f"> {terminal(said.text)}\n> " in _chat("hi\n", stream=stream)


def test_experts_are_shown_on_request() -> None:
    shown, hidden = _chat("/experts\nhi\n"), _chat("/experts\n/experts\nhi\n")
    assert "answer, mean:" in shown
    assert "answer, mean:" not in hidden
    assert "answer, mean:" in _chat("hi\n", show_routing=True)


def test_a_conversation_that_grew_too_long_goes_on() -> None:
    printed = _chat("a" * 300 + "\nhi\n")
    assert "exceed the base's context" in printed
    assert printed.rstrip().endswith(">")


def _options(**changes: Any) -> InferenceOptions:
    options: dict[str, Any] = {"weights": "", "base": None, "prompt": None, "interactive": False, "max_new_tokens": 5}
    options |= {"prompts_file": None, "output_file": None, "expert": None, "best_of_n": 1, "self_refine": 0}
    options |= {"batch_size": 2}
    options |= {"temperature": 0.0, "top_p": 1.0, "stream": False, "show_routing": False, "bf16": False, "seed": 0}
    return InferenceOptions(**options | changes)


def test_one_prompt_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_model(tmp_path)
    said = generate(tiny_model(), tiny_tokenizer(), [{"role": "user", "content": "hi"}], Sampling(5, temperature=0))
    capsys.readouterr()  # what libraries said when they were imported
    for path, stream in ((weights, False), (weights.parent, True)):
        inference_command(_options(weights=str(path), prompt="hi", stream=stream))
        assert capsys.readouterr().out == terminal(said.text) + "\n"
    inference_command(_options(weights=str(weights), prompt="hi", show_routing=True, expert="code"))
    routing = capsys.readouterr().out
    assert "prompt:" in routing and "answer, mean: code 100%" in routing
    inference_command(_options(weights=str(weights), prompt="hi", self_refine=1, best_of_n=2, temperature=2.0))
    lines = capsys.readouterr().out
    for part in ("sample 1: ", "sample 2: ", " of 2 agree.", "first answer: ", "refined, round 1: "):
        assert part in lines
    (tmp_path / "p.txt").write_text("hello there\nhi\n")
    inference_command(_options(weights=str(weights), prompts_file=str(tmp_path / "p.txt")))
    printed = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [item["prompt"] for item in printed] == ["hello there", "hi"] and printed[1]["answer"] == said.text
    files = {"prompts_file": str(tmp_path / "p.txt"), "output_file": str(tmp_path / "out.jsonl")}
    inference_command(_options(weights=str(weights), **files))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().strip().split("\n")] == printed


def test_the_longest_answer_follows_from_the_context(tmp_path: Path) -> None:
    weights = str(save_model(tmp_path))
    seen: list[Sampling] = []

    def generate(model: Any, tokenizer: Any, messages: Any, sampling: Sampling, **_: Any) -> Mock:
        seen.append(sampling)
        return Mock(text="")

    for given, expected in ((None, 128), (3, 3)):  # the context is 256
        with patch("srde_ds.inference.command.generate", generate):
            inference_command(_options(weights=weights, prompt="hi", max_new_tokens=given))
        assert seen.pop().max_new_tokens == expected
    assert answer_length(tiny_model(context=4096), None, 256) == 256


def test_interactive_reads_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/experts\n"))
    inference_command(_options(weights=str(save_model(tmp_path)), interactive=True))
    assert "Experts are shown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give one of --prompt TEXT, --prompts_file FILE and --interactive"),
        ({"prompt": "a", "interactive": True}, "not --prompt and --interactive"),
        ({"prompt": "a", "prompts_file": "b"}, "not --prompt and --prompts_file"),
        ({"prompt": "a", "best_of_n": 0}, "best_of_n=0: must be at least 1"),
        ({"prompt": "a", "self_refine": -1}, "self_refine=-1: must be at least 0"),
        ({"prompts_file": "a", "batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"prompt": "a", "best_of_n": 3}, "best_of_n=3 with temperature=0"),
        ({"prompt": "a", "best_of_n": 3, "temperature": 1.0, "stream": True}, "leave one out"),
        ({"prompt": "a", "self_refine": 1, "show_routing": True}, "leave one out"),
        ({"prompts_file": "a", "stream": True}, "--stream is for --prompt and --interactive"),
        ({"interactive": True, "self_refine": 1}, "not for --interactive"),
        ({"prompt": "a", "output_file": "b"}, "--output_file is for the answers to --prompts_file"),
        ({"prompts_file": "a", "output_file": f"{__file__}/b"}, "is not a folder"),
        ({"prompts_file": "a", "output_file": str(Path(__file__).parent)}, "it is a folder"),
        ({"prompts_file": "/no/such"}, "no such file"),
        ({"prompt": " "}, "prompt=''"),
        ({"prompt": "a", "weights": "/nowhere"}, "no such file or folder"),
    ],
)
def test_bad_input_is_refused_before_anything_loads(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        inference_command(_options(**changes))


def test_a_folder_without_weights_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SRDEError, match="folder of a run that has saved a checkpoint"):
        inference_command(_options(weights=str(tmp_path), prompt="a"))
