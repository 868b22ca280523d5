"""One lock a rollout server, in the broker: whoever changes its weights holds it.

The learner's sync and a producer that brings a restarted server up to date never meet; a server found
paused by the holder of its lock was left so by someone who died.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

import redis

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import ServerUnavailable

LEASE_S: Final = 30.0
HoldServer = Callable[[str], AbstractContextManager[None]]


def server_locks(broker: Broker, *, wait_s: float) -> HoldServer:
    """Return what holds the lock of the server at an address for the length of a ``with``.

    A holder that dies loses it within 30 s. Raises ServerUnavailable when
    the lock is not free within ``wait_s``, BrokerError.
    """

    @contextmanager
    def hold(base_url: str) -> Iterator[None]:
        lock = broker.client.lock(
            broker.keys.named(f"server_lock:{base_url}"), timeout=LEASE_S, thread_local=False
        )
        with broker_errors(f"locking rollout server {base_url}"):
            if not lock.acquire(blocking_timeout=wait_s):
                raise ServerUnavailable(
                    f"{base_url}: another process has been changing its weights for {wait_s:g} s"
                )
        done = threading.Event()
        keeper = threading.Thread(target=_keep, args=(lock, done), daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()
            with broker_errors(f"unlocking rollout server {base_url}"):
                _release(lock)

    return hold


def _keep(lock: redis.lock.Lock, done: threading.Event) -> None:
    while not done.wait(LEASE_S / 3):
        try:
            lock.reacquire()
        except redis.RedisError:
            continue


def _release(lock: redis.lock.Lock) -> None:
    try:
        lock.release()
    except redis.exceptions.LockError:  # the lease ran out while the broker was away
        return
