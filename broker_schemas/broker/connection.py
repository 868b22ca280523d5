"""Opens the broker and turns redis-py's errors into ours; the only place that knows both trees."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from broker_schemas.errors import (
    BrokerError,
    BrokerFull,
    BrokerRefused,
    BrokerUnavailable,
    GroupGone,
    PlaceTaken,
)

LOWEST_SERVER: Final = (6, 2, 0)
READ_BYTES: Final = 1 << 18
"""Taken from the socket in one call: bodies are read by the megabyte."""
_TLS_REFUSAL: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED|\[X509|\[PEM")
_PASSES: Final = re.compile(r"\b(READONLY|CLUSTERDOWN|MASTERDOWN|NOREPLICAS|TRYAGAIN|BUSY|LOADING)\b")
"""What a server says while it fails over, loses its replicas or is held up by another's script."""
_PASSING: Final = (
    redis.exceptions.ClusterDownError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.TryAgainError,
)
_PASSWORD: Final = re.compile(r"(?<=:)[^:@/]+(?=@)")


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """Where the broker is and how to speak to it. ``password`` never prints."""

    url: str
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    check_hostname: bool = True
    retries: int = 6

    def __repr__(self) -> str:
        return f"BrokerAddress({self.shown})"

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return _PASSWORD.sub("***", self.url)


class LostConnectionRetry(Retry):
    """Tries again where that can help: redis-py counts a wrong password among the lost connections."""

    def call_with_retry(
        self,
        do: Callable[[], Any],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,
    ) -> Any:
        def may_help(error: Exception) -> bool:
            is_refusal = isinstance(error, redis.AuthenticationError) or _TLS_REFUSAL.search(str(error))
            return not is_refusal and (is_retryable is None or is_retryable(error))

        return super().call_with_retry(do, fail, may_help, with_failure_count)


def open_redis(address: BrokerAddress, *, socket_timeout_s: float = 30.0) -> redis.Redis:
    """Return a client that retries lost connections with backoff (50 ms to 3 s, ``retries`` times).

    Connecting, and each wait for an answer, takes ``socket_timeout_s`` at most, connecting no more than 5 s.
    Nothing is sent yet. Raises BrokerRefused for a URL that is none, and for TLS files that are not there.
    """
    options: dict[str, object] = {
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": min(5.0, socket_timeout_s),
        "retry": LostConnectionRetry(ExponentialBackoff(cap=3.0, base=0.05), address.retries),
        "retry_on_error": [redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError],
        "health_check_interval": 30,
        "socket_read_size": READ_BYTES,
    }
    if address.username is not None:
        options["username"] = address.username
    if address.password is not None:
        options["password"] = address.password
    if address.url.startswith("rediss://"):
        options["ssl_check_hostname"] = address.check_hostname
        files = {
            "ssl_ca_certs": address.ca_file,
            "ssl_certfile": address.cert_file,
            "ssl_keyfile": address.key_file,
        }
        options |= {name: file for name, file in files.items() if file is not None}
        missing = [file for file in files.values() if file is not None and not Path(file).is_file()]
        if missing:
            raise BrokerRefused(
                f"broker {address.shown}: no file {', '.join(missing)}; correct the paths in broker.tls"
            )
    try:
        return redis.Redis.from_url(address.url, **options)
    except ValueError as exc:
        raise BrokerRefused(
            f"broker {address.shown}: not a broker URL ({exc}); use redis://host:port/0, rediss:// or unix://path"
        ) from exc


@contextmanager
def broker_errors(doing: str) -> Iterator[None]:
    """Map every error of redis-py to ours, most specific first; ``doing`` names the call in the message."""
    try:
        yield
    except redis.exceptions.OutOfMemoryError as exc:
        raise BrokerFull(
            f"{doing}: the server is out of memory ({exc}); raise maxmemory or free a run"
        ) from exc
    except (
        redis.exceptions.AuthenticationError,
        redis.exceptions.AuthenticationWrongNumberOfArgsError,
    ) as exc:
        raise BrokerRefused(
            f"{doing}: the broker refuses our password ({exc}); set the one it expects in the environment"
        ) from exc
    except redis.exceptions.NoPermissionError as exc:
        raise BrokerRefused(f"{doing}: this user may not do that ({exc}); check the ACL file") from exc
    except redis.exceptions.BusyLoadingError as exc:
        raise BrokerUnavailable(f"{doing}: the broker is still loading its data ({exc})") from exc
    except redis.exceptions.TimeoutError as exc:
        raise BrokerUnavailable(f"{doing}: no answer in time ({exc})") from exc
    except redis.exceptions.ConnectionError as exc:
        if _TLS_REFUSAL.search(str(exc)):
            raise BrokerRefused(
                f"{doing}: no trust in the broker's certificate ({exc}); check the files in broker.tls, and "
                "that the certificate is made out to the host in broker.url"
            ) from exc
        raise BrokerUnavailable(f"{doing}: no connection ({exc})") from exc
    except redis.exceptions.ResponseError as exc:
        raise _from_response(doing, exc) from exc
    except redis.exceptions.RedisError as exc:
        raise BrokerError(f"{doing}: {type(exc).__name__}: {exc}") from exc


def _from_response(doing: str, exc: redis.exceptions.ResponseError) -> BrokerError | PlaceTaken:
    text = str(exc)
    if isinstance(exc, redis.exceptions.AskError):  # MovedError is one
        return BrokerRefused(
            f"{doing}: the cluster keeps this run at another of its nodes, {exc.host}:{exc.port}; give that "
            "one in broker.url"
        )
    if isinstance(exc, _PASSING) or _PASSES.search(text):
        return BrokerUnavailable(
            f"{doing}: the server does not take this now ({text}); if it stays so, is it a replica, or a "
            "cluster that lacks nodes?"
        )
    if "FENCED" in text:
        return PlaceTaken(f"{doing}: {text.partition('FENCED ')[2]}; nothing more is written here")
    if "NOAUTH" in text or "WRONGPASS" in text or "Authentication required" in text:
        return BrokerRefused(f"{doing}: the broker wants a password ({text}); set it in the environment")
    if "OOM" in text:
        return BrokerFull(f"{doing}: the server is out of memory ({text}); raise maxmemory or free a run")
    if "MISCONF" in text:
        return BrokerFull(f"{doing}: the server cannot write to its disk ({text}); free some space there")
    if "NOGROUP" in text:
        return GroupGone(f"{doing}: the broker answers {text}")
    # a script's caller lacks a right: Redis 6.2 says so in words of its own
    if "NOPERM" in text or "The user executing the script can't" in text or "ACL failure in script" in text:
        return BrokerRefused(f"{doing}: this user may not do that ({text}); check the ACL file")
    return BrokerError(f"{doing}: the broker answers {text}")


def check_keeps_everything(client: redis.Redis, address: BrokerAddress) -> None:
    """Refuse a server that may throw records away to make room: they would be lost uncounted.

    Raises BrokerRefused for any ``maxmemory-policy`` but noeviction, BrokerUnavailable when silent.
    """
    with broker_errors(f"asking {address.shown} for its eviction policy"):
        policy = str(client.info("memory").get("maxmemory_policy") or "noeviction")
    if policy != "noeviction":
        raise BrokerRefused(
            f"broker {address.shown}: got maxmemory-policy {policy}, expected noeviction; one that evicts "
            "loses records uncounted: set 'config set maxmemory-policy noeviction' there"
        )


def check_takes_jobs(client: redis.Redis, address: BrokerAddress) -> None:
    """Refuse a cluster for RQ's jobs: their keys lie in many slots, and one call touches several.

    Raises BrokerRefused, BrokerUnavailable when silent.
    """
    with broker_errors(f"asking {address.shown} whether it is a cluster"):
        is_cluster = bool(int(client.info("cluster").get("cluster_enabled") or 0))
    if is_cluster:
        raise BrokerRefused(
            f"broker {address.shown}: it is a cluster, and RQ's jobs cannot live there (CROSSSLOT); give "
            "them a server of their own with broker.jobs_url: redis://host:port/0"
        )


def check_server(client: redis.Redis, address: BrokerAddress) -> str:
    """Return the server's version; raises BrokerRefused below Redis 6.2, BrokerUnavailable when silent."""
    with broker_errors(f"connecting to {address.shown}"):
        info = client.info("server")
    text = str(info.get("valkey_version") or info.get("redis_version", "0"))
    found = tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    if found < LOWEST_SERVER:
        raise BrokerRefused(f"broker {address.shown}: got Redis {text}, expected 6.2 or newer, or Valkey")
    return text
