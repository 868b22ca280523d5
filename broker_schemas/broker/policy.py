"""The current policy: which version, and where its weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors


@dataclass(frozen=True, kw_only=True)
class PublishedPolicy:
    """What ``publish_policy`` made current; ``weights_path`` is a Hugging Face folder.

    ``processor_fingerprint`` names the image processor that the learner uses, empty where it did not say.
    """

    policy_version: int
    optimizer_step: int
    weights_path: str
    published_at_ms: int
    processor_fingerprint: str = ""


def read_policy(broker: Broker) -> PublishedPolicy | None:
    """Return the current policy, None before the first publication; raises BrokerError."""
    with broker_errors("reading the policy"):
        fields: dict[Any, Any] = broker.client.hgetall(broker.keys.named("policy"))
    if not fields:
        return None
    return PublishedPolicy(
        policy_version=int(fields[b"version"]),
        optimizer_step=int(fields[b"optimizer_step"]),
        weights_path=fields[b"weights_path"].decode(),
        published_at_ms=int(fields[b"published_at_ms"]),
        processor_fingerprint=fields.get(b"processor_fingerprint", b"").decode(),
    )


def publish_policy(
    broker: Broker,
    *,
    policy_version: int,
    optimizer_step: int,
    weights_path: str,
    processor_fingerprint: str = "",
) -> bool:
    """Make a version current; False when it, or a later one, is current already. Raises BrokerError."""
    arguments: list[str | int] = [policy_version, optimizer_step, weights_path, processor_fingerprint]
    return bool(broker.run("publish_policy", ["policy"], arguments))
