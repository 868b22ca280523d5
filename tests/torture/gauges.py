"""Memory, descriptors, lengths and consumers over time: written to a file, and looked at for growth."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import redis

from broker_schemas.broker.keys import RunKeys

STREAMS: Final = ("segments", "matched", "rejected", "events", "ready:0", "ready:1")
GROUPS: Final = (("segments", "matcher"), ("matched", "packer"))
LEAST_SAMPLES: Final = 48
# what may be more at the end than in the middle, beyond a half
SLACK: Final = {
    "rss_mb": 64.0,
    "descriptors": 16.0,
    "threads": 8.0,
    "server_mb": 64.0,
    "keys": 2000.0,
    "consumers": 4.0,
    "pending": 512.0,
    "length": 2000.0,
    "bytes": 32e6,
}


def process_gauges(name: str, pid: int) -> dict[str, float]:
    """Return memory, descriptors and threads of a process; empty where it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return {
            f"rss_mb {name}": int(lines["VmRSS"].split()[0]) / 1024,
            f"threads {name}": int(lines["Threads"]),
            f"descriptors {name}": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        }
    except (OSError, KeyError, ValueError):
        return {}


def server_gauges(client: redis.Redis, keys: RunKeys) -> dict[str, float]:
    """Return what the server holds; empty where it is away."""
    try:
        found: dict[str, float] = {f"length {name}": client.xlen(keys.named(name)) for name in STREAMS}  # type: ignore[misc]
        for stream, group in GROUPS:
            consumers: Any = client.xinfo_consumers(keys.named(stream), group)
            found[f"consumers {group}"] = len(consumers)
            found[f"pending {group}"] = sum(consumer["pending"] for consumer in consumers)
        memory: Any = client.info("memory")
        counters: Any = client.hmget(keys.named("counters"), "bytes", "log_bytes")
        # without an archive's pace the log alone grows to its bound: it has a gauge of its own
        log_mb = int(counters[1] or 0) / 1e6
        found["server_mb"] = max(0.0, memory["used_memory"] / 1e6 - 2 * log_mb)
        found["bytes"] = float(counters[0] or 0)
        found["keys"] = float(client.dbsize())  # type: ignore[arg-type]
    except (redis.RedisError, OSError):
        return {}
    return found


class GaugeFile:
    """Samples as JSON lines, each with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._samples: list[Mapping[str, float]] = []

    def write(self, at_s: float, sample: Mapping[str, float]) -> None:
        self._samples.append(sample)
        with self._path.open("a") as file:
            file.write(json.dumps({"at_s": round(at_s, 1), **sample}) + "\n")

    def growth(self) -> list[str]:
        """Return what is much more in the last quarter than in the second; nothing of a short campaign."""
        quarter = len(self._samples) // 4
        if len(self._samples) < LEAST_SAMPLES:
            return []
        before, after = self._samples[quarter : 2 * quarter], self._samples[3 * quarter :]
        faults = []
        for name in sorted({name for sample in after for name in sample}):
            if name == "length events":  # bounded by the archive's cursor and 20,000
                continue
            early, late = ([sample[name] for sample in part if name in sample] for part in (before, after))
            if not early or not late:
                continue
            bound = 1.5 * statistics.median(early) + SLACK[name.split(" ")[0]]
            if statistics.median(late) > bound:
                faults.append(
                    f"{name} grows: {statistics.median(early):.0f} in the second quarter, "
                    f"{statistics.median(late):.0f} in the last"
                )
        return faults
