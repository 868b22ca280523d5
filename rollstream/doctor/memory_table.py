"""The report of `rollstream doctor --memory` as text and as JSON."""

from __future__ import annotations

from typing import Any

from rollstream.doctor.memory import MemoryReport
from rollstream.doctor.memory_plan import GB


def render_memory(report: MemoryReport) -> str:
    """Return the lines that are printed."""
    plan = report.plan
    rows = [
        ("weights", plan.weights),
        ("gradients", plan.gradients),
        ("moments", plan.moments),
        (f"a row of {report.row_tokens:,} tokens, {report.row_patches:,} patches", plan.row),
        ("losses of a chunk, or the way back through a layer", plan.passing),
        ("one rank", plan.rank),
        ("host, all ranks here", plan.host),
        ("a sync", plan.sync),
        ("a checkpoint", plan.checkpoint),
    ]
    if plan.gathered:
        rows.insert(3, ("layers gathered from all ranks", plan.gathered))
    lines = [f"{report.shape.total / 1e9:.2f}e9 weights, {report.trained / 1e9:.3f}e9 of them trained"]
    lines += [f"{name:<48}{num_bytes / GB:>9.2f} GB" for name, num_bytes in rows]
    lines.append(
        f"{'sync and checkpoint, on this disk':<48}{report.sync_s:>7.1f} s and {report.checkpoint_s:.1f} s"
    )
    if report.device_bytes is not None:
        verdict = "does not fit" if report.advice else "fits"
        lines.append(f"{verdict}: {plan.rank / GB:.1f} GB on a GPU of {report.device_bytes / GB:.1f} GB")
    lines += [f"change: {line}" for line in report.advice]
    return "\n".join(lines)


def memory_to_json(report: MemoryReport) -> dict[str, Any]:
    """Return the report as plain values, bytes and seconds."""
    plan = report.plan
    return {
        "weights": report.shape.total,
        "trained": report.trained,
        "bytes": {name: getattr(plan, name) for name in (*vars(plan), "rank")},
        "sync_s": report.sync_s,
        "checkpoint_s": report.checkpoint_s,
        "device_bytes": report.device_bytes,
        "fits": None if report.device_bytes is None else not report.advice,
        "change": list(report.advice),
    }
