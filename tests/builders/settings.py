"""Settings of the cores with plain values, for one test to name only what it is about."""

from __future__ import annotations

from typing import Any

from broker_schemas.broker.learner_door import ClaimSettings
from broker_schemas.broker.rollout_requests import LeaseSettings
from consumers.matcher import MatcherSettings
from consumers.matching import MatchSettings
from consumers.transport_targets import TransportSettings
from learner.channel_a import ChannelASettings
from learner.losses import LossSettings
from learner.optimization import OptimizationSettings
from learner.settings import EarlyStopSettings, LearnerSettings
from producers.dispatcher import DispatcherSettings
from producers.hf_backend import HfBackendSettings
from producers.producer import ProducerSettings
from producers.rollout_backend import DecodingSettings
from producers.vllm_backend import VllmBackendSettings


def claim_settings(**settings: Any) -> ClaimSettings:
    return ClaimSettings(**{"version_window": 2, "mode": "fallback", **settings})


def lease_settings(**settings: Any) -> LeaseSettings:
    return LeaseSettings(**{"max_attempts": 5, **settings})


def vllm_backend_settings(**settings: Any) -> VllmBackendSettings:
    return VllmBackendSettings(**{"decode_batch_size": 4, **settings})


def dispatcher_settings(**settings: Any) -> DispatcherSettings:
    return DispatcherSettings(**{"lease": lease_settings(), "job_timeout_s": 900, **settings})


def decoding_settings(**settings: Any) -> DecodingSettings:
    return DecodingSettings(
        **{"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, **settings}
    )


def hf_backend_settings(**settings: Any) -> HfBackendSettings:
    return HfBackendSettings(**{"decode_batch_size": 4, "dtype": "float32", **settings})


def producer_settings(**settings: Any) -> ProducerSettings:
    return ProducerSettings(**{"lease": lease_settings(), "job_timeout_s": 900, **settings})


def transport_settings(**settings: Any) -> TransportSettings:
    return TransportSettings(
        **{"ot_points": 64, "ot_epsilon": 20.0, "ot_iters": 50, "ot_cost": "l2_squared", **settings}
    )


def match_settings(**settings: Any) -> MatchSettings:
    return MatchSettings(
        **{
            "candidate_top_k": 10,
            "maskiou_gate": 0.3,
            "maskiou_resolution": 256,
            "fp_cost": 1.0,
            "fn_cost": 1.0,
            **settings,
        }
    )


def matcher_settings(**settings: Any) -> MatcherSettings:
    return MatcherSettings(**{"batch_size": 64, "version_window": 2, **settings})


def optimization_settings(**settings: Any) -> OptimizationSettings:
    return OptimizationSettings(
        **{
            "learning_rate": 1e-4,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "schedule": "constant",
            "max_grad_norm": 1.0,
            "max_steps": 1000,
            **settings,
        }
    )


def early_stop_settings(**settings: Any) -> EarlyStopSettings:
    return EarlyStopSettings(**{"metric": "f1", "target": None, "patience": None, **settings})


def learner_settings(**settings: Any) -> LearnerSettings:
    return LearnerSettings(
        **{
            "b_ratio": "0",
            "seed": 0,
            "gradient_accumulation_steps": 1,
            "sync_every_steps": 1,
            "save_every_steps": 50,
            "eval_every_steps": 0,
            "num_checkpoints_kept": 2,
            "stall_timeout_s": 300.0,
            "precision": "float32",
            "sharding": "none",
            "early_stop": early_stop_settings(),
            **settings,
        }
    )


def channel_a_settings(**settings: Any) -> ChannelASettings:
    return ChannelASettings(**{"seed": 0, "effective_batch_size": 16, **settings})


def loss_settings(**settings: Any) -> LossSettings:
    return LossSettings(
        **{
            "target_sigma": 2.0,
            "target_truncate": None,
            "temperature_coord": 1.0,
            "soft_ce_weight": 1.0,
            "w1_weight": 1.0,
            "gate_weight": 1.0,
            "desc_ce_weight": 1.0,
            "duplicate_weight": 0.0,
            **settings,
        }
    )


def method_settings() -> dict[str, Any]:
    """How matcher tools match and transport."""
    return {"match_settings": match_settings(), "transport_settings": transport_settings()}
