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
# what scripts do to the log and its sums: they append and add; only who keeps the log takes anything away
LOG: Final = (
    Grant(commands="xadd", writes="events"),
    Grant(commands="hdel hincrby", writes="counters"),
)
IDENTITY: Final = (
    Grant(commands=CALL, writes="events counters identity"),
    Grant(commands="time hget hmget hset", writes="identity"),
)


def _scripts(keys: str) -> Grant:
    """Return the right to call scripts on the log, its sums and ``keys``, which one call names together."""
    return Grant(commands=CALL, writes=f"events counters {keys}")


def _place(role: str) -> tuple[Grant, ...]:
    """Return the right to hold the one place of a role, and to have it looked at in every script."""
    own = f"lease:{role}"
    return (*LOG, _scripts(own), Grant(commands="time hget hmget hset", writes=own))


POLICY: Final = Grant(commands="hgetall", reads="policy")
SERVER_LOCK: Final = Grant(commands=f"{CALL} set get del pexpire pttl", writes="server_lock:*")
SERVER_SLOTS: Final = Grant(
    commands="zremrangebyscore zrange zcard zscore zadd zrem", writes="server_slots:*"
)
REQUESTS: Final = (
    Grant(commands="zadd zrem zscore zrangebyscore", writes="requests"),
    Grant(commands="exists hget hmget hset hincrby hdel del", writes="request:*"),
)
GRANTS: Final[Mapping[Role, tuple[Grant, ...]]] = {
    "dispatcher": (
        *_place("dispatcher"),
        *REQUESTS,
        _scripts("requests dispatch evaluation"),
        Grant(commands="hget hset", writes="dispatch evaluation"),
        Grant(commands="hmget xrange", reads="events counters evaluation"),
        STATUS,
        RQ,
    ),
    "producer": (
        *LOG,
        Grant(commands="time multi exec hmget hset", writes="counters"),
        *REQUESTS,
        _scripts("segments seen:now seen:before requests server_slots:*"),
        Grant(commands="xadd", writes="segments"),
        Grant(commands="smismember sadd scard rename", writes="seen:now seen:before"),
        Grant(commands="sadd", writes="admitted"),
        Grant(commands="set mset strlen exists rename persist unlink", writes="raw:* body:*"),
        Grant(commands="exists", reads="payload:*"),
        POLICY,
        SERVER_LOCK,
        SERVER_SLOTS,
        RQ,
    ),
    "matcher": (
        *LOG,
        Grant(commands="multi exec"),
        _scripts("segments matched rejected evaluations"),
        Grant(commands=f"{CONSUME} xdel xlen xpending xrange xtrim", writes="segments"),
        Grant(commands="xadd", writes="matched rejected"),
        Grant(commands="xadd xdel xlen xrange", writes="evaluations"),
        Grant(commands="smismember srem", writes="admitted"),
        Grant(commands="hincrby hdel expire", writes="tries"),
        Grant(commands="mget set mset strlen getrange rename unlink", writes="body:* made:* payload:*"),
        POLICY,
    ),
    "packer": (
        *_place("packer"),
        _scripts("matched sealed open_step"),
        Grant(commands=f"{CONSUME} xdel xlen xpending xrange xtrim", writes="matched"),
        Grant(commands="hexists hget hincrby hset", writes="sealed open_step"),
        Grant(commands="zadd zrem xadd xdel xlen xrange", writes="ready:*"),
        Grant(commands="strlen unlink", writes="payload:*"),
        Grant(commands="exists", reads="claim:*"),
        Grant(commands="hget hmget", reads="counters"),
        POLICY,
        STATUS,
    ),
    "evaluator": (
        *_place("evaluator"),
        _scripts("evaluations evaluation evaluation_numbers"),
        Grant(
            commands="hget hgetall hmget hset xadd xdel xrange",
            writes="evaluations evaluation evaluation_numbers",
        ),
        Grant(commands="hmget", reads="counters"),
        STATUS,
    ),
    "learner": (
        *_place("learner"),
        *IDENTITY,
        Grant(commands="xlen xrange xtrim", writes="events"),
        Grant(commands="hget hgetall hmget hset", writes="counters"),
        Grant(
            commands=(
                f"{CALL} del exists hdel hexists hget hgetall hincrby hmget hset hsetnx mget strlen "
                "unlink getrange xadd xdel xlen xrange zadd zcard zcount zrange zrangebyscore zrem"
            ),
            writes="claims claim:* sealed ready:* payload:* policy open_step rejected",
        ),
        # scripts name these keys; what they do with them is read
        _scripts("claims claim:* sealed policy open_step rejected matched archive"),
        Grant(commands="xlen hget exists", reads="matched archive"),
        Grant(commands="xrange", reads="evaluation_numbers"),
        STATUS,
        SERVER_LOCK,
    ),
    "archive": (
        *_place("archive"),
        _scripts("archive"),
        Grant(commands="xlen xrange xread xrevrange xtrim", writes="events"),
        Grant(commands="hget hset", writes="archive"),
        Grant(commands="hmget", reads="counters"),
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
