"""Results: arrays that know where they come from, and what people see of them."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

import patchclamp as pc
from client.stand_in import describe_response
from patchclamp._model_info import ModelInfo
from patchclamp._results import Activations


def activation(name: str = "blocks.0.resid_post", **options: Any) -> pc.Activation:
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    return pc.Activation.of(values, name, positions=(4, 5, 6), **options)


def a_run(**changes: Any) -> pc.Run:
    strings = ("<bos>", "Fact", ":", " the <b>", "\n")
    offsets = ((0, 0), (0, 4), (4, 5), (5, 13), (13, 14))
    top = (pc.TopToken(" Austin", 0.97, 9, math.log(0.97), 8.0), pc.TopToken(" <i>", 0.01, 3, math.log(0.01), 1.0))
    values: dict[str, Any] = {
        "tokens": pc.Tokens((0, 1, 2, 3, 4), strings, offsets),
        "reads": Activations([activation(), activation("blocks.1.resid_post")]),
        "logits": None,
        "logit_positions": (4,),
        "top_rows": (top,),
        "logprobs": None,
        "loss": None,
        "receipts": (),
        "summary": pc.RunSummary(5, 0.0, 0.1, "f"),
    }
    return pc.Run(**values | changes)


def test_an_activation_is_an_array() -> None:
    found = activation()
    assert isinstance(found, np.ndarray)
    assert found.mean() == 2.5
    derived: Any = found + 1
    assert derived.hook_point == "blocks.0.resid_post"
    assert np.asarray(found).base is not None or np.asarray(found) is found


def test_what_is_computed_has_no_positions() -> None:
    found = activation(reduce="topk", indices=np.zeros((3, 2), np.int32))
    several: list[Any] = [found[1:], found * 2, found.T, np.sqrt(found), found.copy()]
    for derived in several:
        assert derived.positions == ()
        assert derived.indices is None
        assert derived.reduce is None


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])  # noqa: S301
def test_an_activation_survives_copying(again: Any) -> None:
    found = again(activation(reduce="topk", indices=np.arange(6, dtype=np.int32).reshape(3, 2)))
    assert type(found) is pc.Activation
    np.testing.assert_array_equal(found, activation())
    assert (found.hook_point, found.reduce, found.positions) == ("blocks.0.resid_post", "topk", (4, 5, 6))
    np.testing.assert_array_equal(found.indices, np.arange(6).reshape(3, 2))


def test_torch_shares_the_memory() -> None:
    torch = pytest.importorskip("torch")
    found = activation()
    tensor = found.torch()
    assert tensor.dtype == torch.float32
    tensor[0, 0] = 99
    assert found[0, 0] == 99


def test_a_run_survives_pickling() -> None:
    run = pickle.loads(pickle.dumps(a_run()))  # noqa: S301
    assert repr(run) == repr(a_run())
    assert run["blocks.0.resid_post"].positions == (4, 5, 6)


def test_results_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        a_run().tokens = None  # type: ignore[misc, assignment]
    with pytest.raises(FrozenInstanceError):
        a_run().tokens.ids = ()  # type: ignore[misc]


def test_stacking_needs_each_layer_once() -> None:
    reads = Activations([activation(), activation("blocks.2.resid_post"), activation("embed")])
    assert reads.stack("blocks.*.hook_resid_post").shape == (2, 3, 2)
    assert reads.stack("embed").shape == (1, 3, 2)
    with pytest.raises(KeyError, match="was not read"):
        reads.stack("attn.z")
    with pytest.raises(KeyError, match="read 2 times"):
        Activations([activation(), activation()]).stack("resid_post")


def test_what_a_run_looks_like() -> None:
    assert repr(a_run()) == "Run(tokens=5, top=' Austin' 0.97, reads=2)"
    assert repr(a_run(reads=Activations([]), top_rows=())) == "Run(tokens=5)"
    assert repr(a_run(loss=np.full(4, 1.234, np.float32))) == "Run(tokens=5, top=' Austin' 0.97, loss=1.23, reads=2)"


def test_what_the_rest_looks_like() -> None:
    run = a_run()
    assert repr(run.tokens) == r"Tokens(5: '<bos>' 'Fact' ':' ' the <b>' '\n')"
    assert repr(pc.Tokens(tuple(range(99)), ("a",) * 99, ((0, 1),) * 99)) == "Tokens(99: " + "'a' " * 8 + "…)"
    assert repr(run.top[0]) == "TopToken(' Austin', 0.9700, id=9)"
    assert repr(run.reads) == "Activations(blocks.0.resid_post [3, 2], blocks.1.resid_post [3, 2])"
    assert repr(Activations([activation(f"blocks.{i}.mlp.out") for i in range(40)])).endswith("and 24 more)")
    info = ModelInfo.from_message(describe_response())
    assert repr(info) == (
        "ModelInfo('stand-in', StandInForCausalLM, n_layers=2, n_heads=2, d_model=4, d_vocab=12, sites=2)"
    )
    assert repr(info.sites) == "Sites(embed, resid_post)"


def test_tokens_without_text_show_their_ids() -> None:
    top = pc.TopToken("", 0.97, 9, math.log(0.97), 8.0)
    run = a_run(tokens=pc.Tokens((11, 12), ("", ""), ((0, 0), (0, 0))), top_rows=((top,),))
    assert repr(run) == "Run(tokens=2, top=#9 0.97, reads=2)"
    assert repr(run.tokens) == "Tokens(2: #11 #12)"
    assert repr(top) == "TopToken(#9, 0.9700, id=9)"
    html = run._repr_html_()
    assert all(f"<code>#{token}</code>" in html for token in (9, 11, 12))


def test_notebooks_show_text_as_text() -> None:
    html = a_run()._repr_html_()
    assert "␣Austin" in html and "0.9700" in html
    assert "<code>␣the␣&lt;b&gt;</code>" in html
    assert "&lt;i&gt;" in html
    assert "<code>↵</code>" in html
    assert "resid_post</code></td><td></td><td>[3, 2]" in html
    assert "<table>" in ModelInfo.from_message(describe_response())._repr_html_()


def test_a_newer_servers_model_is_understood() -> None:
    message = describe_response()
    message.model.dtype = 77  # type: ignore[assignment]
    message.model.layout = 77  # type: ignore[assignment]
    message.sites.add(site=999, name="attn.new", layers=[0])
    info = ModelInfo.from_message(message)
    assert (info.dtype, info.layout) == ("", "")
    assert "attn.new" in info.sites
