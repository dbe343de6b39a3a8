"""Generation through the worker: with its slots it equals recomputing everything, alone and among strangers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from engine.jobs import PATIENCE, Mailbox, job
from engine.models import every_family, hooks_on, plain_model, resident
from engine.test_worker import Reports
from families import FAMILIES, Family, family_named
from patchclamp_server.engine.decoding import DecodingLimits
from patchclamp_server.engine.execution import execute
from patchclamp_server.engine.messages import (
    Finish,
    GenerationEvent,
    GenerationJob,
    GenerationSpec,
    JobDone,
    JobFailed,
    LogitsSpec,
    ReadSpec,
    RunSpec,
    SampleEnded,
    SampleFailed,
    StopRules,
    TokenGenerated,
)
from patchclamp_server.engine.sampling import SamplingRules
from patchclamp_server.engine.worker import Worker
from patchclamp_server.errors import DeadlineExceeded
from patchclamp_server.hookpoints import HookPoint, Site
from patchclamp_server.interventions.ops import Ablate, Add, Clamp, Intervention, Knockout, Scale, Target, Unit, Zero
from patchclamp_server.interventions.plan import Plan
from patchclamp_server.positions import Positions, Range, Span

PROMPTS = ((5, 17, 3, 40, 11), (9, 33, 21, 4, 48, 2, 30), (50, 1, 44), (8, 7, 6, 5, 4, 3, 2, 1, 12, 13, 14))
N_NEW = 9
GREEDY = SamplingRules()
# Small, so that prompts come in several chunks.
LIMITS = DecodingLimits(max_samples=8, chunk_tokens=6)
LLAMA = family_named("llama")


class Stream:
    """Takes the events of one generation; the test waits for its end."""

    def __init__(self) -> None:
        self.events: list[GenerationEvent] = []
        self._ended = threading.Event()

    def __call__(self, event: GenerationEvent) -> None:
        self.events.append(event)
        if isinstance(event, JobDone | JobFailed):
            self._ended.set()

    def wait(self) -> list[GenerationEvent]:
        assert self._ended.wait(PATIENCE), "the generation did not end"
        return self.events

    def tokens(self, sample: int = 0) -> list[TokenGenerated]:
        found = [event for event in self.wait() if isinstance(event, TokenGenerated) and event.sample == sample]
        assert [token.index for token in found] == list(range(found[0].index, found[0].index + len(found)))
        return found

    def ids(self, sample: int = 0) -> list[int]:
        return [token.token_id for token in self.tokens(sample)]

    def end(self, sample: int = 0) -> SampleEnded:
        return next(e for e in self.wait() if isinstance(e, SampleEnded) and e.sample == sample)


class Engine:
    """A serving worker for one family."""

    def __init__(self, family: Family, limits: DecodingLimits = LIMITS) -> None:
        self.family = family
        self.worker = Worker(lambda progress: resident(family), decoding=limits)
        reports = Reports()
        self.worker.start(reports)
        reports.settled()
        self._ids = iter(range(10**6))

    def start(self, spec: GenerationSpec, *, solo: bool = False) -> Stream:
        stream = Stream()
        self.worker.generate(GenerationJob(next(self._ids), spec, solo=solo), stream)
        return stream

    def stop(self) -> None:
        self.worker.stop(PATIENCE)
        assert hooks_on(resident(self.family).runner) == 0
        assert self.worker.waiting == 0


@pytest.fixture
def engine() -> Iterator[Engine]:
    one = Engine(LLAMA)
    yield one
    one.stop()


def spec(
    prompt: Sequence[int], *edits: Intervention, new: int = N_NEW, rules: SamplingRules = GREEDY
) -> GenerationSpec:
    return GenerationSpec(tuple(prompt), (rules,), StopRules(new), edits)


def recomputed(family: Family, one: GenerationSpec) -> list[int]:
    """Greedy tokens, each from a whole forward over everything before it, by the engine's own cacheless path.

    What an edit selects in a run of that length it also selects while generating, but spans of generated tokens have to
    be spelled out.
    """
    tokens, n_prompt = list(one.prompt), len(one.prompt)
    for _ in range(one.stop.max_new_tokens):
        edits = tuple(_spelled_out(edit, n_prompt, len(tokens)) for edit in one.interventions)
        run = RunSpec(tuple(tokens), logits=LogitsSpec(), interventions=edits)
        (output,) = execute(resident(family).runner, [run])
        assert output.logits is not None
        assert output.logits.values is not None
        tokens.append(int(output.logits.values[0].argmax()))
    return tokens[n_prompt:]


def _spelled_out(edit: Intervention, n_prompt: int, length: int) -> Intervention:
    generated = edit.positions.resolve(n_prompt, length - n_prompt)
    return replace(edit, positions=Positions(generated), allow_never_fired=True)


def vector(family: Family, seed: int) -> torch.Tensor:
    return torch.randn(resident(family).facts.dims.d_model, generator=torch.Generator().manual_seed(seed))


def edits(family: Family) -> list[tuple[Intervention, ...]]:
    """Different edits for different callers."""
    late, early = HookPoint(Site.RESID_POST, 1), HookPoint(Site.RESID_PRE, 0)
    mlp, z = HookPoint(Site.MLP_OUT, 0), HookPoint(Site.ATTN_Z, 1)
    return [
        (),
        (Intervention(Add(Target((early,)), vector(family, 1), 2.0)),),
        (Intervention(Ablate(Target((late, early)), vector(family, 2))), Intervention(Zero(Target((mlp,))))),
        (Intervention(Add(Target((late,)), vector(family, 3), 0.5, Unit.NORM_FRACTION), Positions(Span.GENERATED)),),
        (Intervention(Scale(Target((late,)), vector(family, 4), 3.0), Positions(Span.LAST)),),
        (Intervention(Clamp(Target((early,)), vector(family, 5), high=0.1), Positions(Range(2, None))),),
        (Intervention(Zero(Target((z,), heads=(1,))), Positions((-1,))),),
        (Intervention(Knockout(1, ((3, 0), (3, 1)))),),
    ]


@every_family
def test_greedy_generation_is_that_of_transformers(family: Family) -> None:
    engine, model = Engine(family), plain_model(family)
    streams = [engine.start(spec(prompt)) for prompt in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None
        )
        assert stream.ids() == whole[0, len(prompt) :].tolist()
        assert stream.end().finish is Finish.LENGTH
    engine.stop()


def test_only_attention_out_of_reach_keeps_a_model_from_sharing_slots() -> None:
    alone = {family.name for family in FAMILIES if resident(family).facts.no_slots_reason}
    assert alone == {family.name for family in FAMILIES if resident(family).runner.adapter.probes.catches_softmax}
    assert alone


# GPT-J and BLOOM have caches of their own, and a row a forward.
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "gpt_neox", "mixtral", "gptj", "bloom"])
def test_edited_among_strangers_equals_recomputing_everything_alone(name: str) -> None:
    family = family_named(name)
    specs = [spec(PROMPTS[index % 4], *some) for index, some in enumerate(edits(family))]
    # Before the worker has the model: one thread at a time may use it.
    expected = [recomputed(family, one) for one in specs]
    engine = Engine(family)
    streams = [engine.start(one) for one in specs]
    assert [stream.ids() for stream in streams] == expected
    engine.stop()


def test_receipts_count_prompt_and_generated_tokens(engine: Engine) -> None:
    everywhere = Intervention(Add(Target((HookPoint(Site.RESID_POST, 0),)), vector(LLAMA, 1), 2.0))
    generated = replace(everywhere, positions=Positions(Span.GENERATED))
    last = replace(everywhere, positions=Positions(Span.LAST))
    receipts = engine.start(spec(PROMPTS[0], everywhere, generated, last)).end().receipts
    # The last token is never seen by a forward.
    n_all, n_generated = len(PROMPTS[0]) + N_NEW - 1, N_NEW - 1
    assert [receipt.rows_selected for receipt in receipts] == [n_all, n_generated, 1]
    assert [receipt.rows_fired for receipt in receipts] == [n_all, n_generated, 1]


def test_receipts_survive_a_longer_neighbour(engine: Engine) -> None:
    edit = Intervention(Add(Target((HookPoint(Site.RESID_POST, 0),)), vector(LLAMA, 1), 2.0))
    short = engine.start(spec(PROMPTS[2], edit, new=12))
    long = engine.start(spec(PROMPTS[3], edit, new=40))
    assert short.end().receipts[0].rows_fired == len(PROMPTS[2]) + 11
    assert long.end().receipts[0].rows_fired == len(PROMPTS[3]) + 39


def test_reads_are_those_of_the_whole_run_whatever_the_chunks(engine: Engine) -> None:
    reads = (
        ReadSpec(Site.RESID_POST, (0, 1)),
        ReadSpec(Site.ATTN_PATTERN, (1,), Positions(Span.GENERATED)),
        ReadSpec(Site.MLP_OUT, (0,), Positions((-1,))),
    )
    stream = engine.start(replace(spec(PROMPTS[3]), reads=reads))
    tokens = stream.tokens()
    whole = (*PROMPTS[3], *stream.ids())[:-1]
    run = RunSpec(whole, (ReadSpec(Site.RESID_POST, (0, 1)), ReadSpec(Site.ATTN_PATTERN, (1,))))
    (expected,) = execute(resident(LLAMA).runner, [run])
    for layer in (0, 1):
        parts = [
            read for token in tokens for read in token.reads if read.read_index == 0 and read.hook_point.layer == layer
        ]
        assert [position for part in parts for position in part.positions] == list(range(len(whole)))
        got = torch.cat([part.values for part in parts])
        torch.testing.assert_close(got, expected.reads[layer].values, rtol=0, atol=2e-5)
    patterns = [read for token in tokens for read in token.reads if read.read_index == 1]
    assert [part.positions for part in patterns] == [(place,) for place in range(len(PROMPTS[3]), len(whole))]
    for part in patterns:
        (place,) = part.positions
        want = expected.reads[2].values[:, place : place + 1, : place + 1]
        torch.testing.assert_close(part.values, want, rtol=0, atol=2e-6)
    (single,) = [read for token in tokens for read in token.reads if read.read_index == 2]
    assert single.positions == (len(PROMPTS[3]) - 1,)


def test_log_probabilities_are_the_models_own(engine: Engine) -> None:
    sampled = replace(spec(PROMPTS[1], rules=SamplingRules(1.3, top_k=9, seed=5)), top_logprobs=4)
    stream = engine.start(sampled)
    tokens = (*PROMPTS[1], *stream.ids())
    (output,) = execute(resident(LLAMA).runner, [RunSpec(tokens, logits=LogitsSpec(Positions()))])
    assert output.logits is not None
    assert output.logits.values is not None
    for token in stream.tokens():
        row = output.logits.values[len(PROMPTS[1]) + token.index - 1].log_softmax(-1)
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        top = row.topk(4)
        assert token.top_ids == tuple(top.indices.tolist())
        assert token.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


def test_a_seed_gives_the_same_tokens_alone_and_among_strangers(engine: Engine) -> None:
    one = spec(PROMPTS[0], rules=SamplingRules(1.5, seed=11), new=12)
    alone = engine.start(one).ids()
    strangers = [engine.start(spec(prompt, rules=SamplingRules(2.0, seed=3), new=7)) for prompt in PROMPTS]
    assert engine.start(one).ids() == alone
    assert all(len(stream.ids()) == 7 for stream in strangers)
    other = replace(one, sampling=(SamplingRules(1.5, seed=12),))
    assert engine.start(other).ids() != alone


def test_samples_of_one_request_differ_and_each_equals_itself_alone(engine: Engine) -> None:
    rules = tuple(SamplingRules(1.5, seed=11, sample=number) for number in range(3))
    together = engine.start(replace(spec(PROMPTS[0]), sampling=rules))
    found = [together.ids(number) for number in range(3)]
    assert len({tuple(ids) for ids in found}) == 3
    assert engine.start(replace(spec(PROMPTS[0]), sampling=(rules[2],))).ids() == found[2]


def test_more_samples_than_slots_wait_for_their_turn(engine: Engine) -> None:
    streams = [engine.start(spec(PROMPTS[index % 4], new=4)) for index in range(3 * LIMITS.max_samples)]
    expected = [engine.start(spec(prompt, new=4)).ids() for prompt in PROMPTS]
    assert all(stream.ids() == expected[index % 4] for index, stream in enumerate(streams))


def test_a_stop_token_ends_a_sample_and_is_its_last(engine: Engine) -> None:
    free = engine.start(spec(PROMPTS[0])).ids()
    stop = free[4]
    stopped = engine.start(replace(spec(PROMPTS[0]), stop=StopRules(N_NEW, frozenset({stop}))))
    assert stopped.ids() == free[: free.index(stop) + 1]
    assert stopped.end().finish is Finish.STOP


def test_generation_ends_where_the_context_does() -> None:
    n_ctx = resident(LLAMA).facts.dims.n_ctx
    engine = Engine(LLAMA)
    prompt = tuple(1 + index % 40 for index in range(n_ctx - 3))
    stream = engine.start(spec(prompt, new=50))
    assert len(stream.ids()) == 3
    assert stream.end().finish is Finish.CONTEXT
    engine.stop()


def test_received_tokens_are_gone_on_with(engine: Engine) -> None:
    rules = SamplingRules(1.5, repetition_penalty=1.3, seed=11)
    edit = Intervention(Add(Target((HookPoint(Site.RESID_POST, 0),)), vector(LLAMA, 1), 2.0), Positions(Span.GENERATED))
    whole = spec(PROMPTS[0], edit, rules=rules, new=10)
    ids = engine.start(whole).ids()
    rest = engine.start(replace(whole, received=(tuple(ids[:4]),)))
    assert rest.tokens()[0].index == 4
    assert rest.ids() == ids[4:]


def test_a_cancelled_neighbour_changes_nothing(engine: Engine) -> None:
    expected = engine.start(spec(PROMPTS[1], new=20)).ids()
    one = engine.start(spec(PROMPTS[1], new=20))
    cancelled = Stream()
    engine.worker.generate(GenerationJob(10**7, spec(PROMPTS[3], new=40)), cancelled)
    engine.worker.cancel(10**7)
    assert one.ids() == expected
    assert isinstance(cancelled.wait()[-1], JobFailed)


def test_solo_samples_share_no_forward(engine: Engine) -> None:
    expected = [engine.start(spec(prompt)).ids() for prompt in PROMPTS]
    widths: list[int] = []

    def watch(_: object, args: tuple[torch.Tensor, ...]) -> None:
        widths.append(args[0].shape[0])

    embed = resident(LLAMA).runner.adapter.layout.embed
    with embed.register_forward_pre_hook(watch):
        streams = [engine.start(spec(prompt), solo=True) for prompt in PROMPTS]
        assert [stream.ids() for stream in streams] == expected
    assert set(widths) == {1}


def test_a_paused_generation_waits_and_others_go_on(engine: Engine) -> None:
    long = spec(PROMPTS[0], new=200)
    expected = engine.start(long).ids()
    paused = Stream()
    engine.worker.generate(GenerationJob(10**7, long), paused)
    engine.worker.pause(10**7, paused=True)
    assert len(engine.start(spec(PROMPTS[1])).ids()) == N_NEW
    seen = len(paused.events)
    assert not any(isinstance(event, JobDone) for event in paused.events)
    assert len(engine.start(spec(PROMPTS[1])).ids()) == N_NEW
    assert len(paused.events) == seen
    engine.worker.pause(10**7, paused=False)
    assert paused.ids() == expected


def test_a_paused_generation_can_still_die(engine: Engine) -> None:
    paused = Stream()
    deadline = time.monotonic() + 0.3
    engine.worker.generate(GenerationJob(10**7, spec(PROMPTS[0], new=200), deadline=deadline), paused)
    engine.worker.pause(10**7, paused=True)
    end = paused.wait()[-1]
    assert isinstance(end, JobFailed)
    assert isinstance(end.error, DeadlineExceeded)


def test_many_that_are_cancelled_before_their_first_forward_leave_the_others_alone() -> None:
    engine = Engine(LLAMA, DecodingLimits(max_samples=64, chunk_tokens=6))
    expected = engine.start(spec(PROMPTS[1], new=20)).ids()
    good = engine.start(spec(PROMPTS[1], new=20))
    rules = tuple(SamplingRules(1.0, sample=number) for number in range(40))
    gone = [Stream() for _ in range(3)]
    for number, stream in enumerate(gone):
        engine.worker.generate(GenerationJob(10**7 + number, replace(spec(PROMPTS[3]), sampling=rules)), stream)
    for number in range(3):
        engine.worker.cancel(10**7 + number)
    assert good.ids() == expected
    assert all(isinstance(stream.wait()[-1], JobFailed) for stream in gone)
    assert engine.start(spec(PROMPTS[1], new=20)).ids() == expected
    engine.stop()


def overflowing(layer: int = 1) -> Intervention:
    return Intervention(Zero(Target((HookPoint(Site.LN1_SCALE, layer),))))


def test_what_is_not_finite_fails_its_own_sample_and_poisons_no_slot(engine: Engine) -> None:
    expected = engine.start(spec(PROMPTS[0])).ids()
    # Somebody decodes all the while, so that the slots stay, and to a greater length.
    neighbour = engine.start(spec(PROMPTS[3], new=40))
    bad = engine.start(spec((*PROMPTS[3], *PROMPTS[3]), overflowing(), new=2))
    failures = [event for event in bad.wait() if isinstance(event, SampleFailed)]
    assert [failure.error.reason for failure in failures] == ["NOT_FINITE"]
    after = engine.start(spec(PROMPTS[0]))
    assert after.ids() == expected
    assert all(token.logprob == token.logprob for token in after.tokens())
    assert len(neighbour.ids()) == 40


def test_sampling_of_what_is_not_finite_fails_alone_too(engine: Engine) -> None:
    good = engine.start(spec(PROMPTS[0], rules=SamplingRules(1.0)))
    huge = Intervention(Add(Target((HookPoint(Site.RESID_POST, 1),)), vector(LLAMA, 1) * 3e38, 10.0))
    bad = engine.start(spec(PROMPTS[1], huge, rules=SamplingRules(1.0, top_p=0.9)))
    assert any(isinstance(event, SampleFailed) for event in bad.wait())
    assert len(good.ids()) == N_NEW


def test_a_caller_of_many_samples_leaves_room_for_others(engine: Engine) -> None:
    rules = tuple(SamplingRules(1.0, sample=number) for number in range(3 * LIMITS.max_samples))
    many = engine.start(replace(spec(PROMPTS[0], new=40), sampling=rules))
    one = engine.start(spec(PROMPTS[1], new=3))
    assert len(one.ids()) == 3
    assert not any(isinstance(event, JobDone) for event in many.events)
    assert len(many.wait()) == len(rules) * 41 + 1


@pytest.mark.parametrize("method", ["place", "receipts"])
def test_a_fault_beside_the_forward_fails_one_sample(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    real, faults = getattr(Plan, method), iter([True])

    def failing(*args: object) -> object:
        if next(faults, False):
            raise RuntimeError("out of memory, say")
        return real(*args)

    edit = Intervention(Add(Target((HookPoint(Site.RESID_POST, 0),)), vector(LLAMA, 1), 2.0))
    expected = engine.start(spec(PROMPTS[1], edit)).ids()
    neighbour = engine.start(spec(PROMPTS[0], new=30))
    monkeypatch.setattr(Plan, method, failing)
    bad = engine.start(spec(PROMPTS[1], edit))
    assert any(isinstance(event, SampleFailed) for event in bad.wait())
    assert engine.start(spec(PROMPTS[1], edit)).ids() == expected
    assert len(neighbour.ids()) == 30


def test_nothing_is_kept_of_a_generation_that_is_over(engine: Engine) -> None:
    for _ in range(5):
        engine.start(spec(PROMPTS[0], new=2)).wait()
    assert engine.worker._generations is not None
    decoder = engine.worker._generations._decoder
    assert not decoder._served
    assert not decoder._waiting
    assert not decoder._resident


def test_a_faulty_sample_fails_alone(engine: Engine) -> None:
    good = engine.start(spec(PROMPTS[0]))
    # Outside the vocabulary: the front would have refused it.
    bad = engine.start(spec((1, 2, 10**6)))
    assert good.ids() == engine.start(spec(PROMPTS[0])).ids()
    assert any(isinstance(event, SampleFailed) for event in bad.wait())


def test_runs_are_served_while_others_generate(engine: Engine) -> None:
    stream = engine.start(spec(PROMPTS[0], new=30))
    mailbox = Mailbox()
    engine.worker.submit(job(lengths=(5, 40, 7)), mailbox)
    assert sorted(mailbox.finished) == [0, 1, 2]
    assert len(stream.ids()) == 30
