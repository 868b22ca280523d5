"""A plain PyTorch loop that trains from packs: no trainer of rollstream, only its queue.

Killed at any point and started again, it goes on from its checkpoint, and trains every rollout once:
python train_from_packs.py RUN redis://127.0.0.1:6379/0 CHECKPOINT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.policy import publish_policy
from broker_schemas.client import PackFeed


def train(
    broker: Broker, model: nn.Module, checkpoint: Path, *, num_steps: int, packs_per_step: int = 2
) -> list[float]:
    """Train ``model``, token ids (N,) to logits (N, vocabulary); return the loss of every step taken here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    feed = PackFeed(broker, packs_per_step=packs_per_step, deadline_s=30)
    resume(checkpoint, model, optimizer, feed)
    feed.settle(feed.optimizer_step)  # killed between the checkpoint and this, it was not said
    losses = []
    while feed.optimizer_step < num_steps:
        packs = feed.next_step()  # asked again after a crash, the same packs
        segments = [segment for _, members in packs for segment in members]
        total = 0.0
        for segment in segments:
            ids = torch.from_numpy(segment.token_ids.copy()).long()
            is_label = torch.from_numpy(segment.ce_mask)
            logits = model(ids)[:-1][is_label[1:]]  # a token is predicted one position earlier
            loss = cross_entropy(logits, ids[1:][is_label[1:]]) / len(segments)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        feed.commit({"loss": total})
        save(checkpoint, model, optimizer, feed)
        feed.settle(feed.optimizer_step)  # the checkpoint covers it: its packs may be freed
        done = feed.optimizer_step
        publish_policy(broker, policy_version=done, optimizer_step=done, weights_path=str(checkpoint))
    return losses


def save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, feed: PackFeed) -> None:
    """Write the checkpoint whole: a kill leaves the one before."""
    half = checkpoint.with_suffix(".half")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "feed": feed.state_dict()}
    with half.open("wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())
    half.replace(checkpoint)


def resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, feed: PackFeed) -> None:
    """Load the checkpoint, if there is one."""
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        feed.load_state_dict(state["feed"])


if __name__ == "__main__":
    connected = Broker.connect(sys.argv[1], BrokerAddress(url=sys.argv[2]))
    torch.manual_seed(0)
    words = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 1000))
    sys.stdout.write(f"{train(connected, words, Path(sys.argv[3]), num_steps=3)}\n")
    connected.close()
