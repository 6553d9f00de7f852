"""Architectures made tiny, each with one batch: from timm, from transformers, and plain ones; nothing is downloaded.

Every entry of ``CASES`` makes a randomly initialized model. Packages are imported where they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision_repair import repair

import fishleg_func as ff

TOKENS, CLASSES = 32, 5  # sizes of vocabularies and of label sets
BATCH, TIME = 8, 12


@dataclass(frozen=True)
class Case:
    """A model and what it is trained on.

    Attributes:
        model: Randomly initialized.
        inputs: What it is called with: a tensor, a tuple, or a dict of keyword arguments.
        targets: Observations.
        likelihood: Of the targets.
        output: From what the model returns to one tensor, where it returns another thing.
    """

    model: nn.Module
    inputs: Any
    targets: Tensor
    likelihood: ff.likelihoods.Likelihood
    output: Callable[[Any], Tensor] | None = None

    def step(self, **options: Any) -> ff.FishLegStep:
        """Return the training step."""
        return ff.fishlegify(self.model, self.likelihood, output=self.output, **options)


def logits(out: Any) -> Tensor:
    """Return what most models of transformers call their natural parameters."""
    result: Tensor = out.logits
    return result


def sentences() -> tuple[Tensor, Tensor]:
    """Return tokens in which each follows from the one before, and the next tokens."""
    start = torch.randint(TOKENS, (BATCH, 1))
    steps = torch.arange(TIME + 1)
    tokens = (start + 5 * steps) % TOKENS
    return tokens[:, :-1], tokens[:, 1:]


def pictures(size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Return pictures of noise, and labels."""
    return torch.randn(BATCH, channels, size, size), torch.arange(BATCH) % CLASSES


def package(name: str) -> Any:
    """Import timm or transformers."""
    repair()
    return importlib.import_module(name)


# --- timm ---


def timm_model(name: str, **options: Any) -> nn.Module:
    """Make a model of timm."""
    model: nn.Module = package("timm").create_model(name, num_classes=CLASSES, **options)
    return model


def classifier(model: nn.Module, size: int) -> Case:
    """Return a case of pictures."""
    x, y = pictures(size)
    return Case(model, x, y, ff.likelihoods.Categorical())


# --- transformers ---


def transformers_model(family: str, head: str, **sizes: Any) -> nn.Module:
    """Make a model of transformers from a configuration."""
    transformers = package("transformers")
    model: nn.Module = getattr(transformers, family + head)(getattr(transformers, f"{family}Config")(**sizes))
    return model


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def gpt2() -> Case:
    """GPT-2: Conv1D layers, and an embedding that is tied to the head; keyword inputs, an object out."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": TIME, "vocab_size": TOKENS}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers_model("GPT2", "LMHeadModel", **sizes)
    x, y = sentences()
    return Case(model, {"input_ids": x, "use_cache": False}, y, ff.likelihoods.Categorical(), logits)


def bert() -> Case:
    """BERT with a classifier: several inputs in a dict, one of them a mask."""
    sizes = SMALL | {"vocab_size": TOKENS, "max_position_embeddings": TIME, "num_labels": CLASSES}
    model = transformers_model("Bert", "ForSequenceClassification", **sizes)
    x, _ = sentences()
    mask = torch.ones_like(x)
    mask[::2, TIME // 2 :] = 0
    return Case(
        model,
        {"input_ids": x, "attention_mask": mask},
        torch.arange(BATCH) % CLASSES,
        ff.likelihoods.Categorical(),
        logits,
    )


def llama() -> Case:
    """Llama: RMS norms, rotary positions, grouped-query attention, a gated MLP; its cache of keys and values is on."""
    sizes = SMALL | {"num_key_value_heads": 1, "vocab_size": TOKENS, "max_position_embeddings": TIME}
    model = transformers_model("Llama", "ForCausalLM", **sizes)
    x, y = sentences()
    return Case(model, {"input_ids": x}, y, ff.likelihoods.Categorical(), logits)


def t5() -> Case:
    """T5: an encoder and a decoder that share one embedding."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": TOKENS}
    model = transformers_model("T5", "ForConditionalGeneration", **sizes)
    x, y = sentences()
    return Case(model, {"input_ids": y, "decoder_input_ids": x}, y, ff.likelihoods.Categorical(), logits)


def hf_vit() -> Case:
    """ViT of transformers."""
    sizes = SMALL | {"image_size": 16, "patch_size": 8, "num_labels": CLASSES}
    model = transformers_model("ViT", "ForImageClassification", **sizes)
    x, y = pictures(16)
    return Case(model, {"pixel_values": x}, y, ff.likelihoods.Categorical(), logits)


def whisper() -> Case:
    """Whisper: convolutions over a spectrogram, an encoder, and a decoder over tokens."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 10, "max_target_positions": TIME, "vocab_size": TOKENS, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = transformers_model("Whisper", "ForConditionalGeneration", **sizes)
    x, y = sentences()
    inputs = {"input_features": torch.randn(BATCH, 8, 20), "decoder_input_ids": x}
    return Case(model, inputs, y, ff.likelihoods.Categorical(), logits)


# --- plain ---


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, head; called with tokens and a state, it returns both logits and the new state."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU], width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.recurrent = kind(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = self.recurrent(self.embedding(tokens), state)
        return self.head(hidden), state


def lstm() -> Case:
    """An LSTM language model, called with a tuple: tokens and a state."""
    x, y = sentences()
    state = (torch.zeros(2, BATCH, 32), torch.zeros(2, BATCH, 32))
    return Case(LanguageModel(nn.LSTM), (x, state), y, ff.likelihoods.Categorical(), lambda out: out[0])


def gru() -> Case:
    """A GRU language model."""
    x, y = sentences()
    return Case(LanguageModel(nn.GRU), x, y, ff.likelihoods.Categorical(), lambda out: out[0])


class UNet(nn.Module):
    """Two levels down by pooling and up by transposed convolutions, with skip connections and BatchNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def double(into: int, out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
                nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.down1, self.down2, self.bottom = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2, self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merge2, self.merge1 = double(4 * width, 2 * width), double(2 * width, width)
        self.head, self.pool = nn.Conv2d(width, 1, 1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        x = self.merge2(torch.cat((second, self.up2(self.bottom(self.pool(second)))), 1))
        result: Tensor = self.head(self.merge1(torch.cat((first, self.up1(x)), 1)))
        return result


def unet() -> Case:
    """A U-Net that finds the bright pixels of blurred noise."""
    x = torch.randn(BATCH, 1, 16, 16)
    blurred = nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    return Case(UNet(), x, blurred.gt(0).float(), ff.likelihoods.Bernoulli())


CASES: dict[str, Callable[[], Case]] = {
    "timm resnet18": lambda: classifier(timm_model("resnet18", channels=(8, 8, 16, 16)), 32),
    "timm convnext_atto": lambda: classifier(
        timm_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), 32
    ),
    "timm vit_tiny": lambda: classifier(
        timm_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3), 32
    ),
    "transformers GPT-2": gpt2,
    "transformers BERT": bert,
    "transformers Llama": llama,
    "transformers T5": t5,
    "transformers ViT": hf_vit,
    "transformers Whisper": whisper,
    "LSTM": lstm,
    "GRU": gru,
    "U-Net": unet,
}

WHOLE: dict[str, Callable[[], Case]] = {  # as published, but for the pictures' size; minutes rather than seconds
    "timm resnet18, whole": lambda: classifier(timm_model("resnet18"), 32),
    "timm convnext_atto, whole": lambda: classifier(timm_model("convnext_atto"), 32),
    "timm vit_tiny, whole": lambda: classifier(timm_model("vit_tiny_patch16_224", img_size=32), 32),
}
