"""Cuts demand into requests: which samples, which seeds, which ids. Pure."""

from __future__ import annotations

from broker_schemas.broker.rollout_requests import RolloutRequest
from broker_schemas.method.sampling import rollout_seed, sample_at
from broker_schemas.records.records import NOT_STEP_BOUND


def build_requests(
    run: str,
    *,
    cursor: int,
    num_rollouts: int,
    request_size: int,
    num_samples: int,
    seed: int,
    policy_version: int,
    optimizer_step: int = NOT_STEP_BOUND,
) -> list[RolloutRequest]:
    """Return requests of at most ``request_size`` rollouts from data set position ``cursor`` on.

    Ids name the position, so the same position always makes the same request.
    """
    requests = []
    for start in range(cursor, cursor + num_rollouts, request_size):
        positions = range(start, min(start + request_size, cursor + num_rollouts))
        requests.append(
            RolloutRequest(
                request_id=f"{run}-{start:08d}",
                samples=tuple(
                    (sample_at(position, num_samples, seed), rollout_seed(position, seed))
                    for position in positions
                ),
                policy_version=policy_version,
                optimizer_step=optimizer_step,
            )
        )
    return requests
