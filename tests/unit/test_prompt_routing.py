"""One expert for a whole text, chosen by the tokens of its prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from srde_ds.cli.main import main
from srde_ds.data.packing import prompt_ids, tokenize
from srde_ds.errors import SRDEError
from srde_ds.evaluation.perplexity import response_losses
from srde_ds.inference.generate import Sampling, generate
from srde_ds.model.adapter import SRDEModel
from srde_ds.model.policy import RoutingPolicy
from srde_ds.model.prompt_routing import experts_of_prompts, routed_by_prompt, votes_of_tokens, winners
from tests.data_helpers import tiny_tokenizer
from tests.evaluation_helpers import NAMES, records, save_model, tiny_model, write_jsonl
from tests.helpers import randomize, tiny_srde, tokens

MESSAGES = [{"role": "user", "content": "what is é + ü?"}]


@pytest.fixture
def model() -> SRDEModel:
    return randomize(tiny_srde(num_experts=3, top_k=2)).eval()


def logits(model: SRDEModel, ids: Tensor, forced: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids, policy=RoutingPolicy(forced_experts=forced)).logits
    assert found is not None
    return found


def test_one_expert_a_row_is_that_expert_for_each_of_its_tokens(model: SRDEModel) -> None:
    ids, experts_B1 = tokens(), torch.tensor([[2], [0]])
    assert torch.equal(logits(model, ids, experts_B1), logits(model, ids, experts_B1.expand_as(ids)))
    assert not torch.equal(logits(model, ids, experts_B1), logits(model, ids, experts_B1.flip(0)))


def test_the_most_votes_of_a_prompts_tokens_win(model: SRDEModel) -> None:
    ids = tokens(batch=4)
    prompt = torch.arange(ids.shape[1]) < torch.tensor([3, 5, 8, 16])[:, None]
    choices: dict[int, Tensor] = {}
    with torch.no_grad():
        output = model(ids, policy=RoutingPolicy(choices=choices, apply_experts=False)).logits
        assert torch.equal(output, model(ids, policy=RoutingPolicy(active=False)).logits)
    votes_BSE = votes_of_tokens(model, ids, policy=RoutingPolicy())
    assert bool((votes_BSE.sum(-1) == len(model.layers)).all())
    expected = []
    for row, mask in enumerate(prompt):
        firsts = torch.stack([c[:, 0].view(ids.shape)[row][mask] for c in choices.values()], 1)
        last = firsts[-1].repeat(int(mask.sum()))  # has read the prompt: as many votes as all together
        expected.append(int(torch.bincount(torch.cat([firsts.flatten(), last.flatten()]), minlength=3).argmax()))
    found = experts_of_prompts(model, ids, prompt, policy=RoutingPolicy())
    assert found.flatten().tolist() == expected and len(set(expected)) > 1


def test_what_routers_choose_from_the_bases_inputs(model: SRDEModel) -> None:
    ids = tokens()
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in model.layers]
    choices: dict[int, Tensor] = {}
    with torch.no_grad():
        model(ids, policy=RoutingPolicy(choices=choices, apply_experts=False))
        for hook in hooks:
            hook.remove()
        for number, layer in enumerate(model.layers):
            best = layer.router(seen[number].flatten(0, 1)).topk(2).indices
            assert torch.equal(choices[number], best)
        with_experts: dict[int, Tensor] = {}
        model(ids, policy=RoutingPolicy(choices=with_experts))
    assert torch.equal(choices[0], with_experts[0]) and not torch.equal(choices[1], with_experts[1])


def test_the_last_token_wins_against_a_small_majority_of_the_others() -> None:
    """Padding on the right and on the left, and an empty prompt."""
    votes_BSE = torch.tensor([[[1, 0], [1, 0], [0, 1], [1, 0]], [[1, 0], [1, 0], [1, 0], [0, 1]], [[0, 1]] * 4])
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    assert winners(votes_BSE, mask).flatten().tolist() == [1, 1, 0]
    mask[0] = True
    assert winners(votes_BSE, mask).flatten().tolist() == [0, 1, 0]


def test_only_allowed_experts_win_and_what_is_forced_or_off_stays(model: SRDEModel) -> None:
    ids, policy = tokens(), RoutingPolicy()
    everywhere = torch.ones_like(ids).bool()
    assert routed_by_prompt(model, ids, everywhere, policy) is policy  # each token for itself, by default
    with pytest.raises(SRDEError, match="route_by='tokens': give 'token' or 'prompt'"):
        model.route_by = "tokens"  # type: ignore[assignment]
    model.route_by = "prompt"
    for name in model.expert_names:
        model.set_active_experts([name])
        forced = routed_by_prompt(model, ids, everywhere, policy).forced_experts
        assert forced is not None and set(forced.flatten().tolist()) == {model.expert_names.index(name)}
    model.set_active_experts(None)
    for kept in (RoutingPolicy(active=False), RoutingPolicy(forced_experts=torch.ones_like(ids))):
        assert routed_by_prompt(model, ids, everywhere, kept) is kept
    with model.no_experts():
        assert routed_by_prompt(model, ids, everywhere, policy) is policy


def test_an_answer_is_that_of_the_prompts_expert() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    by_token = generate(model, tokenizer, MESSAGES, Sampling(20, temperature=0))
    ids = torch.tensor([prompt_ids(tokenizer, MESSAGES)])
    expert = experts_of_prompts(model, ids, torch.ones_like(ids).bool(), policy=RoutingPolicy())
    forced = RoutingPolicy(forced_experts=expert)
    expected = generate(model, tokenizer, MESSAGES, Sampling(20, temperature=0), policy=forced)
    model.route_by = "prompt"
    answer = generate(model, tokenizer, MESSAGES, Sampling(20, temperature=0), show_routing=True)
    assert answer.tokens == expected.tokens != by_token.tokens
    assert answer.routing is not None
    assert set(answer.routing.shares_TE.argmax(1).tolist()) == {int(expert)}
    assert float(answer.routing.shares_TE.max(1).values.min()) == 1


def test_losses_are_those_of_the_prompts_expert() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    items = records()
    by_token = response_losses(model, tokenizer, items, max_length=256, batch_size=3)
    alone = [
        response_losses(model, tokenizer, items, max_length=256, batch_size=3, expert=e) for e in range(len(NAMES))
    ]
    model.route_by = "prompt"
    by_prompt = response_losses(model, tokenizer, items, max_length=256, batch_size=3)
    for number, (item, document) in enumerate(zip(items, tokenize(items, tokenizer), strict=True)):
        ids = torch.from_numpy(document.input_ids).long()[None]
        prompt = torch.from_numpy(document.is_response).cumsum(0)[None] == 0
        expert = int(experts_of_prompts(model, ids, prompt, policy=RoutingPolicy()))
        assert by_prompt[number].loss_sum == pytest.approx(alone[expert][number].loss_sum, rel=1e-5), item.where
    assert [item.loss_sum for item in by_prompt] != [item.loss_sum for item in by_token]


def test_the_verbs_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = save_model(tmp_path)
    write_jsonl(tmp_path / "items.jsonl", records())
    answers = {}
    for route_by in ("token", "prompt"):
        main(
            [
                "inference",
                "--weights",
                str(weights),
                "--prompt",
                "what is 2 + 2?",
                "--max_tokens",
                "6",
                "--bf16",
                "false",
            ]
            + ["--temperature", "0", "--show_routing", "--route_by", route_by]
        )
        answers[route_by] = capsys.readouterr().out
        target = tmp_path / f"{route_by}.json"
        main(
            ["evaluate", "--weights", str(weights), "--eval_file", str(tmp_path / "items.jsonl"), "--bf16", "false"]
            + ["--max_new_tokens", "2", "--route_by", route_by, "--output_file", str(target)]
        )
        assert f'"route_by": "{route_by}"' in target.read_text()
    assert answers["token"] != answers["prompt"]
