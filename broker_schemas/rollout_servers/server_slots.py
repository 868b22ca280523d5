"""Places on a rollout server, counted in the broker: all producers together keep to its cap [S-3]."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import broker_errors
from broker_schemas.errors import BrokerError, ServerUnavailable

LEASE_S: Final = 30.0
ASK_AGAIN_S: Final = 0.05
TakeSlots = Callable[[str, int, int], AbstractContextManager[int]]
"""(address, places wanted, places of the server) -> how many were given, at least one."""


def unshared_slots(base_url: str, num_wanted: int, num_places: int) -> AbstractContextManager[int]:
    """Give the places of a server that one process has to itself."""
    return nullcontext(min(num_wanted, num_places))


def server_slots(broker: Broker, *, wait_s: float, lease_s: float = LEASE_S) -> TakeSlots:
    """Return what takes places on the server at an address for the length of a ``with``.

    The places of a holder that dies are free again after ``lease_s``. Raises ServerUnavailable when no place
    is free within ``wait_s``, BrokerError.
    """
    lease_ms = int(lease_s * 1000)

    @contextmanager
    def take(base_url: str, num_wanted: int, num_places: int) -> Iterator[int]:
        name, holder = f"server_slots:{base_url}", secrets.token_hex(8)
        give_up_at = time.monotonic() + wait_s
        while not (given := broker.run("take_slots", [name], [holder, num_wanted, num_places, lease_ms])):
            if time.monotonic() >= give_up_at:
                raise ServerUnavailable(
                    f"{base_url}: producers of this run held all its {num_places} places for {wait_s:g} s; "
                    "raise decode_batch_size, add servers, or start fewer producers"
                )
            time.sleep(ASK_AGAIN_S)
        done = threading.Event()

        def keep() -> None:
            while not done.wait(lease_s / 3):
                try:
                    broker.run("take_slots", [name], [holder, 0, num_places, lease_ms])
                except BrokerError:
                    continue

        keeper = threading.Thread(target=keep, name=f"slots-{holder}", daemon=True)
        keeper.start()
        try:
            yield int(given)
        finally:
            done.set()
            keeper.join()
            with broker_errors(f"giving back places on {base_url}"):
                broker.client.zrem(
                    broker.keys.named(name), *(f"{holder}:{place}" for place in range(1, int(given) + 1))
                )

    return take
