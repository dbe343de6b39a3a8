"""Generation by the real server with the bundled model, also over connections that break under way."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from patchclamp._config import Config
from patchclamp._demo_server import demo_server

PROMPT = "Fact: the capital of the state containing Dallas is"
SITE = "blocks.1.resid_post"
PATTERN = "blocks.1.attn.pattern"
STEER = pc.add(SITE, pc.unembed(" Austin"), unit="norm_fraction", strength=0.1)

pytestmark = pytest.mark.slow


class Wire:
    """Passes bytes on to a server. After `cut` bytes of answers it breaks every connection, once."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut: int | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                for source, sink, answers in ((caller, server, False), (server, caller, True)):
                    threading.Thread(target=self._pass_on, args=(source, sink, answers), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with suppress(OSError), source, sink:
            while data := source.recv(512):
                if answers and self.cut is not None:
                    self.cut -= len(data)
                    if self.cut < 0:
                        self.cut, self.cuts = None, self.cuts + 1
                        source.shutdown(socket.SHUT_RDWR)
                        sink.shutdown(socket.SHUT_RDWR)
                        return
                sink.sendall(data)


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    with demo_server(lambda waited, news: None) as address:
        yield address


@pytest.fixture(scope="module")
def real(target: str) -> Iterator[pc.Client]:
    with pc.Client(Config(target=target, timeout=60)) as client:
        yield client


@pytest.fixture
def wire(target: str) -> Iterator[Wire]:
    passing = Wire(target)
    yield passing
    passing.close()


def test_greedy_tokens_are_those_of_runs(real: pc.Client) -> None:
    made = real.generate(PROMPT, max_new_tokens=5, ignore_eos=True, top_logprobs=3, read=[SITE, PATTERN])
    assert (len(made.tokens), made.finish_reason) == (5, "length")
    assert made.text.startswith(" Austin")
    run = real.run([*made.prompt_tokens.ids, *made.tokens[:-1]], read=[SITE, PATTERN], logits="all", top_k=1)
    first = len(made.prompt_tokens) - 1
    assert [row[0].id for row in run.top_rows[first:]] == list(made.tokens)
    for row, top, logprob in zip(run.top_rows[first:], made.top, made.logprobs, strict=True):
        assert top[0].id == row[0].id
        assert logprob == pytest.approx(row[0].logprob, abs=1e-3)
    for name in (SITE, PATTERN):
        assert made[name].positions == run[name].positions
        np.testing.assert_allclose(made[name], run[name], rtol=1e-3, atol=1e-3)


def test_the_seed_decides(real: pc.Client) -> None:
    options: Any = {"max_new_tokens": 12, "temperature": 1.5, "ignore_eos": True, "samples": 2}
    one = real.generate(PROMPT, **options)
    again = real.generate(PROMPT, **options, seed=one.seed)
    assert [sample.tokens for sample in one.samples] == [sample.tokens for sample in again.samples]
    assert one.samples[0].tokens != one.samples[1].tokens


def test_stop_texts_are_left_out(real: pc.Client) -> None:
    made = real.generate(PROMPT, stop=["."])
    assert (made.text, made.finish_reason) == (" Austin", "stop")
    by_id = real.generate(PROMPT, stop=[made.tokens[0]])
    assert (by_id.tokens, by_id.finish_reason) == (made.tokens[:1], "stop")


def test_pieces_make_the_text(real: pc.Client) -> None:
    stream = real.stream(PROMPT, max_new_tokens=20, temperature=1.2, seed=3, ignore_eos=True)
    assert "".join(token.text for token in stream) == stream.result.text
    assert [token.index for token in real.stream(PROMPT, max_new_tokens=3, ignore_eos=True)] == [0, 1, 2]


def test_a_list_gives_what_each_prompt_gives(real: pc.Client) -> None:
    prompts = [PROMPT, PROMPT.replace("Dallas", "Oakland"), "The"]
    made = real.generate(prompts, max_new_tokens=4)
    assert [one.text for one in made] == [real.generate(prompt, max_new_tokens=4).text for prompt in prompts]


def test_refusals_name_the_arguments(real: pc.Client) -> None:
    with pytest.raises(pc.InvalidArgument) as caught:
        real.generate(PROMPT, top_p=3, stop=["a", 10**8], max_new_tokens=10**6, temperature=1000)
    fields = {violation.field for violation in caught.value.field_violations}
    assert fields == {"top_p", "stop[1]", "max_new_tokens", "temperature"}


def test_receipts_count_prompt_and_generated_tokens(real: pc.Client) -> None:
    edits = [STEER, pc.zero(["blocks.0.attn.out", "blocks.1.attn.out"], positions=pc.GENERATED)]
    made = real.generate(PROMPT, max_new_tokens=6, ignore_eos=True, interventions=edits)
    first, second = made.receipts
    assert first.rows_selected == len(made.prompt_tokens) + 5
    assert second.rows_selected == 2 * 5


@pytest.mark.parametrize("cut", [2_000, 12_000, 30_000, 50_000])
def test_a_connection_that_breaks_changes_nothing(real: pc.Client, wire: Wire, cut: int) -> None:
    options: Any = {
        "max_new_tokens": 40,
        "temperature": 1.0,
        "seed": 5,
        "ignore_eos": True,
        "read": [SITE, PATTERN],
        "interventions": STEER,
    }
    whole = real.generate(PROMPT, **options)
    with pc.connect(wire.target, timeout=60) as client:
        client.describe()
        wire.cut = cut
        stream = client.stream(PROMPT, **options)
        assert [token.index for token in stream] == list(range(40))
    assert wire.cuts == 1
    made = stream.result
    assert (made.tokens, made.text, made.seed) == (whole.tokens, whole.text, whole.seed)
    assert made.receipts[0].rows_selected == whole.receipts[0].rows_selected
    for name in (SITE, PATTERN):
        assert made[name].positions == whole[name].positions
        np.testing.assert_allclose(made[name], whole[name], rtol=1e-3, atol=1e-3)


async def test_asynchronously(target: str, real: pc.Client, wire: Wire) -> None:
    options: Any = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 5, "samples": 2}
    whole = real.generate(PROMPT, **options)
    async with pc.aio.connect(wire.target, timeout=60) as client:
        await client.describe()
        wire.cut = 3_000
        made = await client.generate(PROMPT, **options)
    assert wire.cuts == 1
    assert [sample.text for sample in made.samples] == [sample.text for sample in whole.samples]
