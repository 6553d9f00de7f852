"""FishLeg in the Trainer of transformers: a tiny GPT-2 that learns to count, stopped and resumed."""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fishleg_func as ff

VOCABULARY, LENGTH, PADDING, IGNORED = 32, 12, 0, -100


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count in steps of three, of 6 to 12 tokens, padded; what is padding has no label."""

    def __init__(self, n: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.starts = torch.randint(VOCABULARY, (n,), generator=generator)
        self.lengths = torch.randint(6, LENGTH + 1, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        position = torch.arange(LENGTH)
        words = (self.starts[i] + 3 * position) % (VOCABULARY - 1) + 1
        kept = position < self.lengths[i]
        return {
            "input_ids": words.where(kept, PADDING),
            "attention_mask": kept.long(),
            "labels": words.where(kept, IGNORED),
        }


def tiny_gpt2() -> GPT2LMHeadModel:
    transformers.set_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config)


def fishleg_of(model: torch.nn.Module) -> ff.FishLeg:
    return ff.FishLeg(model, ff.likelihoods.Categorical(), output=lambda out: out.logits)


class FishLegTrainer(Trainer):
    """Makes the optimizer when the Trainer asks for it, and logs the statistics of Q, without those by layer."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = fishleg_of(self.model)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        fishleg = getattr(self.optimizer, "optimizer", self.optimizer).fishleg  # accelerate wraps the optimizer
        overall = {name: value for name, value in fishleg.statistics().items() if name.count("/") == 1}
        super().log({**logs, **overall}, *args, **kwargs)


def arguments(folder: str, steps: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=5,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        use_cpu=True,
        seed=0,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def train(trainer: Trainer, resume: str | None = None) -> list[float]:
    """Train, and return the losses that were logged."""
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bf16", action="store_true", help="autocast in bfloat16")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, options.steps, bf16=options.bf16)
        losses = train(FishLegTrainer(tiny_gpt2(), args, train_dataset=Counting()))
        print("loss", " ".join(f"{x:.3f}" for x in losses))

        trainer = FishLegTrainer(tiny_gpt2(), args, train_dataset=Counting())
        resumed = train(trainer, f"{folder}/checkpoint-{options.steps // 2}")
        print("resumed half way: loss", " ".join(f"{x:.3f}" for x in resumed[len(resumed) // 2 :]))
        print(ff.logs.line(trainer.optimizer.optimizer.fishleg.statistics()))


if __name__ == "__main__":
    main()
