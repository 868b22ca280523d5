"""The embedded server can be reached by its own user alone, also where its folder has a long or odd name."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.errors import ConfigError
from rollstream.stack import private_socket as sockets
from rollstream.stack.embedded_redis import EmbeddedRedis


@pytest.mark.req("O-2")
@pytest.mark.parametrize("name", ["redis", "a b%20c?d#e", "x" * 120, "é" * 60])
def test_it_listens_on_no_port_and_its_socket_is_its_users_alone(name: str, tmp_path: Path) -> None:
    server = EmbeddedRedis.start(tmp_path / name, durability="none")
    try:
        broker = Broker.connect("private", BrokerAddress(url=server.url, retries=0))
        assert broker.client.config_get("port") == {"port": "0"}
        broker.close()
        socket = Path(unquote(server.url.removeprefix("unix://")))
        assert stat.S_ISSOCK(socket.stat().st_mode)
        assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700
    finally:
        server.stop()


def test_the_same_folder_has_the_same_socket_and_another_has_another(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)

    assert sockets.private_socket(deep) == sockets.private_socket(deep)
    assert sockets.private_socket(deep) != sockets.private_socket(tmp_path / ("y" * 120))


@pytest.mark.parametrize("how", ["open", "link"])
def test_a_folder_that_others_may_enter_is_refused(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    home = tmp_path / f"rollstream-{os.getuid()}"
    if how == "open":
        home.mkdir()
        home.chmod(0o755)
    else:
        (tmp_path / "theirs").mkdir(mode=0o700)
        home.symlink_to(tmp_path / "theirs")

    with pytest.raises(ConfigError, match="mode 0700"):
        sockets.private_socket(tmp_path / ("x" * 120))
