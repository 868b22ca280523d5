"""Every error of redis-py becomes one of ours, and a new one fails here until it is placed."""

from __future__ import annotations

import inspect
from typing import Final

import pytest
import redis

from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import BrokerError, BrokerFull, BrokerRefused, BrokerUnavailable

PLACES: Final[dict[str, type[BrokerError]]] = {
    "AskError": BrokerRefused,
    "AuthenticationError": BrokerRefused,
    "AuthenticationWrongNumberOfArgsError": BrokerRefused,
    "AuthorizationError": BrokerUnavailable,
    "BusyLoadingError": BrokerUnavailable,
    "ClusterCrossSlotError": BrokerError,
    "ClusterDownError": BrokerUnavailable,
    "ClusterError": BrokerError,
    "ConnectionError": BrokerUnavailable,
    "DataError": BrokerError,
    "ExecAbortError": BrokerError,
    "ExternalAuthProviderError": BrokerUnavailable,
    "InvalidResponse": BrokerError,
    "LockError": BrokerError,
    "LockNotOwnedError": BrokerError,
    "MasterDownError": BrokerUnavailable,
    "MaxConnectionsError": BrokerUnavailable,
    "ModuleError": BrokerError,
    "MovedError": BrokerRefused,
    "NoPermissionError": BrokerRefused,
    "NoScriptError": BrokerError,
    "NoSuchFieldsetError": BrokerError,
    "OutOfMemoryError": BrokerFull,
    "PubSubError": BrokerError,
    "ReadOnlyError": BrokerUnavailable,
    "RedisError": BrokerError,
    "ResponseError": BrokerError,
    "TimeoutError": BrokerUnavailable,
    "TryAgainError": BrokerUnavailable,
    "WatchError": BrokerError,
}
# no RedisErrors: raised by redis.cluster and by threads of redis-py itself, which nothing of ours uses
OUTSIDE: Final = {
    *("ChildDeadlockedError", "CrossSlotTransactionError", "IncorrectPolicyType", "InvalidPipelineStack"),
    *("RedisClusterException", "SlotNotCoveredError"),
}
REDIS_ERRORS: Final = {
    name: value
    for name, value in vars(redis.exceptions).items()
    if inspect.isclass(value) and issubclass(value, Exception) and value.__module__ == "redis.exceptions"
}


def test_every_error_of_redis_is_known() -> None:
    unknown = set(REDIS_ERRORS) - set(PLACES) - OUTSIDE
    assert not unknown, f"redis {redis.__version__} has new errors: place them in connection.py and in PLACES"


def test_what_stands_outside_is_no_redis_error() -> None:
    wrong = [
        name
        for name, value in REDIS_ERRORS.items()
        if (name in OUTSIDE) == issubclass(value, redis.RedisError)
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(set(REDIS_ERRORS) & set(PLACES)))
def test_each_becomes_ours_with_the_call_and_the_cause(name: str) -> None:
    raised = REDIS_ERRORS[name]("3999 127.0.0.1:6381")  # MovedError and AskError parse their text

    with pytest.raises(BrokerError) as caught, broker_errors("trying something"):
        raise raised

    assert type(caught.value) is PLACES[name]
    assert str(caught.value).startswith("trying something: ")
    assert caught.value.__cause__ is raised


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NOAUTH Authentication required.", BrokerRefused),
        ("WRONGPASS invalid username-password pair or user is disabled.", BrokerRefused),
        ("OOM command not allowed when used memory > 'maxmemory'.", BrokerFull),
        ("NOPERM this user has no permissions to run the 'xadd' command", BrokerRefused),
        ("MISCONF Errors writing to the AOF file: No space left on device", BrokerFull),
        ("READONLY You can't write against a read only replica.", BrokerUnavailable),
        ("CLUSTERDOWN Hash slot not served", BrokerUnavailable),
        ("NOREPLICAS Not enough good replicas to write.", BrokerUnavailable),
        ("BUSY Redis is busy running a script.", BrokerUnavailable),
        ("BUSYGROUP Consumer Group name already exists", BrokerError),
        ("ERR something else", BrokerError),
    ],
)
def test_a_script_that_fails_is_placed_by_the_servers_words(text: str, expected: type[BrokerError]) -> None:
    with pytest.raises(BrokerError) as caught, broker_errors("script push_segments"):
        raise redis.exceptions.ResponseError(text)

    assert type(caught.value) is expected
    assert text in str(caught.value)


def test_a_cluster_whose_other_node_holds_the_run_is_refused_with_that_node() -> None:
    with pytest.raises(BrokerRefused) as refused, broker_errors("connecting"):
        raise redis.exceptions.MovedError("3999 127.0.0.1:6381")

    assert "another of its nodes, 127.0.0.1:6381; give that one in broker.url" in str(refused.value)


def test_what_is_not_of_redis_passes_through() -> None:
    with pytest.raises(KeyError), broker_errors("trying something"):
        raise KeyError("ours")
