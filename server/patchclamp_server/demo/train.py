"""Train the bundled model: ``python -m patchclamp_server.demo.train [--seed N] [--out DIR] [--quick]``.

Run again with the same arguments, an interrupted training goes on from its last checkpoint. Later stages can be added
to ``main``: each is a function of the trainer.
"""

import argparse
import time
from pathlib import Path

import torch

from patchclamp_server.demo.architecture import Shape, build_model
from patchclamp_server.demo.export import save
from patchclamp_server.demo.stages import STAGES, Trainer
from patchclamp_server.demo.tokenizer import build_tokenizer

_QUICK_SHAPE = Shape(n_layers=4, n_heads=2, d_mlp=96)
_QUICK_STEPS = 4


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    trainer = _trainer(options.out, options.seed, quick=options.quick)
    started = time.process_time()
    for stage in STAGES:
        trainer.run(stage.shortened(_QUICK_STEPS) if options.quick else stage)
    save(trainer.model, trainer.tokenizer, options.out)
    print(f"{options.out}: {(time.process_time() - started) / 60:.1f} CPU minutes")


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
