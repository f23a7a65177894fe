"""The page's server as the command runs it, on a free port of this machine."""

import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import uvicorn

from lora_lite.play import server
from lora_lite.play.jobs import Steps


def endless(closed: threading.Event) -> Steps:
    """A job that goes on until somebody ends it."""
    try:
        while True:
            yield {"kind": "prompt", "columns": [{"key": "adapted", "tokens": [["Hi", 0.5]]}]}
            time.sleep(0.02)
    finally:
        closed.set()


class Running:
    """`serve` on a free port, in a thread."""

    def __init__(self, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.play, self.servers = play, list[uvicorn.Server]()
        ready = threading.Event()
        monkeypatch.setattr(uvicorn.Server, "install_signal_handlers", lambda self: None, raising=False)
        original = uvicorn.Server.__init__

        def keeping(server: uvicorn.Server, config: Any) -> None:
            original(server, config)
            self.servers.append(server)

        monkeypatch.setattr(uvicorn.Server, "__init__", keeping)

        def started(address: str) -> None:
            self.address = address
            ready.set()

        self.thread = threading.Thread(target=lambda: server.serve(play, 0, started), daemon=True)
        self.thread.start()
        assert ready.wait(30)
        self.port = int(self.address.rsplit(":", 1)[1].strip("/"))
        while not (self.servers and self.servers[0].started):
            time.sleep(0.01)

    def stop(self) -> None:
        self.servers[0].should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def raw(self, request: bytes) -> bytes:
        """The answer to bytes as they are."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            answer = b""
            with suppress(ConnectionError):  # it may hang up before it has read all
                connection.sendall(request)
                while part := connection.recv(65536):
                    answer += part
                    if answer.startswith(b"HTTP/1.1 4") and b"}" in answer:
                        break
            return answer or b"HTTP/1.1 000"
