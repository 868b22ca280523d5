"""A plain PyTorch loop that trains from packs: no trainer of rollstream, only its queue.

python train_from_packs.py RUN redis://127.0.0.1:6379/0
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.broker.policy import publish_policy
from broker_schemas.client import PackFeed


def train(broker: Broker, model: nn.Module, *, num_steps: int, packs_per_step: int = 2) -> list[float]:
    """Train ``model``, token ids (N,) to logits (N, vocabulary), and return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    feed = PackFeed(broker, packs_per_step=packs_per_step, deadline_s=30)
    losses = []
    for step in range(num_steps):
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
        publish_policy(broker, policy_version=step + 1, optimizer_step=step, weights_path="/weights")
        feed.settle(step + 1)  # a checkpoint of yours covers it: its packs may be freed
    return losses


if __name__ == "__main__":
    connected = Broker.connect(sys.argv[1], BrokerAddress(url=sys.argv[2]))
    words = nn.Sequential(nn.Embedding(1000, 32), nn.Linear(32, 1000))
    sys.stdout.write(f"{train(connected, words, num_steps=3)}\n")
    connected.close()
