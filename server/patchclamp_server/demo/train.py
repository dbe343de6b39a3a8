"""Train the bundled model: ``python -m patchclamp_server.demo.train [--seed N] [--out DIR] [--quick]``.

The model first, then, on its rounded weights as they were written, the transcoders. Run again with the same arguments,
an interrupted training goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from patchclamp_server.demo.architecture import Shape, build_model
from patchclamp_server.demo.export import save
from patchclamp_server.demo.report import Training, write_training
from patchclamp_server.demo.stages import STAGES, Trainer
from patchclamp_server.demo.tokenizer import build_tokenizer
from patchclamp_server.demo.transcoder_files import save_transcoders
from patchclamp_server.demo.transcoder_training import TRANSCODER_STAGES, TranscoderStage, TranscoderTrainer

_QUICK_SHAPE = Shape(n_layers=4, n_heads=2, d_mlp=96)
_QUICK_STEPS = 4


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    trainer = _trainer(options.out, options.seed, quick=options.quick)
    cpu_seconds = {}
    for stage in STAGES:
        chosen = stage.shortened(_QUICK_STEPS) if options.quick else stage
        cpu_seconds[stage.name] = trainer.run(chosen)
    save(trainer.model, trainer.tokenizer, options.out)
    for transcoder_stage in TRANSCODER_STAGES:
        chosen_stage = transcoder_stage.shortened(_QUICK_STEPS) if options.quick else transcoder_stage
        cpu_seconds[f"{transcoder_stage.name} transcoders"] = _train_transcoders(trainer, chosen_stage, options.out)
    cpu_minutes = {name: round(seconds / 60, 2) for name, seconds in cpu_seconds.items()}
    training = Training(options.seed, torch.__version__, trainer.device.type, cpu_minutes)
    write_training(training, options.out)
    print(f"{options.out}: {training.total_cpu_minutes:.1f} CPU minutes")


def _train_transcoders(trainer: Trainer, stage: TranscoderStage, out: Path) -> float:
    """Writes one set; the CPU seconds that it took."""
    model = LlamaForCausalLM.from_pretrained(out, attn_implementation="eager").to(trainer.device)
    training = TranscoderTrainer(
        model, trainer.tokenizer, stage, trainer.directory, trainer.seed, trainer.checkpoint_every
    )
    cpu_seconds = training.run()
    save_transcoders(training.transcoders, out / "transcoders" / stage.name)
    return cpu_seconds


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="patchclamp_server.demo.train", description="Train the bundled demo model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo-model"), help="directory of the model and checkpoints")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few steps of every stage")
    return parser.parse_args(arguments)


def _trainer(out: Path, seed: int, *, quick: bool) -> Trainer:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Matrices this small gain nothing from a second thread and lose to its synchronisation.
        torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(_QUICK_SHAPE if quick else Shape(), tokenizer, seed)
    torch.nn.Module.to(model, device)
    # Runs that differ must not resume each other.
    checkpoints = out / "checkpoints" / f"seed-{seed}{'-quick' if quick else ''}"
    return Trainer(model, tokenizer, device, checkpoints, seed, checkpoint_every=2 if quick else 200)


if __name__ == "__main__":
    main()
