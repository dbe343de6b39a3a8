"""The guided tour: starts a server with the bundled model and looks inside it, step by step, over real gRPC.

Every step prints the lines that made it. All that the tour says about the model it read from the server.
"""

from __future__ import annotations

import sys
import textwrap
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

import patchclamp as pc
from patchclamp._config import Config
from patchclamp._demo_server import DemoServerError, demo_server
from patchclamp._terminal import Terminal

PROMPT = "Fact: the capital of the state containing Dallas is"
SUBJECT = "Dallas"
# A city of another state, and what the model should say of it.
OTHER_SUBJECT, OTHER_ANSWER = "Oakland", " Sacramento"

CODE_DESCRIBE = """\
import numpy as np, patchclamp as pc
client = pc.connect("{target}")
info = client.describe()"""
CODE_PREDICT = f"""\
prompt = "{PROMPT}"
run = client.run(prompt)
run.top"""
CODE_READ = """\
run = client.run(prompt, read="blocks.*.resid_post")
run["blocks.0.resid_post"].shape
np.linalg.norm(run["blocks.0.resid_post"][-1])"""
CODE_ATTENTION = f"""\
run = client.run(prompt, read=[
    pc.read("blocks.*.attn.pattern", positions=pc.LAST),
    pc.read("embed", positions=pc.at("{SUBJECT}")),  # says where it is
])
pattern = run.reads.stack("attn.pattern")[:, :, 0]      # layer, head, key
weight = pattern[:, :, run["embed"].positions].sum(-1)  # layer, head
layer, head = np.unravel_index(weight.argmax(), weight.shape)
pattern[layer, head]"""
CODE_LENS = """\
lens = pc.read("blocks.*.resid_post", positions=pc.LAST,
               reduce="logit_lens", k=info.dims.d_vocab)
run = client.run(prompt, read=lens)
run["blocks.0.resid_post"]          # log-probabilities, best first
run["blocks.0.resid_post"].indices  # their token ids"""
CODE_STEER = f"""\
steer = pc.add("blocks.{{layer}}.resid_post", pc.unembed("{OTHER_ANSWER}"),
               unit="norm_fraction", positions=pc.LAST)
run = client.run(prompt, interventions=steer, baseline=True)
run.baseline.top[0], run.top[0]
run.receipts[0]"""
CODE_PATCH = f"""\
other = prompt.replace("{SUBJECT}", "{OTHER_SUBJECT}")
runs = client.run_many([pc.RunSpec(other)] + [
    pc.RunSpec(prompt, interventions=pc.patch(
        f"blocks.{{layer}}.resid_pre", source=0,
        positions=pc.at("{SUBJECT}"), source_positions=pc.at("{OTHER_SUBJECT}")))
    for layer in range(info.dims.n_layers)])
[run.top[0] for run in runs]"""
CODE_ERROR = """\
client.run(prompt, read="{site}")"""
CODE_NEXT = f"""\
import patchclamp as pc

with pc.connect("localhost:50051") as client:
    prompt = "{PROMPT}"
    run = client.run(prompt, read="blocks.*.resid_post")
    print(run.top[0])
    print(run["blocks.0.resid_post"].shape)"""


def tour(terminal: Terminal, *, short: bool = False) -> int:
    """Starts the server, takes the tour, ends the server. Returns the exit code."""
    terminal.paragraph(
        "patchclamp keeps a language model on a server and lets you look inside it from elsewhere. "
        "This tour starts such a server on this machine, with the small model that comes along."
    )
    terminal.say()
    waiting = _Waiting(terminal)
    try:
        # The server goes first: whatever the client does, none is left behind.
        with ExitStack() as afterwards, demo_server(waiting.show) as target:
            waiting.done(target)
            client = afterwards.enter_context(pc.Client(Config(target=target)))
            _Tour(terminal, client, target).take(short=short)
    except DemoServerError as fault:
        waiting.clear()
        print(f"patchclamp: {fault}", file=sys.stderr)
        return 1
    return 0


class _Waiting:
    """The line that says that the server is starting; on a terminal it is alive."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._alive = terminal.stream.isatty()
        self._waited = 0.0
        if not self._alive:
            terminal.say("starting patchclamp-server --demo ..")

    def show(self, waited: float, news: str) -> None:
        self._waited = waited
        if self._alive:
            line = f"starting patchclamp-server --demo .. {waited:3.0f} s  {news.rpartition('loading: ')[2]}"
            print(f"\r\033[K{line[: self._terminal.width - 1]}", end="", file=self._terminal.stream, flush=True)

    def clear(self) -> None:
        if self._alive:
            print("\r\033[K", end="", file=self._terminal.stream, flush=True)

    def done(self, target: str) -> None:
        self.clear()
        self._terminal.say(f"patchclamp-server is ready on {target} after {self._waited:.0f} s")


@dataclass
class _Tour:
    """One walk along the steps."""

    terminal: Terminal
    client: pc.Client
    target: str
    _steps: int = 0

    def take(self, *, short: bool) -> None:
        info = self.what_is_loaded()
        answer = self.what_comes_next()
        if not short:
            self.inside()
            self.attention()
        self.lens(info, answer)
        if not short:
            self.steer(info)
            self.patch(info)
            self.mistake(info)
        self.what_now(info)

    def what_is_loaded(self) -> pc.ModelInfo:
        self._step("What is loaded", CODE_DESCRIBE.format(target=self.target))
        info = self.client.describe()
        dims = info.dims
        self.terminal.table(
            [
                ["model", f"{info.name}: {info.architecture}, {info.parameters / 1e6:.1f} million parameters"],
                ["where", f"{', '.join(info.devices)}, {info.dtype}"],
                ["size", f"{dims.n_layers} layers of {dims.n_heads} heads, {dims.d_model} wide"],
                ["vocabulary", f"{dims.d_vocab:,} tokens"],
                ["hook points", f"{len(info.sites)} kinds: {', '.join(list(info.sites)[:6])}, .."],
            ]
        )
        return info

    def what_comes_next(self) -> pc.TopToken:
        self._step("What comes next", CODE_PREDICT)
        run = self.client.run(PROMPT)
        for top in run.top:
            self._bar(top.text, top.probability)
        self.terminal.say()
        self.terminal.paragraph(
            f"After {PROMPT!r} the model expects {_word(run.top[0].text)}, with a probability of "
            f"{run.top[0].probability:.1%}. The next steps look at how it got there."
        )
        return run.top[0]

    def inside(self) -> None:
        self._step("Inside: the residual stream", CODE_READ)
        run = self.client.run(PROMPT, read="blocks.*.resid_post")
        norms = {name: float(np.linalg.norm(run[name][-1])) for name in run.reads}
        largest = max(norms.values())
        rows = [
            [name, str(list(run[name].shape)), f"{norm:.1f}", self.terminal.bar(norm / largest, 30)]
            for name, norm in norms.items()
        ]
        self.terminal.table(rows, ["hook point", "shape", "norm", "at the last token"], right=[2])
        self.terminal.say()
        self.terminal.paragraph(
            f"Each layer leaves one vector per token: {len(run.tokens)} tokens, "
            f"{run['blocks.0.resid_post'].shape[-1]} numbers each, as numpy arrays (.torch() gives tensors)."
        )

    def attention(self) -> None:
        self._step(f"Inside: who looks at {SUBJECT!r}?", CODE_ATTENTION)
        pattern = pc.read("blocks.*.attn.pattern", positions=pc.LAST)
        run = self.client.run(PROMPT, read=[pattern, pc.read("embed", positions=pc.at(SUBJECT))])
        patterns = run.reads.stack("attn.pattern")[:, :, 0]
        weights = patterns[:, :, run["embed"].positions].sum(-1)
        layer, head = (int(index) for index in np.unravel_index(weights.argmax(), weights.shape))
        self.terminal.paragraph(
            f"Of all {weights.size} heads, head {head} of layer {layer} looks most from the last token, "
            f"{_word(run.tokens.strings[-1])}, at {SUBJECT!r}. How it spreads its attention:"
        )
        self.terminal.say()
        for text, weight in zip(run.tokens.strings, patterns[layer, head], strict=True):
            self._bar(text, float(weight))

    def lens(self, info: pc.ModelInfo, answer: pc.TopToken) -> None:
        self._step("What each layer would say", CODE_LENS)
        read = pc.read("blocks.*.resid_post", positions=pc.LAST, reduce="logit_lens", k=info.dims.d_vocab)
        run = self.client.run(PROMPT, read=read)
        favourites = self.client.tokenize([int(_ids(run[name])[0]) for name in run.reads]).strings
        rows = []
        for name, favourite in zip(run.reads, favourites, strict=True):
            logprobs = np.asarray(run[name])[0]
            of_answer = float(logprobs[_ids(run[name]) == answer.id][0])
            rows.append([name, repr(favourite), f"{np.exp(logprobs[0]):.1%}", f"{of_answer:z.2f}"])
        header = ["if the model ended at", "it would say", "with", f"log-prob of {answer.text!r}"]
        self.terminal.table(rows, header, right=[2, 3])
        self.terminal.say()
        self.terminal.paragraph(
            "This is the logit lens: the final norm and the unembedding, applied after each layer. "
            f"{_when(list(favourites), answer.text)} The server computes it beside the model; with a small k, only a "
            "few numbers travel."
        )

    def steer(self, info: pc.ModelInfo) -> None:
        layer = info.dims.n_layers // 2
        self._step("Changing it: steering", CODE_STEER.format(layer=layer))
        direction = pc.unembed(OTHER_ANSWER)
        edit = pc.add(f"blocks.{layer}.resid_post", direction, unit="norm_fraction", positions=pc.LAST)
        run = self.client.run(PROMPT, interventions=edit, baseline=True)
        assert run.baseline is not None
        rows = [["without the edit", *_top(run.baseline.top[0])], ["with it", *_top(run.top[0])]]
        self.terminal.table(rows, ["", "it says", "with"], right=[2])
        self.terminal.say()
        (receipt,) = run.receipts
        self.terminal.paragraph(
            f"The edit adds to one token's row the direction that raises {_word(OTHER_ANSWER)}, as long as the row "
            f"itself. Both runs shared one batch. Every edit gives a receipt: {receipt.rows_selected} row selected, "
            f"{receipt.rows_changed} changed, by {receipt.mean_delta:.1%} of its norm. An edit that would touch "
            "nothing is an error, never silence."
        )

    def patch(self, info: pc.ModelInfo) -> None:
        self._step("Changing it: patching from another run", CODE_PATCH)
        layers = range(info.dims.n_layers)
        here, there = pc.at(SUBJECT), pc.at(OTHER_SUBJECT)
        patches = [
            pc.patch(f"blocks.{layer}.resid_pre", source=0, positions=here, source_positions=there) for layer in layers
        ]
        specs = [pc.RunSpec(PROMPT.replace(SUBJECT, OTHER_SUBJECT))]
        source, *patched = self.client.run_many(specs + [pc.RunSpec(PROMPT, interventions=one) for one in patches])
        rows = [
            [f"before block {layer}", *_top(run.top[0]), f"{run.receipts[0].rows_changed}"]
            for layer, run in zip(layers, patched, strict=True)
        ]
        self.terminal.table(rows, [f"{SUBJECT}'s row patched", "it says", "with", "rows changed"], right=[2, 3])
        self.terminal.say()
        moved = [layer for layer in layers if patched[layer].top[0].id == source.top[0].id]
        self.terminal.paragraph(
            f"Each run has {OTHER_SUBJECT}'s row in place of {SUBJECT}'s, taken from the first run of the same call. "
            + _until(moved, source.top[0].text)
        )

    def mistake(self, info: pc.ModelInfo) -> None:
        site = info.absent_sites[0].name if info.absent_sites else "blocks.99.resid_post"
        self._step("A mistake, on purpose", CODE_ERROR.format(site=site))
        try:
            self.client.run(PROMPT, read=site)
        except pc.Error as fault:
            text = f"{type(fault).__name__}: {fault}"
            lines = textwrap.fill(text, self.terminal.width - 2, break_long_words=False, break_on_hyphens=False)
            self.terminal.say(textwrap.indent(lines, "  "))

    def what_now(self, info: pc.ModelInfo) -> None:
        self._heading("Now you")
        self.terminal.say("In one shell:\n\n  patchclamp-server --demo\n\nin another, Python:\n")
        self.terminal.say(textwrap.indent(CODE_NEXT, "  "))
        self.terminal.say("\nor without Python:\n")
        self.terminal.say(f'  patchclamp run "{PROMPT}"\n  patchclamp describe')

    def _bar(self, text: str, fraction: float) -> None:
        bar = self.terminal.green(self.terminal.bar(fraction, 40))
        self.terminal.say(f"  {text!r:16} {fraction:6.1%}  {bar}".rstrip())

    def _step(self, title: str, code: str) -> None:
        self._steps += 1
        self._heading(f"{self._steps}. {title}")
        for line in code.splitlines():
            prompt = "..." if line[0] in " ])" else ">>>"
            self.terminal.say(self.terminal.dim(f"  {prompt} {line}"))
        self.terminal.say()

    def _heading(self, title: str) -> None:
        self.terminal.say(f"\n{self.terminal.bold(title)}\n")


def _when(favourites: list[str], answer: str) -> str:
    """From which layer on the answer leads, and what led before."""
    layer = len(favourites)
    while layer and favourites[layer - 1] == answer:
        layer -= 1
    if layer == len(favourites):
        return ""
    before = f"; just before, {_word(favourites[layer - 1])} does" if layer else ""
    return f"From layer {layer} on, {_word(answer)} leads{before}."


def _until(moved: list[int], answer: str) -> str:
    """Up to which layer a patch at the subject brings the other answer."""
    if not moved:
        return "None of them brings the other answer."
    return (
        f"Up to block {max(moved)} this brings {_word(answer)}: behind it nothing reads the state at the city any more."
    )


def _top(top: pc.TopToken) -> list[str]:
    return [repr(top.text), f"{top.probability:.1%}"]


def _word(text: str) -> str:
    """A token within a sentence: without its leading space, where a line may be broken."""
    return repr(text.strip())


def _ids(read: pc.Activation) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """Token ids of the one row of a logit lens."""
    assert read.indices is not None
    return read.indices[0]
