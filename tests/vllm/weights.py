"""Tiny models whose greedy output differs from image to image and from policy version to policy version."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NOISE = 0.05


def publish_shaken(model: Path, policy_dir: Path, policy_version: int) -> Path:
    """Write ``policy_dir/v<policy_version>``: ``model`` with noise of its own on every matrix."""
    folder = policy_dir / f"v{policy_version}"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1000 + policy_version)
    for name in sorted(tensors):
        if tensors[name].ndim > 1:
            tensors[name] += NOISE * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
