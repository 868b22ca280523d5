"""Section `broker`: where the queue lives; credentials are only named here and read from the environment."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from configs.section import Count, Section, Text

EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _check_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError as exc:
        raise ValueError("expected redis://host:port/db, rediss://host:port/db or unix:///path") from exc
    if parts.username or parts.password or "password=" in parts.query or "username=" in parts.query:
        raise ValueError(
            "credentials do not belong in a file; take them out of the URL, put them into environment "
            "variables and name those in broker.username_env and broker.password_env"
        )
    place = parts.path if parts.scheme == "unix" else parts.hostname
    if parts.scheme not in ("redis", "rediss", "unix") or not place:
        raise ValueError("expected redis://host:port/db, rediss://host:port/db or unix:///path")
    return value


class TlsSection(Section):
    """Files for a `rediss://` broker."""

    ca_file: Text | None = None
    """Certificates of the authority that signed the server's; null = the system's."""
    cert_file: Text | None = None
    """Our own certificate, where the server asks for one."""
    key_file: Text | None = None
    """The key of `cert_file`."""
    check_hostname: bool = True
    """Refuse a certificate made out to another host."""


class BrokerSection(Section):
    """The Redis (6.2 or newer) or Valkey server that holds all queue state."""

    url: Annotated[str, AfterValidator(_check_url)] | None = None
    """`redis://host:port/db`, `rediss://...` or `unix:///path`, no credentials; null = embedded Redis."""
    jobs_url: Annotated[str, AfterValidator(_check_url)] | None = None
    """A server of its own for RQ's jobs, with the same credentials; a cluster needs one. null = `url`."""
    durability: Literal["always", "everysec", "none"] = "everysec"
    """How often the append-only file reaches the disk; with `always` nothing acknowledged is lost."""
    max_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Byte budget of the run in the broker; producers wait when it is used up."""
    dedup_window: Count = 16_384
    """Record ids remembered to recognise duplicates."""
    username_env: EnvironmentName | None = None
    """Environment variable that holds the user name; null = none."""
    password_env: EnvironmentName | None = None
    """Environment variable that holds the password; null = none."""
    tls: TlsSection = Field(default_factory=TlsSection)
