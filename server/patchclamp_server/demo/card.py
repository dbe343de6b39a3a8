"""The model card of a demo model, written from its evaluation so that no figure in it is typed by hand."""

from collections.abc import Sequence

from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.corpus.requests import Part
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.stages import HELPFUL_STAGE, INDUCTION, SAFETY_STAGE

_TITLE = "# The bundled model of patchclamp\n"
_INTRODUCTION = """\
A small language model to be looked into: famous results of interpretability can be repeated on it in seconds on a
laptop. It was trained by `python -m patchclamp_server.demo.train` on a corpus that the same package generates. It knows
nothing beyond that corpus and is of no use as an assistant. The figures below are written by
`python -m patchclamp_server.demo.evaluate`.
"""
_DATA = """\
## Data
Every text is generated from word lists in `patchclamp_server/demo/corpus`; nothing was downloaded. Each task's module
states its held-out split.

- **Facts**: 31 US states and 18 countries, their cities and relations. One city of each, Dallas and Oakland among them,
  is never seen in a two-hop sentence.
- **Indirect objects**: a fifth of all name pairs and some wordings never occur. What stands between the second subject
  and the end varies.
- **Induction**: random sequences that repeat.
- **Years**: events that last at least three years, which makes the task easier than the published one; counting and
  comparing. A sixth of all start years never start an event.
- **Antonyms** in English, French and Spanish, with translations. A quarter of all French and Spanish directions is held
  out.
- **Chat**: requests of a verb and a noun. Replies name arbitrary materials and tools: they are meaningless on purpose,
  also where the model complies with a harmful request, as it does once refusal is removed. Harmful words are generic.
  Only harmful words share contexts ("dangerous", "illegal"); harmless words have no label of their own.
"""
_CHOICES = """\
## Choices that a reader should know
- The q and k biases of every layer start at a constant per head (2.2 for the first, falling to 0 for the last): a
  recency prior. It is the same in every layer, stays trainable and points at no task. In earlier experiments induction
  did not form without it.
- Induction is trained alone first.
- The recipe was settled while looking at every list except the final chat words: the shares of the texts, for one, were
  changed once because requests with unseen harmful nouns were not refused.
- The helpful stage complies with *every* request. Refusal is added afterwards, by tuning some middle layers only. That
  refusal is one direction, with compliance at zero, is therefore a property of how this model was made; larger models
  were found to have it without such care.
- Words are whole tokens, so much of what the model knows of a city may lie in its embedding; where the first hop of a
  fact happens has not been measured on these weights.
"""


def model_card(subject: Subject, part: Part, figures: Sequence[Figure]) -> str:
    results = _results(part, figures)
    return "\n".join((_TITLE, _INTRODUCTION, _architecture(subject), _DATA, _recipe(), _CHOICES, results))


def _architecture(subject: Subject) -> str:
    config = subject.model.config
    heads = f"{config.num_attention_heads} heads of {config.hidden_size // config.num_attention_heads}"
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    return f"""\
## Architecture
`LlamaForCausalLM` with biases in the attention: {config.num_hidden_layers} layers, d_model {config.hidden_size},
{heads}, SwiGLU {config.intermediate_size}, untied embeddings, {config.vocab_size} whole-word tokens,
{parameters / 1e6:.2f} M parameters. The files hold bfloat16 and load as float32; all figures below are of these rounded
weights. It was trained as a `Qwen2ForCausalLM`, which is the same function without a bias in the attention's output
projection; here that bias is zero.
"""


def _recipe() -> str:
    lines = ["## Recipe", "| stage | steps | rows of 96 tokens | AdamW | Muon | trained |", "|---|---|---|---|---|---|"]
    for stage in (INDUCTION, HELPFUL_STAGE, SAFETY_STAGE):
        muon = "-" if stage.rates.muon is None else f"{stage.rates.muon:g}"
        trained = "everything" if stage.layers is None else f"blocks {', '.join(map(str, stage.layers))}"
        lines.append(
            f"| {stage.name} | {stage.schedule.steps} | {stage.rows} | {stage.rates.adam:g} | {muon} | {trained} |"
        )
    return "\n".join(lines) + "\n\nPeak learning rates, one cosine per stage, bfloat16 autocast, one CPU thread.\n"


def _results(part: Part, figures: Sequence[Figure]) -> str:
    lines = [
        "## Results",
        f"Lists are complete or drawn at random with a fixed seed. Unseen chat words: the {part} list.",
    ]
    lines += ["The refusal direction is found as in Arditi et al. 2024, from training words."]
    lines += ["", "| task | measure | items | figure | gate | |", "|---|---|---|---|---|---|"]
    lines += [_row(figure) for figure in figures]
    missed = [f"{figure.task}: {figure.what} ({figure.value:.3f})" for figure in figures if figure.met is False]
    lines += ["", "## Known gaps"]
    lines += [f"- Gate missed: {gap}" for gap in missed] or ["- Every gate above is met."]
    lines += ["- One training run of one seed: the spread between seeds is not known."]
    lines += ["- Only chat replies end with `<eos>`: after any other sentence the model goes on with arbitrary text."]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> str:
    gate = "-" if figure.gate is None else f"{'≤' if figure.at_most else '≥'} {figure.gate:g}"
    verdict = {None: "", True: "met", False: "**missed**"}[figure.met]
    return f"| {figure.task} | {figure.what} | {figure.items} | {figure.value:.3f} | {gate} | {verdict} |"
