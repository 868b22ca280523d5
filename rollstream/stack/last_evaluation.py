"""Whether the producers have answered for all policies that are to be evaluated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress, open_redis
from broker_schemas.broker.evaluation_rounds import read_evaluation_state
from broker_schemas.broker.keys import RunKeys
from broker_schemas.broker.policy import read_policy
from broker_schemas.errors import BrokerError
from configs import RunConfig
from producers.evaluation_demand import EvaluationSettings, is_round_due
from rollstream.wiring.dispatch import DEFAULT_REQUEST_SIZE, evaluation_settings


@dataclass(frozen=True)
class LastEvaluation:
    """Looks at the broker with a short patience: whoever asks has other things to watch."""

    broker: Broker
    settings: EvaluationSettings | None

    @classmethod
    def of(cls, config: RunConfig, address: BrokerAddress) -> LastEvaluation:
        quick = replace(address, retries=0)
        broker = Broker(open_redis(quick, socket_timeout_s=2.0), RunKeys(config.run.name), quick)
        return cls(broker, evaluation_settings(config, DEFAULT_REQUEST_SIZE))

    def is_settled(self) -> bool:
        """Say whether every round that is due has its numbers; a broker that does not answer has not."""
        if self.settings is None:
            return True
        try:
            state, policy = read_evaluation_state(self.broker), read_policy(self.broker)
        except BrokerError:
            return False
        version = policy.policy_version if policy is not None else 0
        return state.settled >= state.policy_version and not is_round_due(
            version, state.policy_version, self.settings
        )

    def close(self) -> None:
        self.broker.close()
