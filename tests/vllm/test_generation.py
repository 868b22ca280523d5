"""Generation on real servers: the tokens, log-probabilities, seeds, order and versions that we rely on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from broker_schemas.errors import PromptMismatch, ServerRefused
from broker_schemas.method.images import ImageProcessor
from broker_schemas.rollout_servers.server_slots import unshared_slots
from producers.hf_backend import HfBackend
from producers.rollout_backend import DecodingSettings, Generation
from producers.vllm_backend import VllmBackend
from tests.builders.settings import decoding_settings
from tests.vllm.conftest import MakeBackend, RunningServers, Stage


def ids_of(generations: list[Generation]) -> list[list[int]]:
    return [generation.response_token_ids.tolist() for generation in generations]


@pytest.mark.req("M-2", "V-1", "V-5")
def test_greedy_tokens_and_logprobs_equal_those_of_transformers(
    stage: Stage, make_vllm: MakeBackend, make_hf: Callable[[], HfBackend]
) -> None:
    vllm, hf = make_vllm(), make_hf()
    policy = stage.publish(1, "generation")
    vllm.follow(policy)
    hf.follow(policy)
    samples, seeds = stage.samples[:8], list(range(8))

    ours, theirs = hf.generate(samples, seeds), vllm.generate(samples, seeds)

    assert ids_of(theirs) == ids_of(ours)
    assert len({tuple(ids) for ids in ids_of(ours)}) > 1, "the images must matter"
    for mine, its in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(its.prompt_token_ids, mine.prompt_token_ids)
        np.testing.assert_allclose(its.response_logprobs, mine.response_logprobs, atol=2e-3)
        assert (its.policy_version, its.grids_thw) == (1, mine.grids_thw)


@pytest.mark.req("V-3")
def test_a_repetition_penalty_acts_as_in_transformers(
    stage: Stage, make_vllm: MakeBackend, make_hf: Callable[[DecodingSettings], HfBackend]
) -> None:
    decoding = decoding_settings(max_new_tokens=24, repetition_penalty=1.3)
    vllm, hf = make_vllm(decoding), make_hf(decoding)
    policy = stage.publish(1, "generation")
    vllm.follow(policy)
    hf.follow(policy)

    ours = hf.generate(stage.samples[:4], [0] * 4)
    theirs = vllm.generate(stage.samples[:4], [0] * 4)

    assert ids_of(theirs) == ids_of(ours)


@pytest.mark.req("V-5")
def test_an_image_of_any_shape_gives_the_same_prompt_and_tokens(
    stage: Stage, make_vllm: MakeBackend, make_hf: Callable[[], HfBackend], tmp_path: Path
) -> None:
    file = stage.root / "scenes" / "images" / "odd.jpg"
    noise = np.random.default_rng(3).integers(0, 255, (97, 211, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 300)).save(file, quality=80)
    odd = replace(stage.samples[0], image_paths=("images/odd.jpg",), image_files=(file,))
    vllm, hf = make_vllm(), make_hf()
    policy = stage.publish(1, "generation")
    vllm.follow(policy)
    hf.follow(policy)

    assert ids_of(vllm.generate([odd], [0])) == ids_of(hf.generate([odd], [0]))


@pytest.mark.req("V-3", "V-4")
def test_sampling_depends_on_the_seed_of_each_rollout_and_not_on_its_company(
    stage: Stage, make_vllm: MakeBackend
) -> None:
    decoding = decoding_settings(max_new_tokens=16, temperature=1.0)
    vllm = make_vllm(decoding)
    vllm.follow(stage.publish(1, "generation"))
    same = [stage.samples[0]] * 4

    together = ids_of(vllm.generate(same, [11, 12, 11, 13]))
    alone = [ids_of(vllm.generate([stage.samples[0]], [seed]))[0] for seed in (11, 12, 13)]

    assert together[0] == together[2] == alone[0]
    assert [together[1], together[3]] == alone[1:]
    assert len({tuple(ids) for ids in alone}) == 3


@pytest.mark.req("V-3")
def test_top_k_of_one_is_greedy(stage: Stage, make_vllm: MakeBackend) -> None:
    greedy = make_vllm()
    only_best = make_vllm(decoding_settings(max_new_tokens=24, temperature=1.0, top_k=1))
    for backend in (greedy, only_best):
        backend.follow(stage.publish(1, "generation"))

    best = ids_of(only_best.generate(stage.samples[:3], [5, 6, 7]))

    assert best == ids_of(greedy.generate(stage.samples[:3], [0, 0, 0]))


@pytest.mark.req("V-4")
def test_a_rollout_ends_with_the_end_token_and_is_cut_at_the_limit(
    stage: Stage, make_vllm: MakeBackend
) -> None:
    vllm = make_vllm(decoding_settings(max_new_tokens=90, temperature=1.5))
    vllm.follow(stage.publish(1, "generation"))

    generations = vllm.generate(stage.samples * 4, list(range(len(stage.samples) * 4)))

    for generation in generations:
        ends = np.flatnonzero(generation.response_token_ids == stage.prompts.end_token_id)
        expected = "stop" if len(ends) else "length"
        assert generation.finish_reason == expected
        assert ends.tolist() in ([], [len(generation.response_token_ids) - 1])
        assert len(ends) or len(generation.response_token_ids) == 90
    assert {generation.finish_reason for generation in generations} == {"stop", "length"}


@pytest.mark.req("V-5")
def test_other_image_bounds_than_the_servers_are_noticed(
    stage: Stage, two_servers: RunningServers, make_vllm: MakeBackend
) -> None:
    images = ImageProcessor(stage.model, stage.root / "scenes", min_pixels=256 * 256, max_pixels=256 * 256)
    ready = make_vllm()
    vllm = VllmBackend(stage.prompts, images, ready._fleet, ready._settings, unshared_slots)
    vllm.follow(stage.publish(1, "generation"))

    with pytest.raises(PromptMismatch, match="image bounds"):
        vllm.generate(stage.samples[:1], [0])


def test_more_new_tokens_than_the_server_has_room_for_are_refused(
    stage: Stage, make_vllm: MakeBackend
) -> None:
    vllm = make_vllm(decoding_settings(max_new_tokens=4000))
    vllm.follow(stage.publish(1, "generation"))

    with pytest.raises(ServerRefused, match="max_model_len"):
        vllm.generate(stage.samples[:1], [0])


@pytest.mark.req("V-5")
def test_the_chat_endpoint_gives_the_same_generations(
    stage: Stage, two_servers: RunningServers, make_vllm: MakeBackend
) -> None:
    tokens, chat = make_vllm(), make_vllm()
    for backend in (tokens, chat):
        backend.follow(stage.publish(1, "generation"))
    chat._servers = [replace(server, dialect="chat") for server in chat._servers]

    by_tokens = tokens.generate(stage.samples[:4], [1, 2, 3, 4])
    by_chat = chat.generate(stage.samples[:4], [1, 2, 3, 4])

    assert ids_of(by_chat) == ids_of(by_tokens)
    assert [item.policy_version for item in by_chat] == [1] * 4
    np.testing.assert_allclose(by_chat[0].response_logprobs, by_tokens[0].response_logprobs, atol=1e-4)
