"""FishLeg in a loop of accelerate: accumulation, clipping, bfloat16, and a state that is saved and loaded."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import data
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff


class Loop:
    """A model, its optimizer, schedule and data, prepared by accelerate."""

    def __init__(self, mixed_precision: str = "no", epochs: int = 6) -> None:
        set_seed(0)
        images = data.load("digits")
        assert images.train_labels is not None
        self.accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        loader = DataLoader(TensorDataset(images.train, images.train_labels), batch_size=64)
        self.fishleg = ff.FishLeg(model, ff.likelihoods.Categorical())
        steps = epochs * len(loader)  # of the scheduler: one for each batch, of which two make a step
        schedule = torch.optim.lr_scheduler.LinearLR(self.fishleg, 1.0, 0.01, total_iters=steps // 2)
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, self.fishleg, loader, schedule
        )

    def epoch(self, log: ff.logs.CSV | None = None) -> list[float]:
        """Train for one epoch and return the loss of each batch."""
        losses = []
        for inputs, labels in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(inputs), labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
            if log is not None and self.accelerator.sync_gradients:
                log.write(self.fishleg.fishleg.steps, {"loss": losses[-1], **self.fishleg.fishleg.statistics()})
        return losses


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        log = ff.logs.CSV(Path(name) / "log.csv")
        loop = Loop(args.mixed_precision, args.epochs)
        for i in range(args.epochs):
            if i == args.epochs // 2:
                loop.accelerator.save_state(f"{name}/half")
            print(f"epoch {i}: loss {mean(loop.epoch(log)):.3f}")
        header, *rows = log.path.read_text().splitlines()
        print(f"the log has {len(rows)} rows of {len(header.split(','))} numbers")

        loop = Loop(args.mixed_precision, args.epochs)
        loop.accelerator.load_state(f"{name}/half")
        for i in range(args.epochs // 2, args.epochs):
            print(f"epoch {i}, resumed: loss {mean(loop.epoch()):.3f}")
        print(ff.logs.line(loop.fishleg.fishleg.statistics()))


if __name__ == "__main__":
    main()
