"""Places on a rollout server: all producers together keep to its cap, also when one of them dies [S-3]."""

from __future__ import annotations

import threading

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.errors import ServerUnavailable
from broker_schemas.rollout_servers.server_slots import server_slots

URL = "http://server:8000"
CAP = 4


@pytest.mark.req("S-3")
def test_three_producers_never_have_more_on_a_server_than_its_cap(broker: Broker) -> None:
    lock, at_once, most, done = threading.Lock(), [0], [0], [0]

    def work() -> None:
        take, left = server_slots(broker, wait_s=30.0), 10
        while left:
            with take(URL, left, CAP) as given:
                with lock:
                    at_once[0] += given
                    most[0] = max(most[0], at_once[0])
                threading.Event().wait(0.002)
                with lock:
                    at_once[0] -= given
                    done[0] += given
            left -= given

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert done[0] == 30
    assert 1 < most[0] <= CAP
    assert broker.client.zcard(broker.keys.named(f"server_slots:{URL}")) == 0


@pytest.mark.req("S-3")
def test_the_places_of_a_killed_producer_are_free_again_when_their_lease_ends(broker: Broker) -> None:
    name = f"server_slots:{URL}"
    assert broker.run("take_slots", [name], ["killed", 9, CAP, 150]) == CAP
    with (
        pytest.raises(ServerUnavailable, match="held all its 4 places for 0 s"),
        server_slots(broker, wait_s=0.0)(URL, 1, CAP),
    ):
        pass

    with server_slots(broker, wait_s=5.0)(URL, 3, CAP) as given:
        assert given == 3


@pytest.mark.req("S-3")
def test_a_living_producer_keeps_its_places_beyond_their_lease(broker: Broker) -> None:
    take = server_slots(broker, wait_s=0.0, lease_s=0.3)
    with take(URL, CAP, CAP) as given:
        threading.Event().wait(0.7)
        assert given == CAP
        with pytest.raises(ServerUnavailable), server_slots(broker, wait_s=0.0)(URL, 1, CAP):
            pass
