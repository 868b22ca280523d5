"""The configuration contract: a typed, frozen tree, read from YAML by `load_config`."""

from __future__ import annotations

from broker_schemas.errors import ConfigError
from configs.loader import load_config
from configs.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "load_config"]
