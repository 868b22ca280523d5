"""Log lines as JSON, one object a line, for whoever gathers the logs of many machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Final

LOG_JSON_VARIABLE: Final = "ROLLSTREAM_LOG_JSON"
"""Set by ``--log-json``: the processes that a command starts inherit it."""


class JsonLines(logging.Formatter):
    """Writes time, level, run, role, logger, message and, where there is one, the traceback."""

    def __init__(self, *, run: str, role: str) -> None:
        super().__init__()
        self._run = run
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; line breaks in a message are escaped."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self._run,
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
