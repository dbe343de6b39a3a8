"""The command line, against a stand-in server."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import StandIn
from patchclamp._cli import main
from patchclamp._reports import arrays, numbers, show_run, show_tokens
from patchclamp._results import Activations
from patchclamp._terminal import Terminal
from patchclamp.v1 import hook_point_pb2, run_pb2

PROMPT = "Fact: the capital of Texas is"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_describe(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--target", server.target]) == 0
    shown = capsys.readouterr().out
    for text in ("stand-in", "StandInForCausalLM", "d_model", "blocks.*.resid_post  all     [pos, 4]", "read only"):
        assert text in shown
    assert "pos_embed  positions are rotary" in shown
    assert "\033" not in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_describe_as_json(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "--target", server.target, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["dims"]["d_model"] == 4
    assert shown["sites"][1]["layers"] == [0, 1]
    assert shown["name"] == "stand-in"
    assert shown["absent_sites"] == [{"name": "pos_embed", "layers": [], "reason": "positions are rotary"}]


def test_tokenize(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", PROMPT, "--target", server.target]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["pos", "id", "token", "characters"]
    assert shown[7].split() == ["6", "7", "'", "Texas'", "20:26"]
    assert main(["tokenize", PROMPT, "--target", server.target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"][0] == 0


def test_run(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--read", "blocks.*.resid_post", "--read", "blocks.0.resid_pre", "--reduce", "norm", "--loss"]
    assert main(["run", PROMPT, "--target", server.target, "--logprob", " Austin", "--logprob", "3", *arguments]) == 0
    shown = capsys.readouterr().out
    for text in ("8 tokens", "' Austin'", "0.9704", "█", "-1.5000", "1.0000 nats", "blocks.1.resid_post", "norm"):
        assert text in shown
    assert max(map(len, shown.splitlines())) <= 80
    sent = server.seen(run_pb2.RunRequest)[0].runs[0]
    assert list(sent.logits.logprob_tokens) == [9, 3]
    assert not sent.logits.values


def test_run_as_json(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--read", "resid_post", "--positions", "at:Texas", "--logits", "last", "--json"]
    assert main(["run", PROMPT, "--target", server.target, *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["top"][0]["tokens"][0]["text"] == " Austin"
    assert [read["name"] for read in shown["reads"]] == ["blocks.0.resid_post", "blocks.1.resid_post"]
    assert np.array(shown["reads"][0]["values"]).shape == (8, 4)
    assert np.array(shown["logits"]).shape == (1, 12)
    assert list(server.seen(run_pb2.RunRequest)[0].runs[0].reads[0].positions.indices.indices) == [6]


EDITS = json.dumps(
    [
        {"zero": {"target": {"hookPoint": {"site": "SITE_ATTN_OUT", "layer": 1}}}, "positions": {"span": 4}},
        {"ablateEverywhere": {"directions": {"direction": "refusal"}}},
        {"knockout": {"layer": 0, "edges": [{"query": -1, "key": 2}]}},
        {"feature": {"feature": {"layer": 1, "feature": 3}, "ablate": True}},
        {"freeze": {"sourceRun": 0, "attention": True}},
    ]
)


def test_interventions_come_from_a_file_or_standard_input(
    server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "edits.json"
    file.write_text(EDITS, encoding="utf-8")
    assert main(["run", PROMPT, "--target", server.target, "--interventions", str(file), "--baseline"]) == 0
    shown = capsys.readouterr().out
    assert "next token after" in shown and "next token without interventions after" in shown
    lines = shown.splitlines()
    start = lines.index("receipts rows, and norm(change) / norm(row)")
    assert lines[start + 1].split() == ["selected", "fired", "changed", "mean", "max", "clipped", "intervention"]
    assert lines[start + 2].split() == ["8", "8", "7", "0.25", "0.5", "1", "zero", "blocks.1.attn.out"]
    for what in ("every write", "blocks.0.attn.scores", "blocks.1.features[3]", "freeze run 0"):
        assert what in shown
    assert max(map(len, lines)) <= 80
    monkeypatch.setattr("sys.stdin", io.StringIO(EDITS))
    assert main(["run", PROMPT, "--target", server.target, "--interventions", "-"]) == 0
    first, second = (request.runs[0] for request in server.seen(run_pb2.RunRequest))
    assert first.baseline and not second.baseline
    assert list(first.interventions) == list(second.interventions)
    assert first.interventions[0].positions.span == hook_point_pb2.POSITION_SPAN_LAST


def test_receipts_baseline_and_handles_as_json(
    server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "edits.json"
    file.write_text(EDITS, encoding="utf-8")
    arguments = ["--interventions", str(file), "--baseline", "--keep", "blocks.1.resid_post", "--logprob", "3"]
    saved = tmp_path / "run.npz"
    assert main(["run", PROMPT, "--target", server.target, *arguments, "--json", "--save", str(saved)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["receipts"][0] == {
        "index": 0,
        "kind": "zero",
        "where": "blocks.1.attn.out",
        "rows_selected": 8,
        "rows_fired": 8,
        "rows_changed": 7,
        "mean_delta": 0.25,
        "max_delta": 0.5,
        "clipped": 1,
        "no_effect": False,
        "profile": "",
    }
    assert [found["kind"] for found in shown["receipts"]][1:] == ["ablate_everywhere", "knockout", "feature", "freeze"]
    assert shown["top"][0]["tokens"][0]["text"] == " Austin"
    assert shown["baseline"]["top"][0]["tokens"][0]["text"] == " Dallas"
    assert shown["baseline"]["logprobs"] == {"tokens": [3], "values": [[-1.5]]}
    (handle,) = shown["handles"]
    assert (handle["name"], handle["shape"]) == ("replicas/r0/handles/k0l1", [8, 4])
    assert handle["expire_time"] == "2023-11-14T23:13:20+00:00"
    with np.load(saved) as arrays_saved:
        assert arrays_saved["baseline.logprobs"].tolist() == [[-1.5]]


def test_handles_are_named(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", PROMPT, "--target", server.target, "--keep", "resid_post"]) == 0
    shown = capsys.readouterr().out.splitlines()
    start = shown.index("kept on the server")
    assert shown[start + 1 : start + 3] == ["  blocks.0.resid_post  bfloat16 [8, 4]", "    replicas/r0/handles/k0l0"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[\n  {,}\n]", ["interventions: line 2, column 4"]),
        ("{}", ["interventions: a list is needed"]),
        ("[" * 100_000, ["interventions: "]),
        ("[3]", ["interventions[0]: an object is needed, not 3"]),
        ("[{}]", ["interventions[0]: says nothing to do; one of add, ablate, ablateEverywhere"]),
        ('[{"zero": {}}, {"ad": {}}]', ["interventions[1]: ", "'ad'", '"ad"']),
        ('[{"zero": {"target": {"hookPoint": {"site": "SITE_X"}}}}]', ["interventions[0]: ", "site", "SITE_X"]),
        ('[{"zero": {}, "mean": {}}]', ["interventions[0]: ", "op"]),
        ('[{"knockout": {"layer": -1}}]', ["interventions[0]: ", "layer"]),
        ('[{"add": {"strength": "x"}}, {}]', ["2 faults", "interventions[0]: ", "interventions[1]: says nothing"]),
    ],
)
def test_interventions_that_are_none_say_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "edits.json"
    file.write_text(text, encoding="utf-8")
    assert main(["run", PROMPT, "--interventions", str(file)]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert words[0] in shown
    # protobuf's own words differ between its versions.
    assert len(words) == 1 or any(word in shown for word in words[1:])


def test_interventions_that_cannot_be_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff")
    for file in (tmp_path / "missing", tmp_path / "bytes", tmp_path):
        assert main(["run", PROMPT, "--interventions", str(file)]) == 1
        assert capsys.readouterr().err.startswith(f"patchclamp: cannot read {file}: ")


def test_receipts_of_profiles_and_without_effect_are_told() -> None:
    terminal = Terminal(io.StringIO(), width=80, colour=False, blocks=True)
    told = {"rows_selected": 1, "rows_fired": 1, "rows_changed": 0, "mean_delta": 0.0, "max_delta": 0.0, "clipped": 0}
    receipts = (
        pc.Receipt(None, 0, **told, no_effect=False, profile="kind@2"),  # type: ignore[arg-type]
        pc.Receipt(pc.zero("embed"), 0, **told, no_effect=True),  # type: ignore[arg-type]
    )
    show_run(a_run(receipts=receipts), [], terminal)
    shown = terminal.stream.getvalue()  # type: ignore[attr-defined]
    assert " kind@2\n" in shown and " zero embed (no effect)\n" in shown


def test_json_has_no_numbers_that_are_none() -> None:
    values = numbers(np.array([[1.5, -np.inf], [np.inf, np.nan]], np.float32))
    assert values == [[1.5, "-Infinity"], ["Infinity", "NaN"]]
    json.dumps(values, allow_nan=False)


def test_save(server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.npz"
    assert main(["run", PROMPT, "--target", server.target, "--read", "resid_post", "--save", str(file)]) == 0
    with np.load(file) as saved:
        assert set(saved) == {"tokens", "blocks.0.resid_post", "blocks.1.resid_post"}
        assert saved["blocks.1.resid_post"].shape == (8, 4)
    assert main(["run", PROMPT, "--target", server.target, "--save", str(tmp_path / "no" / "x.npz")]) == 1
    assert "cannot write" in capsys.readouterr().err


def a_run(**changes: Any) -> pc.Run:
    values: dict[str, Any] = {
        "tokens": pc.Tokens((11,), ("",), ((0, 0),)),
        "reads": Activations([]),
        "logits": None,
        "logit_positions": (0,),
        "top_rows": ((pc.TopToken("", 0.9, 9, -0.1, 8.0), pc.TopToken("", 0.0, 3, -99.0, 1.0)),),
        "logprobs": None,
        "loss": None,
        "receipts": (),
        "summary": pc.RunSummary(1, 0.0, 0.1, "f"),
    }
    return pc.Run(**values | changes)


def test_tokens_without_text_show_their_ids() -> None:
    terminal = Terminal(io.StringIO(), width=80, colour=True, blocks=True)
    run = a_run(logprobs=np.array([[-1e-9]], np.float32))
    show_run(run, [9], terminal)
    show_tokens(run.tokens, terminal)
    shown = terminal.stream.getvalue()  # type: ignore[attr-defined]
    for text in ("1 token\033", "  #11\n", "after #11, position 0", "  #9  0.9000  █", "  0  11  #11    0:0"):
        assert text in shown
    assert "1 tokens" not in shown and "-0.0000" not in shown
    assert [line for line in shown.splitlines() if line != line.rstrip()] == []


def test_an_empty_bar_has_no_colour() -> None:
    terminal = Terminal(io.StringIO(), width=80, colour=True, blocks=True)
    assert terminal.green(terminal.bar(0, 40)) == ""


def test_saving_one_place_read_in_several_ways() -> None:
    def read(name: str, value: float) -> pc.Activation:
        return pc.Activation.of(np.full(1, value, np.float32), name, indices=np.full(1, value, np.int32))

    logits = pc.Activation.of(np.zeros((1, 2), np.float32), "logits")
    reads = Activations([read("embed", 1), read("blocks.0.attn.z", 2), read("embed", 3), read("logits", 4)])
    saved = arrays(a_run(reads=reads, logits=logits))
    assert {name: float(values[0]) for name, values in saved.items() if name not in ("tokens", "logits")} == {
        "embed.0": 1,
        "embed.0.indices": 1,
        "blocks.0.attn.z": 2,
        "blocks.0.attn.z.indices": 2,
        "embed.1": 3,
        "embed.1.indices": 3,
        "logits.read": 4,
        "logits.read.indices": 4,
    }
    assert saved["logits"].shape == (1, 2)


@pytest.mark.parametrize(
    ("arguments", "content"),
    [([PROMPT], "text"), (["0,2", "--ids"], "token_ids"), (["Fact", "--chat"], "chat")],
)
def test_forms_of_a_prompt(
    server: StandIn, capsys: pytest.CaptureFixture[str], arguments: list[str], content: str
) -> None:
    assert main(["run", *arguments, "--target", server.target]) == 0
    assert server.seen(run_pb2.RunRequest)[0].runs[0].prompt.WhichOneof("content") == content


def test_the_variables_stand_in_for_options(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATCHCLAMP_TARGET", server.target)
    monkeypatch.setenv("PATCHCLAMP_TOKEN", "abc")
    assert main(["describe"]) == 0
    assert server.metadata[0]["authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", PROMPT, "--read", "blocks.0.resid_pots"], "did you mean 'blocks.0.resid_post'"),
        (["run", PROMPT, "--read", "embed", "--reduce", "norm", "--k", "3"], "k: belongs to"),
        (["run", "1,x", "--ids"], "not a list of token ids"),
        (["describe", "--target", "nowhere"], "names no port"),
        (["describe", "--target", "127.0.0.1:1", "--timeout", "5"], "no server answers at 127.0.0.1:1"),
    ],
)
def test_failures_are_a_line_and_a_one(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("patchclamp: ")
    assert words in shown.err
    assert "Traceback" not in shown.err
    assert len(shown.err.splitlines()) <= 4


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["run", "x", "--reduce", "max"],
        ["run", "x", "--positions", "a"],
        ["run", "x", "--heads", "a"],
        ["run", "x", "--timeout", "soon"],
        ["run", "x", "--ids", "--chat"],
        ["run", "x", "--positions", "last"],
        ["run", "x", "--heads", "0"],
        ["run", "x", "--reduce", "norm"],
        ["run", "x", "--k", "0"],
        ["run", "x", "--onto", "3"],
        ["run", "x", "--dtype", "float32"],
        ["run", "-", "--interventions", "-"],
        ["describe", "x"],
    ],
)
def test_wrong_usage_is_a_two(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: patchclamp" in capsys.readouterr().err


def test_options_of_reads_alone_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "x", "--reduce", "topk", "--k", "3"])
    assert "--reduce, --k: only with --read" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["describe"], ["tokenize"], ["run"], ["generate"], ["demo"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: patchclamp" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("patchclamp 0.")
