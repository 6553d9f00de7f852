"""Lets torchvision be imported where it was built for CUDA and torch for the CPU; timm and transformers import it."""

from __future__ import annotations

import importlib
import importlib.util

import torch


def repair() -> None:
    """Import torchvision, if it is installed, with the declarations of the two operators that its binary lacks then."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float limit) -> Tensor")
        importlib.import_module("torchvision")
