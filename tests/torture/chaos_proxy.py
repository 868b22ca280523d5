"""A bad network between roles and server: it loses, cuts and delays replies, hangs up, swallows all."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from pathlib import Path


class ChaosProxy:
    """Passes bytes on a unix socket. Each method below spoils something; `go_on` ends what lasts."""

    def __init__(self, path: Path, server: str, seed: int = 0) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self._to_lose = self._to_cut = 0
        self._delay_s = 0.0
        self._is_hole = False
        self._passes = threading.Event()
        self._passes.set()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_replies(self, num: int) -> None:
        """Swallow the next ``num`` replies, each with its connection."""
        self._to_lose = num

    def cut_replies(self, num: int) -> None:
        """End the next ``num`` replies in their middle."""
        self._to_cut = num

    def hang_up(self) -> None:
        """End every connection."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def delay(self, seconds: float) -> None:
        """Hold every piece back for so long."""
        self._delay_s = seconds

    def hold(self) -> None:
        """Let nothing through, and keep it."""
        self._passes.clear()

    def make_hole(self) -> None:
        """Let nothing through, and lose it."""
        self._is_hole = True

    def go_on(self) -> None:
        """End delays, holding and holes; who sent into a hole would wait for ever, so all are hung up on."""
        self._delay_s = 0.0
        self._passes.set()
        if self._is_hole:
            self._is_hole = False
            self.hang_up()

    def close(self) -> None:
        self.go_on()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._open:
            self.hang_up()
            time.sleep(0.01)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX) as far, contextlib.suppress(OSError):
            far.connect(self._server)
            self._open |= {near, far}
            asking = threading.Thread(target=self._pass_on, args=(near, far, False), daemon=True)
            asking.start()
            self._pass_on(far, near, True)
            asking.join()
            self._open -= {near, far}

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with contextlib.suppress(OSError):
            while raw := source.recv(1 << 16):
                self._passes.wait()
                if self._delay_s:
                    time.sleep(self._rng.uniform(0, self._delay_s))
                if self._is_hole:
                    continue
                if is_reply and self._to_lose > 0:
                    self._to_lose -= 1
                    break
                if is_reply and self._to_cut > 0:
                    self._to_cut -= 1
                    sink.sendall(raw[: len(raw) // 2])
                    break
                sink.sendall(raw)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
