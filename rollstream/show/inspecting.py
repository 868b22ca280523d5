"""`rollstream inspect`: one rollout of a run, as it was written, parsed, matched and made a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from broker_schemas.broker.payloads import fetch_segments
from broker_schemas.errors import DataError
from broker_schemas.method.adapter_folder import is_adapter, read_base
from broker_schemas.method.images import confine_image_path, open_image
from broker_schemas.records.records import MatchedSegment, SegmentRecord
from configs import RunConfig, load_config
from consumers.record_matching import MatchedRollout, match_rollout
from consumers.token_bytes import token_bytes_of
from rollstream.history.archive_reading import PayloadIndex
from rollstream.history.auditing import running_broker
from rollstream.run_folder import RunFolder
from rollstream.show.inspect_view import InspectedObject, Inspection, draw_inspection, render_inspection
from rollstream.wiring import access
from rollstream.wiring.match import matcher_tools


def find_segment(folder: RunFolder, record_id: str) -> MatchedSegment:
    """Return a matched rollout from the running broker, else from the archive; raises DataError."""
    broker = running_broker(folder)
    if broker is not None:
        try:
            return fetch_segments(broker, [record_id])[0]
        except KeyError:
            pass
        finally:
            broker.close()
    if not folder.archive_dir.exists():
        raise DataError(f"run folder {folder.path}: no archive and no running broker to find {record_id} in")
    return PayloadIndex(folder.archive_dir).fetch([record_id])[0]


def rollout_of(segment: MatchedSegment) -> SegmentRecord:
    """Return the rollout that a segment was made from."""
    return SegmentRecord(
        record_id=segment.record_id,
        policy_version=segment.policy_version,
        sample_id=segment.sample_id,
        task=segment.task,
        images=segment.images,
        processor_fingerprint=segment.processor_fingerprint,
        assistant_payload=segment.assistant_payload,
        prompt_token_ids=segment.token_ids[: segment.prompt_length],
        response_token_ids=segment.response_token_ids,
        optimizer_step=segment.optimizer_step,
        producer=segment.producer,
        generated_at_ms=segment.generated_at_ms,
    )


def base_of(folder: RunFolder, config: RunConfig, policy_version: int) -> str:
    """Return the base of the run's adapter of ``policy_version``; empty where a policy is a whole model.

    As its policy folder names it, with its digest; the configured model once that folder is cleared away.
    """
    if config.training.lora.rank is None:
        return ""
    policy = folder.policy_version_dir(policy_version)
    if is_adapter(policy):
        base = read_base(policy)
        return f"{base.path} ({base.fingerprint})" if base.fingerprint else base.path
    return str(access.model_dir(config))


def inspection_of(segment: MatchedSegment, rollout: MatchedRollout, *, base: str = "") -> Inspection:
    """Return what there is to see of one rollout of a policy that was an adapter of ``base``, or whole."""
    truth_of = dict(rollout.match.pairs)
    targets_of = {
        prediction: tuple(target)
        for (prediction, _), target in zip(rollout.match.pairs, rollout.targets, strict=True)
        if target is not None
    }
    objects = tuple(
        InspectedObject(
            number=item.number,
            desc=item.desc,
            geometry=item.geometry,
            bins=item.bins,
            ground_truth_index=truth_of.get(place),
            targets=targets_of.get(place, ()),
        )
        for place, item in enumerate(rollout.parsed.objects)
    )
    return Inspection(
        segment=rollout_of(segment),
        objects=objects,
        matched=segment,
        is_invalid=rollout.parsed.is_invalid_rollout,
        truncated=rollout.parsed.truncated,
        dropped=rollout.parsed.dropped,
        base=base,
    )


def inspect_run(run: Path, record_id: str, *, picture: Path | None, console: Console) -> None:
    """Show one rollout as coloured text, and as an image where ``picture`` names a file."""
    folder = RunFolder.existing(run)
    config: RunConfig = load_config(folder.resolved_config)
    segment = find_segment(folder, record_id)
    tools = matcher_tools(config, access.model_dir(config))
    rollout = match_rollout(rollout_of(segment), tools)
    inspection = inspection_of(segment, rollout, base=base_of(folder, config, segment.policy_version))
    table = token_bytes_of(tools.tokenizer)

    def token_text(token_id: int) -> str:
        text: Any = table.text([token_id])
        return str(text)

    console.print(render_inspection(inspection, token_text))
    if picture is not None and segment.images:
        root = access.data_root(config, config.data.train_jsonl)
        image = open_image(confine_image_path(root, segment.images[0].path))
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw_inspection(inspection, image).save(picture)
        console.print(f"picture: {picture}", markup=False)
