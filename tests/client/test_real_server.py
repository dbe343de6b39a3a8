"""The SDK against the real server with the bundled model: one process for the whole session."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from patchclamp import _tour
from patchclamp._cli import main
from patchclamp._config import Config
from patchclamp._demo_server import demo_server
from patchclamp._hookpoints import parse

PROMPT = "Fact: the capital of the state containing Dallas is"

pytestmark = pytest.mark.slow


def assert_close(found: Any, expected: Any) -> None:
    """Equal but for rounding, which depends on the shapes of the batch that a run shares with others."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="session")
def target() -> Iterator[str]:
    with demo_server(lambda waited, news: None) as address:
        yield address


@pytest.fixture(scope="session")
def real(target: str) -> Iterator[pc.Client]:
    with pc.Client(Config(target=target, timeout=60)) as client:
        yield client


@pytest.fixture(scope="session")
def info(real: pc.Client) -> pc.ModelInfo:
    return real.describe()


@pytest.fixture(scope="session")
def text_of_200_tokens(real: pc.Client) -> str:
    text = " ".join([PROMPT] * 20)
    tokens = real.tokenize(text)
    return text[: tokens.offsets[199][1]]


def test_describe(info: pc.ModelInfo) -> None:
    assert info.dims.n_layers > 0
    assert info.dims.n_heads * info.dims.d_head > 0
    assert info.sites["resid_post"].layers == tuple(range(info.dims.n_layers))
    assert not {site.name for site in info.absent_sites if not site.layers} & set(info.sites)
    assert all(site.reason for site in info.absent_sites)
    assert info.capabilities["runs"]
    assert info.server_version == pc.__version__


def test_every_name_is_known_to_the_sdk(info: pc.ModelInfo) -> None:
    for site in info.sites.values():
        assert parse(site.name).site == site.name
        assert bool(site.layers) == (str(parse(site.name)) != site.name)


def test_tokens(real: pc.Client) -> None:
    tokens = real.tokenize(PROMPT)
    assert tokens.text == PROMPT
    for text, (start, end) in zip(tokens.strings, tokens.offsets, strict=True):
        if end > start:
            assert PROMPT[start:end].strip() == text.strip()
    assert real.tokenize(tokens.ids).ids == tokens.ids
    assert real.run(PROMPT).tokens.ids == tokens.ids
    chat = real.tokenize([{"role": "user", "content": "Hello there"}])
    assert "Hello there" in chat.text


def test_a_prediction(real: pc.Client) -> None:
    run = real.run(PROMPT, loss=True)
    logits = run.logits
    assert logits is not None
    probabilities = np.exp(logits[-1] - logits[-1].max())
    probabilities /= probabilities.sum()
    assert [top.id for top in run.top] == np.argsort(-logits[-1])[:5].tolist()
    for top in run.top:
        assert top.probability == pytest.approx(float(probabilities[top.id]), abs=1e-4)
        assert top.logit == pytest.approx(float(logits[-1, top.id]), abs=1e-4)
    assert run.top[0].text.strip() == "Austin"
    assert run.loss is not None and run.loss.shape == (len(run.tokens) - 1,)


def test_logits_are_the_models_own(real: pc.Client) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    demo = pytest.importorskip("patchclamp_server.demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.model_dir()).eval()
    run = real.run(PROMPT, logits="all", numerics="solo")
    with torch.no_grad():
        expected = model(torch.tensor([run.tokens.ids])).logits[0].float().numpy()
    assert run.logits is not None and run.logits.positions == tuple(range(len(run.tokens)))
    assert_close(run.logits, expected)


def test_every_site_can_be_read_in_its_shape(real: pc.Client, info: pc.ModelInfo) -> None:
    run = real.run(PROMPT, read=list(info.sites))
    length = len(run.tokens)
    for site in info.sites.values():
        for name in site.hook_points():
            assert run[name].shape == tuple(axis.size or length for axis in site.axes), name
            assert run[name].positions == tuple(range(length))
    patterns = run.reads.stack("attn.pattern")
    assert_close(patterns.sum(-1), 1)
    assert_close(
        run["blocks.0.resid_post"], run["blocks.0.resid_pre"] + run["blocks.0.attn.out"] + run["blocks.0.mlp.out"]
    )


def test_transformer_lens_names(real: pc.Client) -> None:
    run = real.run(PROMPT, read=["blocks.*.hook_resid_post", "blocks.0.attn.hook_z", "ln_final.hook_out"])
    assert run["blocks.0.attn.hook_z"] is run["blocks.0.attn.z"]
    assert run["ln_final.hook_out"] is run["ln_final"]


def test_reductions_are_those_of_numpy(real: pc.Client, info: pc.ModelInfo) -> None:
    site, vectors = "blocks.1.resid_post", np.random.default_rng(0).standard_normal((3, info.dims.d_model))
    k = 4
    run = real.run(
        PROMPT,
        read=[
            site,
            pc.read(site, reduce="last"),
            pc.read(site, reduce="mean"),
            pc.read(site, reduce="norm"),
            pc.read(site, reduce="moments"),
            pc.read(site, reduce="topk", k=k),
            pc.read(site, reduce="topk", k=k, by_magnitude=True),
            pc.read(site, reduce="project", onto=vectors),
        ],
    )
    rows, last, mean, norm, moments, top, largest, projected = run.reads.in_order
    assert last.positions == mean.positions == moments.positions == ()
    assert norm.positions == top.positions == rows.positions == tuple(range(len(run.tokens)))
    assert_close(last, rows[-1])
    assert_close(mean, rows.mean(0))
    assert_close(norm, np.linalg.norm(rows, axis=-1))
    assert_close(moments, [rows.mean(0), rows.var(0)])
    assert_close(projected, rows @ vectors.T.astype(np.float32))
    assert top.indices is not None and largest.indices is not None
    np.testing.assert_array_equal(top.indices, np.argsort(-np.asarray(rows), axis=-1)[:, :k])
    np.testing.assert_array_equal(largest.indices, np.argsort(-np.abs(np.asarray(rows)), axis=-1)[:, :k])
    assert_close(largest, np.take_along_axis(np.asarray(rows), largest.indices, -1))


def test_the_last_layers_lens_is_the_prediction(real: pc.Client, info: pc.ModelInfo) -> None:
    site = f"blocks.{info.dims.n_layers - 1}.resid_post"
    run = real.run(PROMPT, read=pc.read(site, positions=pc.LAST, reduce="logit_lens", k=5))
    assert run[site].indices is not None
    assert run[site].indices.tolist() == [[top.id for top in run.top]]  # type: ignore[union-attr]
    assert_close(run[site][0], [top.logprob for top in run.top])


def test_projecting_onto_an_unembedding_row_gives_the_logit(real: pc.Client) -> None:
    best = real.run(PROMPT).top[0]
    read = pc.read("ln_final", positions=pc.LAST, reduce="project", onto=[pc.unembed(best.text), pc.unembed(best.id)])
    run = real.run(PROMPT, read=read, logprobs=[best.text, best.id])
    assert_close(run["ln_final"][0], [best.logit] * 2)
    assert run.logprobs is not None
    assert_close(run.logprobs[0], [best.logprob] * 2)


@pytest.mark.parametrize(
    ("positions", "rows"),
    [
        (3, [3]),
        (-1, [-1]),
        ([4, 1], [4, 1]),
        (slice(2, 5), [2, 3, 4]),
        (pc.LAST, [-1]),
        (pc.at("Dallas"), [9]),
        (pc.at("the", occurrence=1), [6]),
        (pc.at("state containing"), [7, 8]),
    ],
)
def test_positions(real: pc.Client, positions: Any, rows: list[int]) -> None:
    run = real.run(PROMPT, read=["embed", pc.read("embed", positions=positions)], logits=positions)
    whole, chosen = run.reads.in_order
    assert_close(chosen, np.asarray(whole)[rows])
    assert chosen.positions == run.logit_positions == tuple(row % len(run.tokens) for row in rows)
    assert [run.tokens.strings[row].strip() for row in chosen.positions] == [
        run.tokens.strings[row].strip() for row in rows
    ]


def test_heads(real: pc.Client) -> None:
    run = real.run(PROMPT, read=["blocks.0.attn.z", pc.read("blocks.0.attn.z", heads=[2, 0])])
    whole, chosen = run.reads.in_order
    assert_close(chosen, whole[:, [2, 0]])


def test_large_tensors_arrive_in_chunks(real: pc.Client, info: pc.ModelInfo, text_of_200_tokens: str) -> None:
    run = real.run(text_of_200_tokens, read="attn.result", logits="all", top_k=0)
    assert run["blocks.0.attn.result"].nbytes + run.logits.nbytes > info.limits.inline_bytes  # type: ignore[union-attr]
    halves = [
        real.run(text_of_200_tokens, read=pc.read("attn.result", positions=half), logits=half, top_k=0)
        for half in (slice(0, 100), slice(100, None))
    ]
    for name in run:
        assert_close(run[name], np.concatenate([half[name] for half in halves]))
    logits = [np.asarray(half.logits) for half in halves]
    assert_close(np.asarray(run.logits), np.concatenate(logits))


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-10)])
def test_narrow_floats_on_the_wire(real: pc.Client, dtype: Any, error: float) -> None:
    run = real.run(PROMPT, read=["embed", pc.read("embed", dtype=dtype)])
    exact, rounded = run.reads.in_order
    assert rounded.dtype == np.float32
    np.testing.assert_allclose(rounded, exact, rtol=error, atol=1e-6)


def test_a_batch_gives_what_runs_alone_give(real: pc.Client) -> None:
    prompts = [PROMPT, "Fact: the capital of the state containing Miami is", "Fact: Dallas is"]
    specs = [
        pc.RunSpec(prompts[0], read="resid_post"),
        pc.RunSpec(prompts[1], logits="all", loss=True),
        pc.RunSpec(real.tokenize(prompts[2]).ids, read=pc.read("attn.pattern", heads=1), logits=None, top_k=1),
    ]
    together = real.run_many(specs)
    alone = [real.run_many([spec], numerics="solo")[0] for spec in specs]
    for one, other in zip(together, alone, strict=True):
        assert one.tokens.ids == other.tokens.ids
        assert [top.id for top in one.top][:1] == [top.id for top in other.top][:1]
        assert list(one) == list(other)
        for name in one:
            assert_close(one[name], other[name])
    assert_close(np.asarray(together[1].logits), np.asarray(alone[1].logits))
    assert_close(np.asarray(together[1].loss), np.asarray(alone[1].loss))


async def test_asynchronously(real: pc.Client, target: str) -> None:
    async with pc.aio.connect(target, timeout=60) as client:
        runs = await asyncio.gather(*(client.run(PROMPT, read="embed", numerics="solo") for _ in range(4)))
        assert repr(await client.describe()) == repr(real.describe())
    expected = real.run(PROMPT, read="embed", numerics="solo")
    for run in runs:
        assert_close(run["embed"], expected["embed"])
        assert run.top[0].id == expected.top[0].id


def test_an_absent_site_lists_those_that_are_there(real: pc.Client, info: pc.ModelInfo) -> None:
    absent = next(site.name for site in info.absent_sites if not site.layers)
    with pytest.raises(pc.InvalidArgument) as caught:
        real.run(PROMPT, read=absent)
    assert caught.value.reason == "SITE_ABSENT"
    assert caught.value.request_id
    assert set(caught.value.metadata["available"].split(", ")) == set(info.sites)
    assert "resid_post" in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(real: pc.Client) -> None:
    with pytest.raises(pc.InvalidArgument) as caught:
        real.run(PROMPT, read=["blocks.99.resid_post", pc.read("attn.z", heads=[77]), pc.read("embed", positions=500)])
    assert [violation.field.split(".")[1] for violation in caught.value.field_violations] == [
        "reads[0]",
        "reads[1]",
        "reads[2]",
    ]


def test_too_much(real: pc.Client, info: pc.ModelInfo) -> None:
    with pytest.raises(pc.InvalidArgument) as long:
        real.run([1] * (info.dims.n_ctx + 1))
    assert long.value.reason == "PROMPT_TOO_LONG"
    with pytest.raises(pc.TooLarge) as many:
        real.run(["Fact"] * (info.limits.max_runs + 1))
    assert (many.value.limit, many.value.demand) == (info.limits.max_runs, info.limits.max_runs + 1)
    with pytest.raises(pc.InvalidArgument):
        real.run([info.dims.d_vocab])


def test_what_is_not_served(real: pc.Client, info: pc.ModelInfo) -> None:
    assert not info.capabilities["numerics.deterministic"]
    with pytest.raises(pc.Unimplemented) as caught:
        real.run(PROMPT, numerics="deterministic")
    assert caught.value.metadata["arm"] == "numerics.deterministic"


def test_a_timeout_that_cannot_be_met(real: pc.Client, text_of_200_tokens: str) -> None:
    with pytest.raises(pc.DeadlineExceeded):
        real.run([text_of_200_tokens] * 100, read="attn.result", timeout=0.01)
    assert real.run(PROMPT).top


def test_the_command_line(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "--read", "blocks.*.resid_post", "--reduce", "norm", "--target", target]) == 0
    shown = capsys.readouterr().out
    assert "' Austin'" in shown
    assert "blocks.0.resid_post" in shown
    assert main(["describe", "--target", target]) == 0
    assert main(["tokenize", "Fact: Dallas", "--target", target]) == 0
    assert main(["run", "x", "--read", "pos_embed", "--target", target]) == 1


def test_what_the_tour_shows_runs(target: str) -> None:
    """The lines that the tour prints are executed in its order, so that they cannot be wrong."""
    space: dict[str, Any] = {}
    for code in (_tour.CODE_DESCRIBE, _tour.CODE_PREDICT, _tour.CODE_READ, _tour.CODE_ATTENTION, _tour.CODE_LENS):
        exec(code.replace("{target}", target), space)  # noqa: S102 (constants of this repository)
    with pytest.raises(pc.InvalidArgument):
        exec(_tour.CODE_ERROR.format(site="pos_embed"), space)  # noqa: S102
    space["client"].close()
    with redirect_stdout(StringIO()) as shown:
        exec(_tour.CODE_NEXT.replace("localhost:50051", target), space)  # noqa: S102
    assert "Austin" in shown.getvalue()


def children(process_id: int) -> list[int]:
    """Processes that a process started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process_id)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def awaited_children(process_id: int) -> list[int]:
    """The same, once there are any."""
    for _ in range(100):
        if found := children(process_id):
            return found
        time.sleep(0.05)
    return []


def gone(process_id: int) -> bool:
    """Whether a process ended, within some seconds."""
    for _ in range(200):
        try:
            os.kill(process_id, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def start_tour(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "patchclamp", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "PATCHCLAMP_TARGET": "nowhere:1"},
    )


@pytest.mark.parametrize("arguments", [[], ["--short"]])
def test_the_tour(arguments: list[str]) -> None:
    process = start_tour(*arguments)
    assert process.stdout is not None
    first = process.stdout.readline()
    servers = awaited_children(process.pid)
    shown, complaints = process.communicate(timeout=120)
    shown = first + shown
    assert (process.returncode, complaints) == (0, "")
    assert "' Austin'" in shown
    assert "logit lens" in shown
    assert "-0.00" not in shown
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []
    percentages = re.findall(r"(\S+)%", shown)
    assert percentages
    assert [number for number in percentages if not re.fullmatch(r"\d+\.\d", number)] == []
    assert ("SITE_ABSENT" in shown or "InvalidArgument" in shown) == (not arguments)
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert servers
    assert all(map(gone, servers))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tour_that_is_broken_off_leaves_no_server(number: signal.Signals) -> None:
    process = start_tour()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("patchclamp-server is ready"):
                break
        servers = children(process.pid)
        assert servers
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + number
    assert all(map(gone, servers))
