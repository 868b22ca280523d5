"""The rule of the schedule under the name that others rely on; it stands in ``broker_schemas.records``."""

from broker_schemas.records.schedule import InvalidRatio, is_rollout_step

__all__ = ["InvalidRatio", "is_rollout_step"]
