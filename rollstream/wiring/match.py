"""Wires a matcher."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

from broker_schemas.broker.matcher_door import MatcherDoor
from broker_schemas.method.image_check import ImageCheck
from broker_schemas.method.image_grid import ImageGrid
from configs import RunConfig
from configs.rollout_sections import RolloutMatchingSection
from consumers.matcher import FailureDump, Matcher, MatcherSettings
from consumers.matching import MatchSettings
from consumers.metrics import MatcherMetrics
from consumers.record_matching import MatcherTools
from consumers.transport_targets import TransportSettings
from rollstream.wiring import access
from rollstream.wiring.identity import warn_of_model


def match_settings(method: RolloutMatchingSection) -> MatchSettings:
    """Return how predictions are matched."""
    return MatchSettings(
        candidate_top_k=method.candidate_top_k,
        maskiou_gate=method.maskiou_gate,
        maskiou_resolution=method.maskiou_resolution,
        fp_cost=method.fp_cost,
        fn_cost=method.fn_cost,
    )


def transport_settings(method: RolloutMatchingSection) -> TransportSettings:
    """Return how boundaries are transported."""
    return TransportSettings(
        ot_points=method.ot_points,
        ot_cost=method.ot_cost,
        ot_epsilon=method.ot_epsilon,
        ot_iters=method.ot_iters,
    )


def matcher_tools(config: RunConfig, folder: Path) -> MatcherTools:
    """Return what every record is matched with, from the tokenizer of a model folder; raises DataError."""
    method = config.rollout_matching
    prompts = access.prompt_builder(config, folder)
    return MatcherTools.for_tokenizer(
        prompts.tokenizer,
        capacity=config.training.global_max_length,
        match_settings=match_settings(method),
        transport_settings=transport_settings(method),
        image_token_ids=frozenset({prompts.image_token_id}),
        merge_size=prompts.merge_size,
    )


def image_check(config: RunConfig, folder: Path) -> ImageCheck:
    """Return the look at the images that the learner will open for a rollout of the training set."""
    bounds = config.model.image
    rule = ImageGrid.of_model(folder, min_pixels=bounds.min_pixels, max_pixels=bounds.max_pixels)
    return ImageCheck(access.data_root(config, config.data.train_jsonl), rule)


def run_matcher(config: RunConfig, index: int) -> None:
    """Run until a signal."""
    stop = access.stop_on_signals()
    endpoint = access.start_endpoint(config, "match", index)
    broker = access.open_broker(config)
    warn_of_model(config, broker)
    method, is_async = config.rollout_matching, config.variant == "stage2_async"
    dump = None
    if method.debug_dump_parse_failures:
        path = access.run_folder(config).parse_failures(index)
        dump = FailureDump(path, method.debug_dump_max)
    folder = access.model_dir(config)
    matcher = Matcher(
        # replicas of a scaled service share the index; the name must stay over a restart, for what it held
        MatcherDoor(broker, f"matcher-{index}-{socket.gethostname()}"),
        replace(matcher_tools(config, folder), images=image_check(config, folder)),
        MatcherMetrics(endpoint.registry),
        MatcherSettings(
            batch_size=config.matchers.batch_size,
            version_window=config.stage2_async.version_window if is_async else None,
        ),
        dump,
    )
    endpoint.reached("model")
    access.say_ready(config, "match", index, tokenizer=folder)
    matcher.loop(stop)
    broker.close()
