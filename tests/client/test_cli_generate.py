"""The command `generate`, against a stand-in server: in a pipe, in a terminal, as JSON, and when it is interrupted."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from client.stand_in import STORY, Failure, StandIn, ends, sample_end, started, story, word
from patchclamp._cli import main
from patchclamp.v1 import failure_pb2, hook_point_pb2, tensor_pb2
from patchclamp.v1 import generation_pb2 as pb

PROMPT = "Fact: the capital of Texas is"
TEXT = " capital of Texas is"
BFLOAT16 = tensor_pb2.DTYPE_BFLOAT16
EDITS = json.dumps([{"zero": {"target": {"hookPoint": {"site": "SITE_ATTN_OUT", "layer": 1}}}}])


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def command(server: StandIn, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "patchclamp", "generate", PROMPT, "--target", server.target, *arguments]


def endless(server: StandIn) -> None:
    """Generates until the caller has enough."""

    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        for index in range(2000):
            yield pb.GenerateResponse(token=word(request, 0, index))
            if server.ended.wait(0.01 if index >= 4 else 0):
                return

    server.on_generate = answer


def test_the_text_alone_in_a_pipe(server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    file.write_text(EDITS, encoding="utf-8")
    arguments = ["--max-new-tokens", "4", "--interventions", str(file)]
    assert main(["generate", PROMPT, "--target", server.target, *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{TEXT}\n"
    assert "receipts" in shown.err and "zero blocks.1.attn.out" in shown.err
    assert "seed" not in shown.err


def test_what_travels(server: StandIn) -> None:
    arguments = "--temperature 0.7 --top-k 40 --top-p 0.9 --repetition-penalty 1.2 --seed 7 --samples 2 --ignore-eos"
    more = ["--stop", "\n", "--stop", "END", "--max-new-tokens", "3", "--top-logprobs", "2", "--numerics", "solo"]
    assert main(["generate", PROMPT, "--chat", "--target", server.target, *arguments.split(), *more]) == 0
    (request,) = server.seen(pb.GenerateRequest)
    assert request.sampling == pb.Sampling(
        temperature=0.7, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=7, samples=2
    )
    assert request.stop == pb.StopRules(max_new_tokens=3, texts=["\n", "END"], ignore_eos=True)
    assert request.prompt.chat.messages[0].content == PROMPT
    assert request.top_logprobs == 2


def test_several_samples(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPT, "--target", server.target, "--samples", "2", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out == "sample 0\n capital of\nsample 1\n of Texas\n"


def test_a_sample_that_fails_is_told(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield pb.GenerateResponse(token=word(request, 0, 0))
        failure = failure_pb2.RunFailure(code=8, message="no room")
        yield pb.GenerateResponse(sample_end=pb.SampleEnd(sample_index=1, failure=failure))
        yield pb.GenerateResponse(sample_end=sample_end(request, 0))
        yield list(ends(request))[-1]

    server.on_generate = answer
    arguments = ["--samples", "2", "--max-new-tokens", "1"]
    assert main(["generate", PROMPT, "--target", server.target, *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == "sample 0\n capital\nsample 1\n"
    assert shown.err == "patchclamp: sample 1: no room\n"
    assert main(["generate", PROMPT, "--target", server.target, *arguments, "--json"]) == 1
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert samples[1]["error"] == {"code": "RESOURCE_EXHAUSTED", "reason": "", "message": "no room", "metadata": {}}


def test_json(server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    file.write_text(EDITS, encoding="utf-8")
    arguments = ["--max-new-tokens", "2", "--interventions", str(file), "--json", "--top-logprobs", "1"]
    assert main(["generate", PROMPT, "--target", server.target, *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["prompt"]["strings"][0] == "<bos>"
    assert shown["seed"] == 99
    assert shown["summary"]["fingerprint"] == "f0"
    (sample,) = shown["samples"]
    assert (sample["text"], sample["tokens"], sample["finish_reason"]) == (" capital of", STORY[:2], "length")
    assert sample["logprobs"] == [-0.5, -1.0]
    assert sample["top"][0][0]["text"] == "<bos>"
    assert sample["receipts"][0]["kind"] == "zero"


def test_json_lines(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--max-new-tokens", "2", "--json", "--stream", "--top-logprobs", "1"]
    assert main(["generate", PROMPT, "--target", server.target, *arguments]) == 0
    first, second, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["event"], first["text"], first["index"], first["logprob"]) == ("token", " capital", 0, -0.5)
    assert second["id"] == 6 and second["top"][0]["id"] == 0
    assert end["event"] == "end" and end["samples"][0]["text"] == " capital of"


def test_reads(server: StandIn, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "made.npz"
    arguments = ["generate", PROMPT, "--target", server.target, "--max-new-tokens", "2", "--save", str(file)]
    two = ["--read", "blocks.0.resid_post", "--read", "blocks.1.resid_post", "--dtype", "bfloat16"]
    assert main([*arguments, *two]) == 0
    assert capsys.readouterr().out == " capital of\n"
    (request,) = server.seen(pb.GenerateRequest)
    assert [(read.hook_point.layer, read.dtype) for read in request.reads] == [(i, BFLOAT16) for i in (0, 1)]
    with np.load(file) as saved:
        assert set(saved) == {"prompt_tokens", "tokens", "logprobs", "blocks.0.resid_post", "blocks.1.resid_post"}
        assert saved["blocks.1.resid_post"].shape == (9, 4)
        assert saved["tokens"].tolist() == STORY[:2]
    assert main([*arguments, "--read", "blocks.0.resid_post", "--samples", "2", "--json"]) == 0
    (read,) = json.loads(capsys.readouterr().out)["samples"][1]["reads"]
    assert (read["name"], read["shape"], read["positions"]) == ("blocks.0.resid_post", [9, 4], list(range(9)))
    with np.load(file) as saved:
        names = {"tokens", "logprobs", "blocks.0.resid_post"}
        assert set(saved) == {"prompt_tokens", *(f"sample{i}.{name}" for i in range(2) for name in names)}
    assert main([*arguments[:-1], str(tmp_path / "no" / "x.npz")]) == 1
    shown = capsys.readouterr()
    assert shown.out == " capital of\n" and "cannot write" in shown.err
    for wrong, words in ((["--read", "embed"], "only with --save or --json"), (["--k", "3"], "--k: only with --read")):
        with pytest.raises(SystemExit) as left:
            main(["generate", PROMPT, "--target", server.target, *wrong])
        assert left.value.code == 2
        assert words in capsys.readouterr().err


def test_usage(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["generate", PROMPT, "--target", server.target, "--stream"])
    assert left.value.code == 2
    with pytest.raises(SystemExit):
        main(["generate", "-", "--interventions", "-"])
    capsys.readouterr()
    assert main(["generate", PROMPT, "--target", server.target, "--interventions", "nowhere.json"]) == 1
    assert "cannot read nowhere.json" in capsys.readouterr().err
    assert main(["generate", PROMPT, "--target", server.target, "--top-k", "-1"]) == 1
    assert "top_k: -1 is not in" in capsys.readouterr().err


def test_a_failure_under_way(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        for number, response in enumerate(story(request)):
            if number == 3:
                raise Failure(grpc.StatusCode.INTERNAL, "broken")
            yield response

    server.on_generate = answer
    assert main(["generate", PROMPT, "--target", server.target]) == 1
    shown = capsys.readouterr()
    assert shown.out == " capital of\n"
    assert shown.err.startswith("patchclamp: broken")


def test_a_reader_that_has_seen_enough(server: StandIn) -> None:
    endless(server)
    with subprocess.Popen(
        command(server), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUTF8": "1"}
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        # What it has so far is there at once.
        assert process.stdout.read(len(TEXT)) == TEXT.encode()
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
    assert server.ended.wait(5)


@pytest.mark.parametrize("arguments", [(), ("--json",), ("--json", "--stream")])
def test_an_interruption_leaves_with_what_came(server: StandIn, arguments: tuple[str, ...]) -> None:
    endless(server)
    with subprocess.Popen(
        command(server, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert server.began.wait(20)
        if arguments == ("--json",):
            time.sleep(1)
            begun = ""
        else:
            begun = process.stdout.read(len(TEXT)) if not arguments else "".join(map(next, [process.stdout] * 4))
        process.send_signal(signal.SIGINT)
        shown = begun + process.stdout.read()
        assert process.wait(10) == 130
        assert process.stderr.read() == ""
    assert server.ended.wait(5)
    if not arguments:
        assert shown.startswith(TEXT) and shown.endswith("\n")
        return
    made = json.loads(shown.splitlines()[-1])
    assert made["samples"][0]["text"].startswith(TEXT)
    assert made["samples"][0]["finish_reason"] is None
    assert made["summary"] is None


def in_a_terminal(server: StandIn, *arguments: str, interrupt: bool = False) -> tuple[str, int]:
    """What a terminal of eighty columns shows, and the exit status."""
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm", "PYTHONUTF8": "1"}
    environment.pop("NO_COLOR", None)
    shown = b""
    with subprocess.Popen(
        command(server, *arguments), stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True
    ) as process:
        os.close(child)
        while True:
            try:
                piece = os.read(parent, 4096)
            except OSError:  # the child has closed its end
                break
            if not piece:
                break
            shown += piece
            if interrupt and TEXT.encode() in shown:
                interrupt = False
                process.send_signal(signal.SIGINT)
        status = process.wait(20)
    os.close(parent)
    return shown.decode().replace("\r\n", "\n"), status


def test_in_a_terminal(server: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    file.write_text(EDITS, encoding="utf-8")
    shown, status = in_a_terminal(server, "--max-new-tokens", "4", "--interventions", str(file))
    assert status == 0
    assert shown.startswith(f"{TEXT}\n\n\033[1mreceipts\033[0m")
    assert "zero blocks.1.attn.out" in shown
    assert shown.endswith("\033[2m4 tokens, length, seed 99\033[0m\n")


def test_an_interruption_in_a_terminal(server: StandIn) -> None:
    endless(server)
    shown, status = in_a_terminal(server, interrupt=True)
    assert status == 130
    assert shown.startswith(TEXT)
    assert "tokens, interrupted, seed 99" in shown
    assert "Traceback" not in shown
    assert server.ended.wait(5)


def test_generated_text_does_not_steer_the_terminal(server: StandIn) -> None:
    def answer(request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        for response in story(request):
            if response.WhichOneof("event") == "token":
                response.token.text = "a\033[2J\tb\n"
            yield response

    server.on_generate = answer
    shown, status = in_a_terminal(server, "--max-new-tokens", "1")
    assert status == 0
    assert shown.startswith("a\\x1b[2J")
    assert shown.splitlines()[1] == "\033[2m1 token, length, seed 99\033[0m"


def test_the_positions_of_edits_travel(server: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    edit = json.loads(EDITS)[0] | {"positions": {"span": "POSITION_SPAN_GENERATED"}}
    file.write_text(json.dumps([edit]), encoding="utf-8")
    assert main(["generate", PROMPT, "--target", server.target, "--interventions", str(file)]) == 0
    (request,) = server.seen(pb.GenerateRequest)
    assert request.interventions[0].positions.span == hook_point_pb2.POSITION_SPAN_GENERATED
