"""The command: a model and adapters from the disk, the page's address, and what it says where it can't."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import webbrowser
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from models import perturb
from typer.testing import CliRunner

import lora_lite as ll
from lora_lite.cli.commands import app
from lora_lite.cli.reason import reason
from lora_lite.play import command, server
from lora_lite.play.jobs import Worker


@pytest.fixture
def adapter(tiny_chat: str, tmp_path: Path) -> Path:
    model = ll.load_base(tiny_chat, "float32")
    perturb(ll.attach(model, ll.LoRAConfig(r=2)), 0.3)
    ll.adapters(model)["default"].scale = 0.75
    ll.save(model, tmp_path / "mine.safetensors")
    ll.save_peft(model, tmp_path / "folder", rank=4)
    return tmp_path / "mine.safetensors"


@pytest.mark.slow
def test_it_serves_the_page_of_a_model_and_its_adapters(adapter: Path, tiny_chat: str) -> None:
    given = [tiny_chat, str(adapter), str(adapter.parent / "folder"), "--no-open", "--port", "0", "--dtype", "float32"]
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}  # no network
    with subprocess.Popen(
        [sys.executable, "-m", "lora_lite", "play", *given], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        address = re.match(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends it\)\n", process.stdout.readline())
        assert address is not None
        with httpx.Client(trust_env=False, timeout=60) as client:
            state = client.get(f"{address[1]}api/state").json()
            listed = [(entry["label"], entry["start"], entry["fitted"]) for entry in state["adapters"]]
            assert listed == [("mine", 0.75, False), ("folder", 1.0, False)]
            scales = {entry["id"]: entry["start"] for entry in state["adapters"]}
            body = {"prompt": "Hi.", "scales": scales, "tokens": 3}
            lines = client.post(f"{address[1]}api/write", json=body).text.splitlines()
            assert json.loads(lines[-1])["kind"] == "end"
            assert json.loads(lines[1])["tokens"][1][2] > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)


def test_the_browser_is_opened_unless_it_is_not_wanted(tiny_chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, is_open, left = list[str](), threading.Event(), threading.Event()

    def in_the_terminal(address: str) -> None:
        opened.append(address)
        is_open.set()
        left.wait(10)

    monkeypatch.setattr(webbrowser, "open", in_the_terminal)
    monkeypatch.setattr(command, "serve", lambda play, port, ready: ready(f"http://127.0.0.1:{port}/"))
    command.run(tiny_chat, [], port=5, dtype="float32")
    assert is_open.wait(10)
    assert not left.is_set()  # the server goes on
    command.run(tiny_chat, [], port=6, dtype="float32", open_browser=False)
    left.set()
    assert opened == ["http://127.0.0.1:5/"]


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_long_step(
    presses: int, tiny_chat: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workers, done, begun = list[Worker](), threading.Event(), threading.Event()

    def application(play: Any, worker: Worker, port: int) -> str:
        workers.append(worker)
        return "application"

    def step() -> None:
        begun.set()
        done.wait(10)

    def interrupted(running: uvicorn.Server, sockets: Any) -> None:
        workers[0].call(step)
        assert begun.wait(10)
        raise KeyboardInterrupt

    def leave(status: int) -> None:
        raise SystemExit(status)

    def press_again(text: str, flush: bool) -> None:
        print(text)
        if presses == 2:
            raise KeyboardInterrupt

    for owner, name, value in (
        (server, "AT_ONCE", 0.01),
        (server, "PATIENCE", 0.05 if presses == 1 else 10),
        (server, "application", application),
        (uvicorn.Server, "run", interrupted),
        (os, "_exit", leave),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(server, "print", press_again, raising=False)
    with pytest.raises(SystemExit, match="130"):
        server.serve(command.playground(tiny_chat), 0, lambda address: None)
    assert "ending after the running step; Ctrl-C ends it at once" in capsys.readouterr().out
    assert begun.is_set()
    assert not done.is_set()
    done.set()


def test_a_sentence_says_what_is_wrong(tiny_chat: str, tmp_path: Path, adapter: Path) -> None:
    wrong = [
        ([str(tmp_path / "none")], r"none can't be opened from this disk: "),
        ([tiny_chat, str(tmp_path / "none.safetensors")], r"none\.safetensors"),
        ([tiny_chat, *[str(adapter)] * 9], r"8 adapters are on the page\n  remove one first"),
    ]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong.append(
            ([tiny_chat, "--port", port], rf"port {port} can't be taken: .*in use.*\n  name another with --port")
        )
        for given, words in wrong:
            done = CliRunner().invoke(app, ["play", *given, "--no-open"])
            assert done.exit_code == 2
            assert re.search(f"lora-lite: .*{words}", done.stderr), done.stderr
    assert reason(ModuleNotFoundError(name="starlette")) == "starlette is not installed; pip install 'lora-lite[play]'"


def test_a_model_that_is_not_on_this_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(ll.BaseModelError, match="someone/nothing can't be opened from this disk"):
        command.playground("someone/nothing")
