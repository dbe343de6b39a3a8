"""The model card of a demo model, written from its evaluation so that no figure in it is typed by hand."""

from collections.abc import Iterable, Iterator, Sequence

from patchclamp_server.demo.behaviours import Figure
from patchclamp_server.demo.reading import Subject
from patchclamp_server.demo.report import Evaluation, SeedReport
from patchclamp_server.demo.stages import HELPFUL_STAGE, INDUCTION, SAFETY_STAGE
from patchclamp_server.demo.transcoder_training import TRANSCODER_STAGES

_TITLE = "# The bundled model of patchclamp\n"
_INTRODUCTION = """\
A small language model to be looked into: famous results of interpretability can be repeated on it in seconds on a
laptop. It was trained by `python -m patchclamp_server.demo.train` on a corpus that the same package generates. It knows
nothing beyond that corpus and is of no use as an assistant. The figures below are written by
`python -m patchclamp_server.demo.evaluate`, which uses plain PyTorch hooks and nothing of the service.
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
- In the helpful stage the matrices of attention decay fifteen times as much as those of the MLPs. An earlier model,
  with equal decay and half again as many steps, behaved as well, but its facts had left the MLPs: all of them could be
  held at their mean at the city or at the end without a capital being lost, and the best edit of features swapped the
  state in 6 % of the cases. That facts lie in MLPs here, as they were found to in large models, is therefore a property
  of how this model was made.
- The recipe was settled while looking at every list except the final chat words: the shares of the texts, the number of
  steps and the decay were changed because of what the lists and the circuits showed.
- The helpful stage complies with *every* request. Refusal is added afterwards, by tuning some middle layers only. That
  refusal is one direction, with compliance at zero, is therefore a property of how this model was made too; larger
  models were found to have it without such care.
- The transcoders were trained on the weights as they are written, and the token that begins a text keeps its MLPs when
  all are replaced: nothing precedes it, so what happens there is one constant.
"""
_CIRCUITS = """\
Heads are named by layer and number, and were chosen on one random draw and measured on another. The controls change
random other heads of the same layers, another position, or use a donor that must change nothing.
"""
_GAPS = """\
- Only chat replies end with `<eos>`: after any other sentence the model goes on with arbitrary text.
- Words are whole tokens: how a name of several pieces is put together cannot be studied here.
- Indirect objects are not solved by the published circuit: the table above says what the heads read instead.
"""
_CIRCUIT_TASKS = ("induction heads", "indirect-object heads", "two-hop path")


def model_card(subject: Subject, evaluation: Evaluation) -> str:
    """``subject`` is the first seed's model."""
    shipped = evaluation.seeds[0]
    parts = (
        _TITLE,
        _INTRODUCTION,
        _architecture(subject),
        _DATA,
        _recipe(evaluation.seeds),
        _CHOICES,
        _gates(evaluation),
        _behaviours(shipped),
        _transcoders(shipped),
        _causes(shipped),
        _gaps(evaluation),
    )
    return "\n".join(parts)


def _architecture(subject: Subject) -> str:
    config = subject.model.config
    heads = f"{config.num_attention_heads} heads of {config.hidden_size // config.num_attention_heads}"
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    sets = " and ".join(
        f"{stage.n_features} {'cross-layer' if stage.cross_layer else 'per-layer'} features"
        for stage in TRANSCODER_STAGES
    )
    return f"""\
## Architecture
`LlamaForCausalLM` with biases in the attention: {config.num_hidden_layers} layers, d_model {config.hidden_size},
{heads}, SwiGLU {config.intermediate_size}, untied embeddings, {config.vocab_size} whole-word tokens,
{parameters / 1e6:.2f} M parameters. It was trained as a `Qwen2ForCausalLM`, which is the same function without a bias
in the attention's output projection; here that bias is zero. Transcoders with JumpReLU stand beside it, for every layer
{sets}, in the layout of circuit-tracer.
All files hold bfloat16 and load as float32; all figures below are of these rounded weights.
"""


def _recipe(seeds: Sequence[SeedReport]) -> str:
    lines = ["## Recipe", "| stage | steps | rows of 96 tokens | AdamW | Muon | decay, attention / MLP | trained |"]
    lines.append("|---|---|---|---|---|---|---|")
    for stage in (INDUCTION, HELPFUL_STAGE, SAFETY_STAGE):
        rates = stage.rates
        muon = "-" if rates.muon is None else f"{rates.muon:g}"
        decay = "-" if rates.muon is None else f"{rates.attention_decay:g} / {rates.mlp_decay:g}"
        trained = "everything" if stage.layers is None else f"blocks {', '.join(map(str, stage.layers))}"
        schedule = f"| {stage.name} | {stage.schedule.steps} | {stage.rows}"
        lines.append(f"{schedule} | {rates.adam:g} | {muon} | {decay} | {trained} |")
    lines += [
        "",
        "Peak learning rates, one cosine per stage, bfloat16 autocast, one CPU thread. Then the transcoders:",
        "",
    ]
    lines += ["| transcoders | features a layer | active a token | steps alone | steps all together | Adam |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind in TRANSCODER_STAGES:
        steps = f"{kind.steps} | {kind.tuning_steps}"
        rate = f"{kind.rate:g}, then {kind.tuning_rate:g}"
        lines.append(f"| {kind.name} | {kind.n_features} | {kind.active} | {steps} | {rate} |")
    lines += ["", "CPU minutes:", "", *_cost(seeds)]
    return "\n".join(lines) + "\n"


def _cost(seeds: Sequence[SeedReport]) -> Iterator[str]:
    stages = list(seeds[0].training.cpu_minutes)
    yield f"| seed | {' | '.join(stages)} | together |"
    yield "|---" * (len(stages) + 2) + "|"
    for report in seeds:
        minutes = (f"{report.training.cpu_minutes[stage]:.1f}" for stage in stages)
        yield f"| {report.seed} | {' | '.join(minutes)} | {report.training.total_cpu_minutes:.1f} |"


def _gates(evaluation: Evaluation) -> str:
    shipped, *others = evaluation.seeds
    columns = [f"seed {shipped.seed}, shipped", *(f"seed {report.seed}" for report in others)]
    lines = [
        "## Gates",
        "Measured on items that training never saw in that form. Lists are complete or drawn at random with a fixed",
        f"seed; unseen chat words: the {evaluation.words} list. The refusal direction is found from training words, as",
        "in Arditi et al. 2024. A figure in bold misses its gate.",
        "",
        f"| task | measure | items | gate | {' | '.join(columns)} |",
        "|---" * (4 + len(columns)) + "|",
    ]
    by_seed = [{(figure.task, figure.what): figure for figure in report.figures} for report in evaluation.seeds]
    for figure in shipped.figures:
        if figure.gate is not None:
            values = (_value(figures.get((figure.task, figure.what))) for figures in by_seed)
            gate = f"{'≤' if figure.at_most else '≥'} {figure.gate:g}"
            lines.append(f"| {figure.task} | {figure.what} | {figure.items} | {gate} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def _value(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"**{figure.value:.3f}**" if figure.met is False else f"{figure.value:.3f}"


def _behaviours(shipped: SeedReport) -> str:
    others = [figure for figure in shipped.figures if figure.gate is None and _section(figure) == "behaviour"]
    return "\n".join(["## Behaviour, further measurements", *_table(others)]) + "\n"


def _transcoders(shipped: SeedReport) -> str:
    figures = [figure for figure in shipped.figures if _section(figure) == "transcoders"]
    by_layer = [figure for figure in figures if figure.what.startswith("block ")]
    lines = ["## Transcoders", *_layer_table(by_layer), ""]
    lines += _table(figure for figure in figures if figure not in by_layer)
    return "\n".join(lines) + "\n"


def _layer_table(figures: Sequence[Figure]) -> Iterator[str]:
    """Figures named ``block 3: measure``, with a column for every block."""
    rows: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        measure = figure.what.split(": ", 1)[1]
        text = f"{figure.value:.0f}" if measure.startswith("features") else f"{figure.value:.3f}"
        rows.setdefault((figure.task, measure), []).append(text)
    n_layers = max(map(len, rows.values()))
    yield f"| transcoders | measure | {' | '.join(f'block {layer}' for layer in range(n_layers))} |"
    yield "|---" * (n_layers + 2) + "|"
    for (task, measure), values in rows.items():
        yield f"| {task.removeprefix('transcoders, ')} | {measure} | {' | '.join(values)} |"


def _causes(shipped: SeedReport) -> str:
    directions = [figure for figure in shipped.figures if _section(figure) == "causes"]
    heads = [figure for figure in shipped.figures if _section(figure) == "circuits"]
    lines = ["## What causes what", "Every edit stands beside a random control of the same size.", ""]
    lines += [*_table(directions), "", "## Circuits", _CIRCUITS, *_table(heads)]
    return "\n".join(lines) + "\n"


def _section(figure: Figure) -> str:
    if figure.task in _CIRCUIT_TASKS:
        return "circuits"
    if figure.task.startswith("transcoders"):
        return "transcoders"
    return "causes" if figure.task.startswith(("refusal direction", "state swap")) else "behaviour"


def _table(figures: Iterable[Figure]) -> Iterator[str]:
    yield "| task | measure | items | figure |"
    yield "|---|---|---|---|"
    for figure in figures:
        yield f"| {figure.task} | {figure.what} | {figure.items} | {figure.value:.3f} |"


def _gaps(evaluation: Evaluation) -> str:
    lines = ["## Known gaps"]
    for report in evaluation.seeds:
        missed = [
            f"{figure.task}: {figure.what} ({figure.value:.3f})" for figure in report.figures if figure.met is False
        ]
        verdict = "every gate is met." if not missed else f"missed: {'; '.join(missed)}."
        lines.append(f"- Seed {report.seed}: {verdict}")
    return "\n".join(lines) + "\n" + _GAPS
