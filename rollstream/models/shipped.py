"""Where the small checkpoint lies that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import rollstream

SHIPPED_MODEL: Final = Path(rollstream.__file__).parent / "assets" / "scenes_tiny"
