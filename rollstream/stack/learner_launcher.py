"""torchrun that ends with the exit status of the rank that ended it, so that a named reason is seen as one.

Takes torchrun's arguments; torchrun itself turns every failure into status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

SIGNAL_BASE: Final = 128


def launch(arguments: Sequence[str]) -> int:
    """Run torchrun; return 0, or the status of the rank that failed first (128 + n for signal n)."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(arguments)))  # type: ignore[no-untyped-call]
    except ChildFailedError as exc:
        rank, failure = exc.get_first_failure()
        status = int(failure.exitcode)
        sys.stderr.write(f"torchrun: rank {rank} ended first, with status {status}\n")
        return status if status >= 0 else SIGNAL_BASE - status
    except SignalException as exc:
        return SIGNAL_BASE + int(exc.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
