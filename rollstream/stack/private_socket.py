"""Where the embedded server listens: a unix socket in a folder that no other user may enter."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from broker_schemas.errors import ConfigError

SOCKET_NAME: Final = "redis.sock"
LONGEST_PATH_BYTES: Final = 100
"""Of a socket's path; the kernel takes 107."""


def private_socket(folder: Path) -> Path:
    """Return the socket of the server in ``folder``, which is made this user's alone.

    Where the path is too long for a socket it stands in a folder of this user's below the temporary one, the
    same for the same ``folder``. Raises ConfigError where that one is not this user's alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    socket = folder.resolve() / SOCKET_NAME
    if len(os.fsencode(socket)) <= LONGEST_PATH_BYTES:
        return socket
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    home = Path(tempfile.gettempdir()) / f"rollstream-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"embedded broker: {home} belongs to another user or is open to others, expected a folder of "
            "ours with mode 0700 for its socket; remove it, or give a shorter run.output_dir"
        )
    return home / f"{name}.sock"
