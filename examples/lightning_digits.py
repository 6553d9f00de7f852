"""FishLeg in Lightning: train on digits, stop, and go on from the checkpoint, with the statistics of Q in the log."""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import data
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fishleg_func as ff


class Digits(lightning.LightningModule):
    """A classifier, as it would be with any optimizer but for ``configure_optimizers``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.net(inputs), labels)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.log_dict(self.optimizers().fishleg.statistics())

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        inputs, labels = batch
        self.log("accuracy", (self.net(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = ff.FishLeg(self.net, ff.likelihoods.Categorical())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=3e-2, total_steps=self.steps, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(batch_size: int = 128) -> tuple[DataLoader[Any], DataLoader[Any]]:
    images = data.load("digits")
    assert images.train_labels is not None and images.test_labels is not None
    train, test = TensorDataset(images.train, images.train_labels), TensorDataset(images.test, images.test_labels)
    return DataLoader(train, batch_size), DataLoader(test, len(images.test))


def fit(folder: Path, epochs: int, of: int, resume: Path | None = None) -> tuple[Digits, lightning.Trainer, Path]:
    """Train until ``epochs`` of a schedule over ``of`` epochs; return the module, the trainer and the checkpoint."""
    train, test = loaders()
    lightning.seed_everything(0, verbose=False)
    module = Digits(steps=of * len(train))
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[keep],
        logger=CSVLogger(folder, name="log"),
        log_every_n_steps=5,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train, test, ckpt_path=resume, weights_only=None if resume is None else True)
    return module, trainer, Path(keep.best_model_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, _, checkpoint = fit(folder / "first", args.epochs // 2, args.epochs)
        second, trainer, _ = fit(folder / "second", args.epochs, args.epochs, checkpoint)
        print(f"{checkpoint.name}: loss {first.losses[0]:.3f} -> {first.losses[-1]:.3f}")
        print(f"resumed: loss {second.losses[0]:.3f} -> {second.losses[-1]:.3f}")
        print(f"test accuracy {trainer.callback_metrics['accuracy']:.3f}")
        print(ff.logs.line({k: float(v) for k, v in trainer.callback_metrics.items()}))


if __name__ == "__main__":
    main()
