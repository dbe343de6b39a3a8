"""The command `patchclamp`: every verb of the SDK from a shell."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_args

import numpy as np

import patchclamp as pc
from patchclamp._generation_reports import StreamedText, generation_arrays, plain_generation, plain_token
from patchclamp._interventions_json import Ready, from_json
from patchclamp._positions import Positions
from patchclamp._reads import REDUCTIONS
from patchclamp._reports import arrays, plain_info, plain_run, show_info, show_run, show_tokens
from patchclamp._requests import Numerics, Prompt
from patchclamp._tensors import DTYPES
from patchclamp._terminal import Terminal

_EPILOG = """\
examples:
  patchclamp demo
  patchclamp describe
  patchclamp run "Fact: the capital of the state containing Dallas is"
  patchclamp run "..." --read "blocks.*.resid_post" --reduce norm
  patchclamp run "..." --read blocks.3.attn.pattern --heads 1 --save pattern.npz
  patchclamp run "..." --interventions edits.json --baseline
  patchclamp generate "Once upon a time" --max-new-tokens 40 --stop "."
  patchclamp generate "..." --temperature 0.8 --seed 7 --json

edits.json is a list in the JSON form of patchclamp.v1.Intervention, such as
  [{"zero": {"target": {"hookPoint": {"site": "SITE_ATTN_OUT", "layer": 3}}}}]

PATCHCLAMP_TARGET, PATCHCLAMP_TOKEN and PATCHCLAMP_TIMEOUT stand in for the
options of these names. `patchclamp COMMAND --help` says more.
"""

# Options that say how `--read` reads.
_OF_READS = ("positions", "heads", "reduce", "k", "onto", "dtype")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 1 when it failed; argparse leaves with 2 when its usage is wrong."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A token that the terminal's encoding lacks is shown escaped.
            stream.reconfigure(errors="backslashreplace")
    try:
        return int(options.command(options) or 0)
    except pc.Error as fault:
        return _fail(str(fault))
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _describe(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        info = client.describe()
    if options.json:
        _print_json(plain_info(info))
    else:
        show_info(info, Terminal.of(sys.stdout))


def _tokenize(options: argparse.Namespace) -> None:
    with _connect(options) as client:
        tokens = client.tokenize(_prompt(options))
    if options.json:
        _print_json({"ids": tokens.ids, "strings": tokens.strings, "offsets": tokens.offsets, "text": tokens.text})
        return
    show_tokens(tokens, Terminal.of(sys.stdout))


def _run(options: argparse.Namespace) -> int:
    reads = _reads(options)
    try:
        edits = _edits(options)
    except (OSError, UnicodeDecodeError) as fault:
        return _unreadable(options, fault)
    with _connect(options) as client:
        run = client.run(
            _prompt(options),
            read=reads,
            interventions=edits,
            logits=options.logits,
            top_k=options.top_k,
            logprobs=options.logprob,
            loss=options.loss,
            baseline=options.baseline,
            keep=options.keep,
            numerics=options.numerics,
        )
    if options.save and not _saved(options, arrays(run)):
        return 1
    if options.json:
        _print_json(plain_run(run, options.logprob))
    else:
        show_run(run, options.logprob, Terminal.of(sys.stdout))
    return 0


def _generate(options: argparse.Namespace) -> int:
    if options.stream and not options.json:
        options.usage_error("--stream: only with --json; text comes as it is generated anyway")
    if options.read and not (options.save or options.json):
        options.usage_error("--read: only with --save or --json; the text alone is shown")
    reads = _reads(options)
    try:
        edits = _edits(options)
    except (OSError, UnicodeDecodeError) as fault:
        return _unreadable(options, fault)
    interrupted = False
    with (
        _connect(options) as client,
        client.stream(
            _prompt(options),
            max_new_tokens=options.max_new_tokens,
            interventions=edits,
            read=reads,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            seed=options.seed,
            samples=options.samples,
            stop=options.stop,
            ignore_eos=options.ignore_eos,
            top_logprobs=options.top_logprobs,
            numerics=options.numerics,
        ) as stream,
    ):
        shown = StreamedText(sys.stdout, sys.stderr, options.samples)
        try:
            for token in stream:
                if options.stream:
                    _print_json({"event": "token", **plain_token(token)}, flush=True)
                elif not options.json:
                    shown.take(token)
            made = stream.result
        except KeyboardInterrupt:
            stream.close()
            if not stream.begun:
                return 130
            interrupted, made = True, stream.so_far
        except pc.Error:
            shown.leave()
            raise
    if options.json:
        _print_json({"event": "end", **plain_generation(made)} if options.stream else plain_generation(made))
    else:
        shown.finish(made)
    for number, sample in enumerate(made.samples):
        if sample.error is not None:
            _fail(f"sample {number}: {sample.error}")
    saved = not options.save or _saved(options, generation_arrays(made))
    return 130 if interrupted else int(not saved or any(sample.error for sample in made.samples))


def _reads(options: argparse.Namespace) -> list[pc.Read]:
    """The reads of `--read` and of the options that say how."""
    loose = [f"--{name}" for name in _OF_READS if getattr(options, name) not in (None, [])]
    if loose and not options.read:
        options.usage_error(f"{', '.join(loose)}: only with --read")
    return [
        pc.read(
            hook,
            positions=options.positions,
            heads=options.heads,
            reduce=options.reduce,
            k=options.k,
            onto=[pc.unembed(token) for token in options.onto] or None,
            dtype=options.dtype or "float32",
        )
        for hook in options.read
    ]


def _saved(options: argparse.Namespace, named: dict[str, Any]) -> bool:
    """Whether these arrays are in the file of `--save` now."""
    try:
        np.savez(options.save, **named)
    except OSError as fault:
        _fail(f"cannot write {options.save}: {fault.strerror or fault}")
        return False
    return True


def _edits(options: argparse.Namespace) -> list[Ready] | None:
    """The interventions of `--interventions`. OSError and UnicodeDecodeError where they cannot be read."""
    if options.interventions == options.prompt == "-":
        options.usage_error("PROMPT and --interventions cannot both come from standard input")
    return from_json(_content(options.interventions), "interventions") if options.interventions else None


def _unreadable(options: argparse.Namespace, fault: OSError | UnicodeDecodeError) -> int:
    return _fail(f"cannot read {options.interventions}: {getattr(fault, 'strerror', None) or fault}")


def _demo(options: argparse.Namespace) -> int:
    from patchclamp._tour import tour

    return tour(Terminal.of(sys.stdout), short=options.short)


def _print_json(plain: Any, *, flush: bool = False) -> None:
    print(json.dumps(plain, ensure_ascii=False, allow_nan=False), flush=flush)


def _connect(options: argparse.Namespace) -> pc.Client:
    return pc.connect(options.target, token=options.token, timeout=options.timeout)


def _prompt(options: argparse.Namespace) -> Prompt:
    if options.ids:
        return _wholenumbers(options.prompt)
    text = sys.stdin.read() if options.prompt == "-" else str(options.prompt)
    return [{"role": "user", "content": text}] if options.chat else text


def _content(file: str) -> str:
    return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")


def _wholenumbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise pc.InvalidArgument(f"{text!r} is not a list of token ids such as 12,7,99") from None


def _positions(text: str) -> Positions:
    """`last`, `all`, `prompt`, `generated`, `3`, `0,2,5`, `2:5` or `at:TEXT`."""
    if text in ("last", "all", "prompt", "generated"):
        return text
    if text.startswith("at:"):
        return pc.at(text.removeprefix("at:"))
    try:
        if ":" in text:
            start, stop = (int(end) if end else None for end in text.split(":"))
            return slice(start, stop)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not last, all, prompt, generated, a position, a list (0,2,5), a range (2:5) or at:TEXT"
        ) from None


def _logits(text: str) -> Positions | None:
    return None if text == "none" else _positions(text)


def _heads(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of heads such as 0,3") from None


def _token(text: str) -> int | str:
    """A token by id, or by its text."""
    return int(text) if text.isascii() and text.isdigit() else text


def _fail(message: str) -> int:
    print(f"patchclamp: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patchclamp",
        description="Look inside a language model that a patchclamp server holds.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"patchclamp {pc.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    describe = _command(commands, "describe", _describe, "the model, its hook points, and what the server can do")
    _add_connection(describe)

    tokenize = _command(commands, "tokenize", _tokenize, "tokens of a prompt, as a run would see them")
    _add_prompt(tokenize)
    _add_connection(tokenize)

    run = _command(commands, "run", _run, "next tokens and activations of a prompt")
    _add_prompt(run)
    _add_reads(run)
    _add_interventions(run)
    _add_logits(run)
    _add_numerics(run)
    _add_save(run)
    _add_connection(run)
    run.set_defaults(usage_error=run.error)

    generate = _command(commands, "generate", _generate, "go on with a prompt, token by token")
    _add_prompt(generate)
    _add_sampling(generate)
    _add_stop_rules(generate)
    _add_reads(generate)
    _add_edits(generate.add_argument_group("interventions"))
    _add_numerics(generate)
    _add_save(generate)
    _add_connection(generate)
    generate.add_argument("--stream", action="store_true", help="with --json: a line for each token as it comes")
    generate.set_defaults(usage_error=generate.error)

    demo = _command(commands, "demo", _demo, "start a server with the bundled model and take the guided tour")
    demo.add_argument("--short", action="store_true", help="the short tour")
    return parser


def _command(commands: Any, name: str, function: Any, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    parser.set_defaults(command=function)
    return parser


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what the model reads; - takes it from standard input")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="PROMPT is token ids, such as 12,7,99")
    form.add_argument("--chat", action="store_true", help="PROMPT is a user's message, through the chat template")


def _add_reads(parser: argparse.ArgumentParser) -> None:
    reads = parser.add_argument_group("reads")
    reads.add_argument(
        "--read", action="append", default=[], metavar="HOOK", help="activation to read; may be given several times"
    )
    reads.add_argument(
        "--positions", type=_positions, metavar="ROWS", help="last, 3, 0,2,5, 2:5 or at:TEXT (default: all)"
    )
    reads.add_argument("--heads", type=_heads, metavar="0,3", help="heads to read (default: all)")
    reads.add_argument(
        "--reduce", choices=REDUCTIONS, metavar="HOW", help=f"computed on the server: {', '.join(REDUCTIONS)}"
    )
    reads.add_argument("--k", type=int, metavar="N", help="how many, for topk and logit_lens (default: 5)")
    reads.add_argument(
        "--onto",
        type=_token,
        action="append",
        default=[],
        metavar="TOKEN",
        help="project onto the unembedding row of this token",
    )
    reads.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        metavar="TYPE",
        help="precision that travels: float32 (default), bfloat16 or float16",
    )


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE",
        help="also write every array to this .npz file; what is read twice is numbered",
    )


def _add_edits(interventions: Any) -> None:
    interventions.add_argument(
        "--interventions",
        metavar="FILE",
        help="edits of the run: a JSON list of patchclamp.v1.Intervention; - takes it from standard input",
    )


def _add_interventions(parser: argparse.ArgumentParser) -> None:
    interventions = parser.add_argument_group("interventions")
    _add_edits(interventions)
    interventions.add_argument("--baseline", action="store_true", help="also the next tokens without the interventions")
    interventions.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="HOOK",
        help="activation to keep on the server, as a handle; may be given several times",
    )


def _add_logits(parser: argparse.ArgumentParser) -> None:
    logits = parser.add_argument_group("logits")
    logits.add_argument("--top-k", type=int, default=5, metavar="N", help="most probable next tokens (default: 5)")
    logits.add_argument(
        "--logits",
        type=_logits,
        default="none",
        metavar="ROWS",
        help="rows to look at, as --positions (default: the last, top tokens only)",
    )
    logits.add_argument(
        "--logprob",
        type=_token,
        action="append",
        default=[],
        metavar="TOKEN",
        help="also the log-probability of this token (digits: an id)",
    )
    logits.add_argument("--loss", action="store_true", help="loss of the prompt's own tokens")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("choice of tokens")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default): always the most probable token"
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="among the K most probable tokens (default: all)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="among the most probable tokens of this sum (default: 1)"
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="divides positive logits of tokens already there, multiplies negative ones (default: 1)",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same tokens (default: any)")
    sampling.add_argument("--samples", type=int, default=1, metavar="N", help="continuations (default: 1)")
    sampling.add_argument(
        "--top-logprobs", type=int, default=0, metavar="N", help="with --json: also the N most probable tokens"
    )


def _add_stop_rules(parser: argparse.ArgumentParser) -> None:
    rules = parser.add_argument_group("end")
    rules.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="most tokens (default: 64)")
    rules.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends it; may be given several times"
    )
    rules.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of sequence")


def _add_numerics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--numerics",
        choices=get_args(Numerics),
        default="default",
        metavar="HOW",
        help=f"how exact results are: {', '.join(get_args(Numerics))}",
    )


def _add_connection(parser: argparse.ArgumentParser) -> None:
    connection = parser.add_argument_group("connection and output")
    connection.add_argument("--target", help="server (default: localhost:50051)")
    connection.add_argument("--token", help="bearer token; others on this machine may see it, a variable they may not")
    connection.add_argument("--timeout", type=float, metavar="SECONDS", help="most time to wait (default: 120)")
    connection.add_argument("--json", action="store_true", help="print JSON")
