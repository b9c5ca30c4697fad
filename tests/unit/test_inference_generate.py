"""One answer: cache, streaming, sampling, experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from srde_ds.data.packing import prompt_ids
from srde_ds.errors import SRDEError
from srde_ds.inference.generate import Sampling, answer_length, check_context, format_routing, generate
from srde_ds.inference.many import generate_many
from srde_ds.inference.prompts import Prompt
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from tests.data_helpers import CHATML, tiny_tokenizer
from tests.evaluation_helpers import NAMES, tiny_model

MESSAGES = [{"role": "user", "content": "what is é + ü?"}]


def _uncached(model: SRDEModel, tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    ids = prompt_ids(tokenizer, MESSAGES)
    while len(ids) < length:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_cached_generation_equals_uncached_token_for_token() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = generate(model, tokenizer, MESSAGES, Sampling(40, temperature=0))
    assert answer.prompt_length == len(prompt_ids(tokenizer, MESSAGES))
    ids = _uncached(model, tokenizer, len(answer.tokens))
    assert [tokenizer.decode([token]) for token in ids] == answer.tokens
    with model.no_experts():
        bare = generate(model, tokenizer, MESSAGES, Sampling(40, temperature=0))
    assert bare.tokens != answer.tokens  # the deltas matter


def test_pieces_joined_are_the_text() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    so_far: list[str] = []
    torch.manual_seed(0)
    sampling = Sampling(60, temperature=2.0, top_p=1.0)
    streamed = generate(model, tokenizer, MESSAGES, sampling, stream=lambda answer: so_far.append(answer.text))
    torch.manual_seed(0)
    whole = generate(model, tokenizer, MESSAGES, Sampling(60, temperature=2.0, top_p=1.0))
    assert "".join(streamed.token_texts) == so_far[-1] == streamed.text == whole.text
    assert all(later.startswith(earlier) for earlier, later in zip(so_far, so_far[1:], strict=False))
    assert len(set(so_far)) > 10 and len(streamed.token_texts) == len(streamed.tokens) - streamed.prompt_length
    torch.manual_seed(1)
    assert generate(model, tokenizer, MESSAGES, Sampling(60, temperature=2.0, top_p=1.0)).text != whole.text


def test_a_character_of_several_tokens_is_streamed_whole() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    letters = tokenizer("é€é", add_special_tokens=False)["input_ids"]
    assert len(letters) == 7
    script = iter(letters)

    def forced(_: torch.nn.Module, __: object, output: object) -> None:
        output.logits[:] = 0  # type: ignore[attr-defined]
        output.logits[..., next(script)] = 9  # type: ignore[attr-defined]

    handle = model.base.register_forward_hook(forced)
    so_far: list[str] = []
    sampling = Sampling(7, temperature=0)
    answer = generate(model, tokenizer, MESSAGES, sampling, stream=lambda answer: so_far.append(answer.text))
    handle.remove()
    assert answer.token_texts == ["", "é", "", "", "€", "", "é"] and answer.text == "é€é"
    assert so_far == ["", "é", "é", "é", "é€", "é€", "é€é", "é€é"]


def scripted(model: SRDEModel, ids: list[int]) -> Any:
    """A hook that lets the model write these tokens, and after them the first one without end."""
    script = iter([*ids, *[ids[0]] * 99])

    def forced(_: torch.nn.Module, __: object, output: object) -> None:
        output.logits[:] = 0  # type: ignore[attr-defined]
        output.logits[..., next(script)] = 9  # type: ignore[attr-defined]

    return model.base.register_forward_hook(forced)


def test_an_end_of_turn_that_is_plain_text_is_no_part_of_the_answer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(CHATML.replace("<|im_end|>", "</turn>"))
    assert len(tokenizer.tokenize("</turn>")) == 7
    ids = tokenizer("7</ 8</turn>", add_special_tokens=False)["input_ids"]
    so_far: list[str] = []
    greedy = Sampling(len(ids) + 1, temperature=0)
    hook = scripted(model, [*ids, tokenizer.eos_token_id])
    answer = generate(model, tokenizer, MESSAGES, greedy, stream=lambda answer: so_far.append(answer.text))
    hook.remove()
    assert answer.text == "".join(answer.token_texts) == "7</ 8"
    assert all(later.startswith(earlier) for earlier, later in zip(so_far, so_far[1:], strict=False))
    hook = scripted(model, ids)
    (written,) = generate_many(model, tokenizer, [Prompt("p", MESSAGES, None)], greedy, batch_size=1, with_routing=True)
    hook.remove()
    assert (written.text, written.cut) == ("7</ 8", False)
    assert written.routing is not None and "".join(written.routing.tokens) == "7</ 8"


def test_marks_of_thoughts_stay_and_stops_go_whether_they_are_special_or_not() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(CHATML.replace("<|im_end|>", "<turn_end>"))
    tokenizer.eos_token = "<|im_end|>"
    opens, ends = tokenizer("<|im_start|><turn_end>")["input_ids"]  # as [THINK] would be, and the turn's end
    seven = tokenizer("7", add_special_tokens=False)["input_ids"]
    hook = scripted(model, [opens, *seven, ends])
    answer = generate(model, tokenizer, MESSAGES, Sampling(9, temperature=0))
    hook.remove()
    assert answer.text == "<|im_start|>7"
    stop = tokenizer("8", add_special_tokens=False)["input_ids"]
    model.base.generation_config.eos_token_id = stop[0]
    hook = scripted(model, [*seven, *stop])
    assert generate(model, tokenizer, MESSAGES, Sampling(9, temperature=0)).text == "7"
    hook.remove()


def test_a_narrow_nucleus_is_greedy_despite_the_bases_own_settings() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    greedy = generate(model, tokenizer, MESSAGES, Sampling(20, temperature=0))
    narrow = generate(model, tokenizer, MESSAGES, Sampling(20, temperature=1.0, top_p=1e-6))
    assert narrow.tokens == greedy.tokens
    config = model.base.generation_config
    config.do_sample, config.temperature, config.repetition_penalty = True, 5.0, 9.0
    config.no_repeat_ngram_size, config.suppress_tokens, config.min_p = 1, tokenizer("8")["input_ids"], 0.9
    config.begin_suppress_tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(greedy.text)[:1])
    assert generate(model, tokenizer, MESSAGES, Sampling(20, temperature=0)).tokens == greedy.tokens
    assert model.base.generation_config is config


def test_experts_are_those_of_a_forward_over_the_whole_text() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = generate(model, tokenizer, MESSAGES, Sampling(10, temperature=0), show_routing=True)
    assert answer.routing is not None
    shares_TE, weights_TE = answer.routing.shares_TE, answer.routing.weights_TE()
    assert shares_TE.shape == weights_TE.shape == (len(answer.tokens) - 1, 3)
    ids = _uncached(model, tokenizer, len(answer.tokens))
    recorded: dict[int, torch.Tensor] = {}
    weights: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]), policy=RoutingPolicy(choices=recorded, choice_weights=weights))
    for layer in (0, 1):
        expected = torch.zeros(len(ids) - 1, 3).scatter(1, recorded[layer], weights[layer])
        torch.testing.assert_close(answer.routing.weights_TE([layer]), expected)
    assert weights_TE.sum(1).tolist() == pytest.approx([1.0] * len(weights_TE))
    for position, row in enumerate(shares_TE):
        chosen = [int(e) for choices in recorded.values() for e in choices[position]]
        assert row.tolist() == pytest.approx([chosen.count(e) / len(chosen) for e in range(3)])


def test_routing_is_shown_for_prompt_and_answer() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    answer = generate(model, tokenizer, MESSAGES, Sampling(5, temperature=0), show_routing=True)
    lines = format_routing(answer, NAMES).splitlines()
    assert len(lines) == len(answer.tokens) - 1 + 3
    assert lines[0] == "prompt:" and lines[answer.prompt_length + 1] == "answer:"
    assert "%" in lines[1] and any(name in lines[-1] for name in NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"max_new_tokens": 250}, "context of 256"),
    ],
)
def test_bad_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SRDEError, match=message):
        generate(tiny_model(), tiny_tokenizer(), MESSAGES, Sampling(**options))


def test_a_base_may_have_no_context_of_its_own() -> None:
    model = tiny_model()
    model.base.config = cast("Any", SimpleNamespace(get_text_config=SimpleNamespace))
    assert answer_length(model, None) == 256 and answer_length(model, 5000) == 5000
    check_context(model, 5000, 5000, where="here")


def test_answering_works_without_a_chat_template() -> None:
    answer = generate(tiny_model(), tiny_tokenizer(template=None), MESSAGES, Sampling(5, temperature=0))
    assert "".join(answer.tokens[: answer.prompt_length]).startswith("what is")
