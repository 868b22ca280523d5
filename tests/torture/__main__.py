"""`python -m tests.torture`, for `make torture`."""

from __future__ import annotations

import sys

from tests.torture.campaign import main

# roles are forked off a server that imports this file again
if __name__ == "__main__":
    sys.exit(main())
