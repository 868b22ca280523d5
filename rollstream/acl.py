"""The rights of each role on the broker, as lines of a Redis ACL file: its commands, on its keys, no more.

A script's commands are checked against the rights of whoever calls it, so they are listed with the role.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from broker_schemas.broker.keys import RunKeys
from broker_schemas.errors import ConfigError

Role = Literal[
    "dispatcher",
    "producer",
    "matcher",
    "packer",
    "evaluator",
    "learner",
    "archive",
    "exporter",
    "operator",
]
ROLES: Final[tuple[Role, ...]] = (
    *("dispatcher", "producer", "matcher", "packer", "evaluator"),
    *("learner", "archive", "exporter", "operator"),
)
OPERATOR: Final[Role] = "operator"


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Commands together with the keys they may be used on; names of keys are those of one run.

    ``writes`` may be read and written, ``reads`` only read; ``elsewhere`` are patterns outside the run.
    """

    commands: str
    writes: str = ""
    reads: str = ""
    elsewhere: str = ""
    channels: str = ""


CALL: Final = "evalsha eval"
STATUS: Final = Grant(
    commands="multi exec hget hgetall xlen zcard zrange",
    reads="policy segments matched claims counters open_step dispatch ready:*",
)
# what every consumer of a group does; both are writes, to what is pending
CONSUME: Final = "xack xautoclaim xreadgroup xinfo|consumers xgroup|delconsumer"
# every role makes the groups when it connects, and asks for the version of the server
CONNECT: Final = (
    Grant(commands="ping info select echo client|setname client|id script|load"),
    Grant(commands="xgroup|create", writes="segments matched"),
    Grant(commands="hget", reads="identity"),
)
RQ: Final = Grant(
    commands=(
        "multi exec watch unwatch evalsha eval exists expire persist del unlink type ttl rename "
        "hset hget hgetall hmget hdel hexists hlen hincrby hincrbyfloat sadd srem smembers sismember scard "
        "set get rpush lpush lpop rpop blpop lmove blmove lrem lrange llen lpos zadd zrem zrange zcard "
        "zcount zscore zrangebyscore zremrangebyscore xadd xlen xrange xrevrange xtrim "
        "subscribe psubscribe unsubscribe punsubscribe publish client|setname client|list"
    ),
    elsewhere="rq:*",
    channels="rq:pubsub:*",
)
IDENTITY: Final = Grant(
    commands=f"{CALL} time hget hmget hset hincrby xadd", writes="events counters identity"
)


def _place(role: str) -> Grant:
    """Return the right to hold the one place of a role, and to have it looked at in every script."""
    return Grant(commands=f"{CALL} time hget hmget hset hincrby xadd", writes=f"events counters lease:{role}")


POLICY: Final = Grant(commands="hgetall", reads="policy")
SERVER_LOCK: Final = Grant(commands=f"{CALL} set get del pexpire pttl", writes="server_lock:*")
SERVER_SLOTS: Final = Grant(
    commands=f"{CALL} time zremrangebyscore zrange zcard zscore zadd zrem",
    writes="server_slots:* events counters",
)
GRANTS: Final[Mapping[Role, tuple[Grant, ...]]] = {
    "dispatcher": (
        _place("dispatcher"),
        Grant(
            commands=(
                f"{CALL} time exists hget hmget hset hincrby hdel del zadd zrem zrangebyscore xadd xrange"
            ),
            writes="events counters requests dispatch evaluation request:*",
        ),
        STATUS,
        RQ,
    ),
    "producer": (
        Grant(
            commands=(
                f"{CALL} time hget hmget hset hdel hincrby del zadd zrem zscore sadd scard smismember rename "
                "xadd set mset strlen exists persist unlink multi exec"
            ),
            writes="events counters segments seen:now seen:before admitted requests request:* raw:* body:*",
        ),
        Grant(commands="exists", reads="payload:*"),
        POLICY,
        SERVER_LOCK,
        SERVER_SLOTS,
        RQ,
    ),
    "matcher": (
        Grant(
            commands=(
                f"{CALL} {CONSUME} multi exec expire hdel hincrby mget set mset strlen getrange rename "
                "unlink smismember srem xadd xdel xlen xpending xrange xtrim"
            ),
            writes="events counters segments matched rejected evaluations admitted tries "
            "body:* made:* payload:*",
        ),
        POLICY,
    ),
    "packer": (
        _place("packer"),
        Grant(
            commands=(
                f"{CALL} {CONSUME} hdel hexists hget hincrby hset strlen unlink zadd zrem "
                "xadd xdel xlen xpending xrange xtrim"
            ),
            writes="events counters matched sealed open_step ready:* payload:*",
        ),
        Grant(commands="exists", reads="claim:*"),
        POLICY,
        STATUS,
    ),
    "evaluator": (
        _place("evaluator"),
        Grant(
            commands=f"{CALL} hdel hget hmget hincrby hset xadd xdel xrange",
            writes="events counters evaluations evaluation evaluation_numbers",
        ),
    ),
    "learner": (
        _place("learner"),
        IDENTITY,
        Grant(
            commands=(
                f"{CALL} time del exists hdel hexists hget hgetall hincrby hmget hset hsetnx mget strlen "
                "unlink getrange xadd xdel xlen xrange xtrim zadd zcard zcount zrange zrangebyscore zrem"
            ),
            writes="events counters claims claim:* sealed ready:* payload:* policy open_step rejected",
        ),
        # scripts name these keys; what they do with them is read
        Grant(commands=CALL, writes="events counters open_step matched claims archive"),
        Grant(commands="xlen hget exists", reads="matched archive"),
        SERVER_LOCK,
    ),
    "archive": (
        _place("archive"),
        Grant(
            commands=f"{CALL} hdel hget hmget hset hincrby xlen xrange xread xrevrange xtrim",
            writes="events counters archive",
        ),
        Grant(commands="mget", reads="payload:*"),
    ),
    "exporter": (
        Grant(
            commands=(
                "time multi exec hget hgetall xlen xrange xrevrange xpending zcard "
                "xinfo|consumers xinfo|groups"
            ),
            reads="*",
        ),
    ),
}


def user_name(run: str, role: Role) -> str:
    """Return the name of a role's user, one for each run on a shared server."""
    return f"{run}-{role}"


def acl_rules(run: str, role: Role, *, password_sha256: str | None = None, has_selectors: bool = True) -> str:
    """Return the line of one role's user for a Redis ACL file.

    Without a password's hash the user is off. ``has_selectors`` is False for a server before Redis 7, which
    cannot part what may be read from what may be written, nor one grant's commands from another's keys.
    Raises ConfigError for a run name that is none.
    """
    keys = RunKeys(run)
    secret = "off" if password_sha256 is None else f"on #{password_sha256}"
    head = f"user {user_name(run, role)} reset resetchannels {secret}"
    if role == OPERATOR:
        return f"user {user_name(run, role)} reset {secret} ~* &* +@all"
    grants = [*CONNECT, *GRANTS[role]]
    if not has_selectors:
        patterns = _words(part for grant in grants for part in _patterns(keys, grant, is_coarse=True))
        commands = _words(f"+{name}" for grant in grants for name in grant.commands.split())
        return " ".join([head, *patterns, *commands])
    selectors = [
        "(" + " ".join([*_patterns(keys, grant), *(f"+{name}" for name in grant.commands.split())]) + ")"
        for grant in grants
    ]
    return " ".join([head, *selectors])


def acl_file(run: str, passwords_sha256: Mapping[Role, str], *, has_selectors: bool = True) -> str:
    """Return the whole file: every role's user, and the default user off, so that nobody comes in unnamed."""
    unknown = set(passwords_sha256) - set(ROLES)
    if unknown:
        raise ConfigError(f"acl: got passwords of {sorted(unknown)}, expected some of {', '.join(ROLES)}")
    lines = [
        acl_rules(run, role, password_sha256=passwords_sha256.get(role), has_selectors=has_selectors)
        for role in ROLES
    ]
    return "\n".join(["user default reset off", *lines]) + "\n"


def _patterns(keys: RunKeys, grant: Grant, *, is_coarse: bool = False) -> list[str]:
    reading = "~" if is_coarse else "%R~"
    return [
        *(f"~{keys.named(name)}" for name in grant.writes.split()),
        *(f"{reading}{keys.named(name)}" for name in grant.reads.split()),
        *(f"~{pattern}" for pattern in grant.elsewhere.split()),
        *(f"&{pattern}" for pattern in grant.channels.split()),
    ]


def _words(texts: Iterable[str]) -> list[str]:
    """Return the words of all texts, each once, in order."""
    return list(dict.fromkeys(word for text in texts for word in text.split()))
