"""The rule of freshness under the name that others rely on; it stands in ``records``."""

from broker_schemas.records.freshness import oldest_allowed

__all__ = ["oldest_allowed"]
