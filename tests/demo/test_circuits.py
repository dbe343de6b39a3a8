"""What the circuits' measurements rest on holds for any weights: here, a small Llama that was never trained."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp_server.demo.circuits import (
    Exchange,
    Prompts,
    circuits,
    control_heads,
    direct_effects,
    donor_share,
    exchanges,
    induction_scores,
    previous_token_scores,
    ranked,
)
from patchclamp_server.demo.corpus import facts, indirect_objects
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.surgery import Head, attention_patterns, heads_replaced, mlps_set, residual_replaced
from patchclamp_server.demo.tokenizer import build_tokenizer

N_LAYERS, N_HEADS, HEAD_DIM = 3, 4, 8
IS, CITY, OF = -1, -2, -6


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=N_HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        head_dim=HEAD_DIM,
        attention_bias=True,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # as made, biases are 0 and the norms' weights 1
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return Subject(model, tokenizer)


@pytest.fixture(scope="module")
def prompts(subject: Subject) -> Prompts:
    return Prompts.draw(subject, count=24, seed=5)


@pytest.fixture(scope="module")
def pairs() -> list[Exchange]:
    return exchanges(12, seed=3)[0]


def pattern(query_to_key: dict[int, int], length: int) -> Tensor:
    attention = torch.zeros(length, length)
    for query, key in query_to_key.items():
        attention[query, key] = 1
    return attention


def test_induction_scores_of_made_up_patterns() -> None:
    period, length = 3, 7  # a start token, then two times three
    induction = pattern({4: 2, 5: 3, 6: 4}, length)
    two_of_three = pattern({4: 2, 5: 3, 6: 3}, length)
    first_half_only = pattern({2: 0, 3: 1}, length)
    earlier_occurrence = pattern({4: 1, 5: 2, 6: 3}, length)
    attention = torch.stack([induction, two_of_three, first_half_only, earlier_occurrence])[None, None]
    assert induction_scores(attention, period).flatten().tolist() == pytest.approx([1, 2 / 3, 0, 0])


def test_previous_token_scores_of_made_up_patterns() -> None:
    previous = pattern({query: query - 1 for query in range(1, 5)}, 5)
    own = torch.eye(5)
    attention = torch.stack([previous, own, (previous + own) / 2])[None, None]
    assert previous_token_scores(attention).flatten().tolist() == pytest.approx([1, 0, 0.5])


def test_heads_are_ranked_by_score_and_equal_ones_in_order() -> None:
    heads = ranked(torch.tensor([[0.1, 0.5], [0.5, 0.1]]))
    assert list(map(str, heads)) == ["L0H1", "L1H0", "L0H0", "L1H1"]


def test_attention_is_read_without_leaving_a_trace(subject: Subject) -> None:
    before = subject.model.config._attn_implementation
    attention = attention_patterns(subject.model, torch.arange(8)[None])
    assert attention.shape == (N_LAYERS, 1, N_HEADS, 8, 8)
    assert torch.allclose(attention.sum(-1), torch.ones(N_LAYERS, 1, N_HEADS, 8))
    assert subject.model.config._attn_implementation == before


def test_zeroing_every_head_leaves_the_attention_its_biases(subject: Subject, prompts: Prompts) -> None:
    every = [Head(layer, number) for layer in range(N_LAYERS) for number in range(N_HEADS)]
    with heads_replaced(subject.model, dict.fromkeys(every, torch.zeros(HEAD_DIM))):
        without = subject.next_log_probs(prompts.text)
    weights = [layer.self_attn.o_proj.weight for layer in subject.model.model.layers]
    kept = [weight.clone() for weight in weights]
    try:
        for weight in weights:
            weight.zero_()
        expected = subject.next_log_probs(prompts.text)
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    assert torch.allclose(without, expected, atol=1e-5)
    assert not torch.allclose(without, subject.next_log_probs(prompts.text), atol=1e-2)


def test_only_the_named_head_is_replaced(subject: Subject, prompts: Prompts) -> None:
    projection = subject.model.model.layers[1].self_attn.o_proj
    seen: list[Tensor] = []
    # Registered inside, so that it runs after the replacement.
    with heads_replaced(subject.model, {Head(1, 2): torch.full((HEAD_DIM,), 7.0)}, slice(-1, None)):
        handle = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        subject.next_log_probs(prompts.text)
        handle.remove()
    sevens = (seen[0] == 7).unflatten(-1, (N_HEADS, HEAD_DIM)).all(-1)  # [prompt, pos, head]
    assert sevens[:, -1, 2].all()
    assert sevens.sum() == len(prompts.text)


def test_direct_effects_of_all_parts_sum_to_the_logit_difference(subject: Subject, prompts: Prompts) -> None:
    unembedding = subject.model.lm_head.weight
    difference = unembedding[prompts.indirect_object] - unembedding[prompts.subject]
    effects = direct_effects(subject, prompts.text, difference)
    log_probs = subject.next_log_probs(prompts.text)
    rows = torch.arange(len(prompts.text))
    expected = log_probs[rows, prompts.indirect_object] - log_probs[rows, prompts.subject]
    assert torch.allclose(effects.total(), expected, atol=1e-4)
    assert effects.heads.shape == (len(prompts.text), N_LAYERS, N_HEADS)
    assert effects.attention_biases.abs().min() > 0


def test_roles_point_at_the_people(subject: Subject, prompts: Prompts) -> None:
    examples = list(indirect_objects.examples(24, seed=5))
    roles = prompts.roles()
    for row, example in enumerate(examples):
        at = {role: int(here[row].nonzero()) for role, here in roles.items()}  # raises where a role is not one position
        assert subject.tokenizer.decode([int(prompts.ids[row, at["IO"]])]).strip() == example.answer
        assert prompts.ids[row, at["S1"]] == prompts.ids[row, at["S2"]]
        assert at["S1"] < at["S2"] < at["the word after S2"] <= at["the end itself"] == prompts.ids.shape[1] - 1
        assert (at["the first name"], at["the second name"]) == tuple(sorted((at["IO"], at["S1"])))


def test_exchanges_have_donors_of_another_state_or_of_their_own(pairs: list[Exchange]) -> None:
    moved, kept = exchanges(12, seed=3)
    assert moved == pairs
    assert all(pair.base.answer != pair.donor.answer for pair in moved)
    assert all(pair.base.answer == pair.donor.answer and pair.base != pair.donor for pair in kept)
    assert [pair.base for pair in moved] == [pair.base for pair in kept]


@pytest.mark.parametrize("relation", ["capital", "neighbor"])
def test_every_question_has_its_words_at_the_same_positions(subject: Subject, relation: str) -> None:
    asked = [example for example in facts.two_hop_examples() if f" {relation} of " in example.prompt]
    for example in asked:
        tokens = [subject.tokenizer.decode([token]).strip() for token in subject.tokenizer(example.prompt)["input_ids"]]
        city = example.prompt.split()[-2]
        assert (tokens[OF], tokens[CITY], tokens[IS], len(tokens)) == ("of", city, "is", 11)


@pytest.mark.parametrize("position", [CITY, IS])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_an_exchange_with_itself_changes_nothing(
    subject: Subject, pairs: list[Exchange], layer: int, position: int
) -> None:
    questions = [pair.base.prompt for pair in pairs]
    own = subject.block_inputs(questions)[layer, :, position]
    with residual_replaced(subject.model, layer, position, own):
        exchanged = subject.next_log_probs(questions)
    assert torch.equal(exchanged, subject.next_log_probs(questions))


def test_exchanging_the_city_before_the_first_block_asks_the_donors_question(
    subject: Subject, pairs: list[Exchange]
) -> None:
    # True only if the questions differ in the city's token alone.
    donors = [pair.donor.prompt for pair in pairs]
    with residual_replaced(subject.model, 0, CITY, subject.block_inputs(donors)[0, :, CITY]):
        exchanged = subject.next_log_probs([pair.base.prompt for pair in pairs])
    assert torch.allclose(exchanged, subject.next_log_probs(donors), atol=1e-5)


def test_the_share_counts_the_donors_answers(
    subject: Subject, pairs: list[Exchange], monkeypatch: pytest.MonkeyPatch
) -> None:
    certain = torch.zeros(len(pairs), len(subject.tokenizer))
    for row, pair in enumerate(pairs):
        answering = pair.donor if row < 3 else pair.base
        certain[row, subject.token(answering.answer)] = 1
    monkeypatch.setattr(Subject, "next_log_probs", lambda *_: certain)
    assert donor_share(subject, pairs, 0, CITY, torch.zeros(len(pairs), 1)) == pytest.approx(3 / len(pairs))


def test_mlps_set_by_what_they_write_change_nothing_and_by_zero_something(
    subject: Subject, pairs: list[Exchange]
) -> None:
    question = [pairs[0].base.prompt]
    written: list[Tensor] = []
    mlps = [layer.mlp for layer in subject.model.model.layers]
    handles = [mlp.register_forward_hook(lambda _, __, output: written.append(output[0, CITY])) for mlp in mlps]
    before = subject.next_log_probs(question)
    for handle in handles:
        handle.remove()
    with mlps_set(subject.model, dict(enumerate(written)), CITY):
        assert torch.equal(subject.next_log_probs(question), before)
    with mlps_set(subject.model, {1: torch.zeros_like(written[1])}, CITY):
        assert not torch.allclose(subject.next_log_probs(question), before, atol=1e-3)


@pytest.mark.parametrize("chosen", [[Head(1, 0)], [Head(1, 0), Head(2, 3)], [Head(1, n) for n in range(3)]])
def test_control_heads_are_as_many_others_and_of_the_same_layers_first(subject: Subject, chosen: list[Head]) -> None:
    for others in control_heads(subject.model, chosen):
        assert len(set(others)) == len(chosen)
        assert not set(others) & set(chosen)
        for layer in {head.layer for head in chosen}:
            asked = sum(head.layer == layer for head in chosen)
            assert sum(head.layer == layer for head in others) >= min(asked, N_HEADS - asked)


def test_every_figure_has_its_own_name_and_the_model_stays_as_it_was(subject: Subject, prompts: Prompts) -> None:
    before = subject.next_log_probs(prompts.text)
    figures = list(circuits(subject))
    assert torch.equal(subject.next_log_probs(prompts.text), before)
    assert len({(figure.task, figure.what) for figure in figures}) == len(figures)
    assert not any("|" in figure.what for figure in figures)  # they stand in the card's table
