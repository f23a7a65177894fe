"""The server: what it answers, what it refuses, and to whom; with fifty requests together."""

import asyncio
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playing import LINES, playground
from safetensors.torch import load_file
from serving import Running, endless
from starlette.testclient import TestClient

import lora_lite as ll
from lora_lite.play import jobs, server
from lora_lite.play.fields import MOST_BYTES
from lora_lite.play.jobs import Worker
from lora_lite.play.saving import slug
from lora_lite.play.server import application

PORT = 8421
RECIPE = {
    "positive": LINES.positive,
    "negative": LINES.negative,
    "method": "steer",
    "direction": "difference",
    "layer": 1,
}
FIT = RECIPE | {"label": "Mine", "replaces": ""}
WRITE = {"prompt": "Tell me about the sea.", "scales": {}, "tokens": 4}


@pytest.fixture(scope="module")
def play(tiny_chat: str) -> Any:
    return playground(tiny_chat)


@pytest.fixture(scope="module")
def client(play: Any) -> Iterator[TestClient]:
    worker = Worker()
    worker.start()
    yield TestClient(application(play, worker, PORT), f"http://127.0.0.1:{PORT}", raise_server_exceptions=False)
    worker.stop()


def events(response: Any) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def fit(client: TestClient, **changes: Any) -> str:
    return str(events(client.post("/api/fit", json=FIT | changes))[-1]["id"])


def refused(response: Any, status: int, words: str) -> None:
    assert (response.status_code, words in response.json()["error"]) == (status, True), response.text


# ---- what it answers --------------------------------------------------------------------------------


def test_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    files = [path for path in server._files() if path != "/"]
    assert {f"/{name}" for name in ("page.css", "main.js", "base.js", "write.js", "adapters.js", "fit.js")} == set(
        files
    )
    sizes = [len(page.content)]
    for path in files:
        answer = client.get(path)
        assert answer.headers["content-type"].startswith("text/css" if path.endswith("css") else "text/javascript")
        sizes.append(len(answer.content))
        assert b"http" not in answer.content.replace(b"https?", b"")  # no request leaves the machine
    assert b"http" not in page.content
    assert sum(sizes) < 300_000


def test_a_fit_is_written_with_measured_and_saved(
    client: TestClient, play: Any, tiny_chat: str, tmp_path: Path
) -> None:
    assert client.get("/api/state").json()["adapters"] == []
    name = fit(client)
    (listed,) = client.get("/api/state").json()["adapters"]
    assert (listed["label"], listed["layer"], listed["says"]) == ("Mine", 1, "steer, block 1")
    written = events(client.post("/api/write", json=WRITE | {"scales": {name: 1.0}, "system": "Be brief."}))
    assert [event["kind"] for event in written] == ["prompt", *["tokens"] * 4, "end"]
    assert [token[0] for token in written[1]["tokens"]] == ["base", "adapted", "system"]
    swept = events(client.post("/api/sweep", json=WRITE | {"adapter": name, "cs": [-1, 0, 1]}))
    assert set(swept[-1]["columns"]) == {"0", "1", "2"}
    measured = events(client.post("/api/measure", json={"scales": {name: 0.5}, "budget": 0.05}))
    assert measured[0]["kl"] > 0
    assert events(client.post("/api/system", json={"system": "Be brief.", "adapter": name}))[-1]["kl"] > 0
    cells = events(client.post("/api/map", json=RECIPE | {"cs": [0.5]}))
    assert [cell["layer"] for cell in cells[:-1]] == [1, 0]
    for format, ending in (("lora-lite", ".safetensors"), ("gguf-control-vector", ".gguf")):
        saved = client.post("/api/save", json={"adapter": name, "c": 0.5, "format": format})
        assert saved.headers["content-disposition"] == f'attachment; filename="mine{ending}"'
        (file := tmp_path / f"mine{ending}").write_bytes(saved.content)
        model = ll.load_base(tiny_chat, "float32")
        adapter = ll.load(model, file)
        if format == "lora-lite":
            assert adapter.scale == 0.5
        assert len(load_file(file)) == 3 if ending == ".safetensors" else adapter.variant == "steer"
    refused(client.post("/api/save", json={"adapter": name, "c": 0.5, "format": "gguf"}), 400, "can't hold 'steer'")
    assert ll.adapters(play.model)[name].scale == 0.0
    no = client.post("/api/save", json={"adapter": name, "c": 0.5, "format": "peft"})
    refused(no, 400, "'Mine' has a scale, which PEFT can't hold")
    renamed = client.post("/api/rename", json={"adapter": name, "label": "Ünder né"}).json()
    assert renamed["adapters"][0]["label"] == "Ünder né"
    assert client.post("/api/remove", json={"adapter": name}).json() == {"adapters": []}


def test_an_ablation_goes_as_a_peft_folder(client: TestClient, tiny_chat: str, tmp_path: Path) -> None:
    name = fit(client, method="abliteration")
    saved = client.post("/api/save", json={"adapter": name, "c": 0.5, "format": "peft", "rank": 1})
    with zipfile.ZipFile(io.BytesIO(saved.content)) as archive:
        assert sorted(archive.namelist()) == ["mine/adapter_config.json", "mine/adapter_model.safetensors"]
        archive.extractall(tmp_path)
    assert ll.load_peft(ll.load_base(tiny_chat, "float32"), tmp_path / "mine").variant == "lora"
    client.post("/api/remove", json={"adapter": name})


def test_names_of_files_are_plain() -> None:
    assert slug("French / English") == "french-english"
    assert slug('../../x"; y\n') == "x-y"
    assert slug("Ünder né") == "under-ne"
    assert slug("日本") == "adapter"


def test_an_error_in_the_middle_is_an_event(client: TestClient) -> None:
    answer = client.post("/api/write", json=WRITE | {"tokens": 200})
    (event,) = events(answer)
    assert event["kind"] == "error"
    assert "write a shorter prompt" in event["text"]


# ---- what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"host": "evil.example"}, "127.0.0.1 and localhost only"),
        ({"host": "evil.example:8421"}, "127.0.0.1 and localhost only"),  # DNS rebinding
        ({"host": "127.0.0.1"}, "127.0.0.1 and localhost only"),
        ({"host": "127.0.0.1:9"}, "127.0.0.1 and localhost only"),
        ({"host": "127.0.0.1.evil.example:8421"}, "127.0.0.1 and localhost only"),
        ({"host": "[::1]:8421"}, "127.0.0.1 and localhost only"),  # it doesn't listen there
        ({"host": ""}, "127.0.0.1 and localhost only"),
        ({"origin": "http://evil.example"}, "its own page only"),
        ({"origin": "null"}, "its own page only"),
        ({"origin": "http://127.0.0.1:9"}, "its own page only"),
        ({"origin": "https://127.0.0.1:8421"}, "its own page only"),
        ({"sec-fetch-site": "cross-site"}, "its own page only"),
        ({"sec-fetch-site": "same-site"}, "its own page only"),
        (
            {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
            "its own page only",
        ),
    ],
)
def test_foreign_hosts_and_origins(headers: dict[str, str], words: str, client: TestClient) -> None:
    for answer in (client.get("/api/state", headers=headers), client.post("/api/write", json=WRITE, headers=headers)):
        refused(answer, 403, words)
    refused(client.get("/", headers=headers), 403, words)


def test_the_page_itself_may_ask_and_a_link_may_lead_to_it(client: TestClient) -> None:
    for name in ("127.0.0.1", "localhost"):
        own = {"host": f"{name}:{PORT}", "origin": f"http://{name}:{PORT}", "sec-fetch-site": "same-origin"}
        assert client.get("/api/state", headers=own).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert client.get("/", headers=link).status_code == 200
    refused(client.get("/api/state", headers=link), 403, "its own page only")
    refused(client.post("/", headers=link), 403, "its own page only")


def test_browsers_leave_the_port_of_http_out(play: Any) -> None:
    client = TestClient(application(play, Worker(), 80), "http://localhost")
    for host in ("localhost", "127.0.0.1", "localhost:80"):
        own = {"host": host, "origin": f"http://{host}"}
        assert client.get("/", headers=own).status_code == 200
    refused(client.get("/", headers={"host": "evil.example"}), 403, "127.0.0.1 and localhost only")
    refused(client.get("/", headers={"origin": "http://localhost:8421"}), 403, "its own page only")


def test_a_form_of_another_site_can_not_post(client: TestClient) -> None:
    body = json.dumps(WRITE)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        refused(client.post("/api/write", content=body, headers={"content-type": kind}), 415, "application/json")
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        refused(client.request(method, "/api/write"), 405, "GET and POST")
    refused(client.get("/api/write"), 405, "no such page")
    refused(client.post("/api/state", json={}), 405, "no such page")


def test_every_answer_says_how_it_may_be_used(client: TestClient) -> None:
    answers = [client.get("/"), client.get("/api/state"), client.get("/none"), client.post("/api/write", json={})]
    answers += [client.post("/api/write", json=WRITE), client.get("/", headers={"host": "evil.example"})]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in answer.headers if name.startswith("access-control")]


WRONG: list[tuple[str, Any, str]] = [
    ("write", b"{", "not JSON"),
    ("write", b"\xff\xfe", "not JSON"),
    ("write", b"[" * 100_000, "not JSON"),
    ("write", b"[1]", "is a list: wanted an object"),
    ("write", b'{"prompt": NaN}', "not JSON"),
    ("write", b'{"prompt": "a", "temperature": Infinity}', "not JSON"),
    ("write", b'{"prompt": "a", "temperature": 1e999}', "temperature: wanted a number from 0 to 2"),
    ("write", b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ("write", b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", "temperature: wanted a number"),
    ("write", b'{"prompt": "\\ud800"}', "a character of it is broken"),
    ("write", {}, "prompt is empty\n  write something there"),
    ("write", {"prompt": " \n"}, "prompt is empty"),
    ("write", {"prompt": 3}, "prompt: wanted a text"),
    ("write", {"prompt": "a" * 4001}, "at most 4000 characters"),
    ("write", WRITE | {"tokens": 10**9}, "tokens: wanted a whole number from 1 to 256"),
    ("write", WRITE | {"tokens": 0}, "tokens: wanted a whole number"),
    ("write", WRITE | {"tokens": True}, "tokens: wanted a whole number"),
    ("write", WRITE | {"tokens": 1.5}, "tokens: wanted a whole number"),
    ("write", WRITE | {"seed": -1}, "seed: wanted a whole number"),
    ("write", WRITE | {"temperature": "1"}, "temperature: wanted a number"),
    ("write", WRITE | {"temperature": True}, "temperature: wanted a number"),
    ("write", WRITE | {"scales": {"a99": "x"}}, "c: wanted a number from -8 to 8"),
    ("write", WRITE | {"scales": {"a99": 9}}, "c: wanted a number from -8 to 8"),
    ("write", WRITE | {"scales": [1]}, "scales: wanted the scale of each adapter"),
    ("write", WRITE | {"scales": {str(i): 0 for i in range(9)}}, "scales: wanted the scale of each adapter"),
    ("write", WRITE | {"path": "/etc/passwd"}, "a field 'path', which is not known"),
    ("sweep", WRITE | {"adapter": "a99", "cs": []}, "cs: wanted 1 to 9 numbers"),
    ("sweep", WRITE | {"adapter": "a99", "cs": [0] * 10}, "cs: wanted 1 to 9 numbers"),
    ("sweep", WRITE | {"adapter": "a99", "cs": [None]}, "cs: wanted a number from -8 to 8"),
    ("measure", {"scales": {}, "budget": 0}, "budget: wanted a number from 0.001 to 10"),
    ("fit", FIT | {"positive": ["one"]}, "the positive list has 1 sentences: wanted 2 to 200"),
    ("fit", FIT | {"negative": "x"}, "the negative list has 0 sentences"),
    ("fit", FIT | {"negative": ["x"] * 201}, "has 201 sentences: wanted 2 to 200"),
    ("fit", FIT | {"negative": ["x", "y" * 501]}, "a negative sentence: wanted a text of at most 500"),
    ("fit", FIT | {"negative": ["x", {}]}, "a negative sentence: wanted a text"),
    ("fit", FIT | {"method": "full"}, "method: wanted one of steer, abliteration"),
    ("fit", FIT | {"direction": ["pca"]}, "direction: wanted one of difference, pca"),
    ("fit", FIT | {"layer": 2}, "layer: wanted a whole number from 0 to 1"),
    ("fit", FIT | {"label": "a\nb"}, "label: wanted some letters, in one line"),
    ("fit", FIT | {"label": "a" * 41}, "label: wanted a text of at most 40"),
    ("remove", {"adapter": "../../x"}, "not on the page any more"),
    ("rename", {"adapter": "a99", "label": "x"}, "not on the page any more"),
    ("save", {"adapter": "a99", "c": 1, "format": "peft"}, "not on the page any more"),
]


@pytest.mark.parametrize(("name", "body", "words"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_a_body_may_not_be(name: str, body: Any, words: str, client: TestClient) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post(f"/api/{name}", content=content, headers={"content-type": "application/json"})
    refused(answer, 400, words)


def test_formats_and_ranks_are_checked(client: TestClient) -> None:
    name = fit(client)
    for changes, words in (
        ({"format": "../x"}, "format: wanted one of lora-lite"),
        ({"rank": 0}, "rank: wanted a whole number from 1"),
        ({"c": None}, "c: wanted a number from -8 to 8"),
        ({"rank": 4}, "leave rank and energy out"),
    ):
        refused(client.post("/api/save", json={"adapter": name, "c": 1, "format": "lora-lite"} | changes), 400, words)
    client.post("/api/remove", json={"adapter": name})


def test_a_body_that_is_too_large(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MOST_BYTES // 1000 + 2):
            yield b" " * 1000

    headers = {"content-type": "application/json"}
    refused(client.post("/api/write", content=b" " * (MOST_BYTES + 1), headers=headers), 413, "larger than 256 kB")
    refused(client.post("/api/write", content=chunks(), headers=headers), 413, "larger than 256 kB")
    wrong = client.post("/api/write", content=b"{}", headers=headers | {"content-length": "-5"})
    refused(wrong, 413, "larger than 256 kB")


def test_too_many_are_told_to_wait(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MOST_JOBS", 0)
    for answer in (client.post("/api/write", json=WRITE), client.get("/api/state")):
        refused(answer, 503, "requests are under way on this machine\n  wait a moment and try again")


def test_a_mistake_of_the_server_tells_nothing(client: TestClient, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play, "state", lambda: 1 / 0)
    refused(client.get("/api/state"), 500, "the server made a mistake: ZeroDivisionError\n  its terminal shows where")


# ---- a real server ----------------------------------------------------------------------------------


@pytest.fixture
def running(play: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    running = Running(play, monkeypatch)
    yield running
    running.stop()


def test_it_listens_on_loopback_alone(running: Running, play: Any) -> None:
    addresses = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1", "127.0.1.1"}:
        with pytest.raises(OSError, match=r"refused|unreachable|timed out"):
            socket.create_connection((address, running.port), timeout=2)
    with pytest.raises(ll.BaseModelError, match=r"can't be taken.*\n  name another with --port; 0 is any free"):
        server.serve(play, running.port, print)


def test_no_path_leads_to_another_file(running: Running) -> None:
    paths = rb"""/../pyproject.toml /..%2f..%2fcommand.py /page/../../server.py /%2e%2e/%2e%2e/etc/passwd //etc/passwd
    /..\..\x /presets.json /neutral.json /__init__.py /index.html /page.css%00.js /page/main.js /page.css/../main.js"""
    for path in paths.split():
        answer = running.raw(b"GET " + path + b" HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % running.port)
        assert answer.startswith(b"HTTP/1.1 404"), (path, answer[:200])
        assert b"there is no such page" in answer


def test_bytes_that_no_browser_sends(running: Running) -> None:
    host = f"127.0.0.1:{running.port}".encode()
    for request, status in (
        (b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nHost: evil.example\r\n\r\n", b"400|403"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400|403"),
        (b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"403"),
        (b"GET /../../../etc/passwd HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", b"404"),
        (b"POST /api/write HTTP/1.1\r\nHost: " + host + b"\r\nContent-Type: application/json\r\n"
         b"Content-Length: 99999999999999999999\r\n\r\n", b"413|400"),
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n", b"400|431|000"),
    ):  # fmt: skip
        answer = running.raw(request)
        assert answer.split(b" ")[1] in status.split(b"|"), (request[:60], answer[:200])
        assert b"root:" not in answer
    assert httpx.get(running.address).status_code == 200


def test_a_client_that_goes_ends_its_job(running: Running, play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()
    monkeypatch.setattr(play, "write", lambda *given, **options: endless(closed))
    with httpx.stream("POST", f"{running.address}api/write", json=WRITE) as answer:
        next(answer.iter_lines())
        assert not closed.is_set()
    assert closed.wait(10)
    assert httpx.get(f"{running.address}api/state").status_code == 200


def test_fifty_requests_together(running: Running) -> None:
    """Each streams to its end, with the text that it has alone; what comes after the 64th is told to wait."""
    url = f"{running.address}api/write"

    async def write(client: httpx.AsyncClient, seed: int) -> tuple[int, list[str]]:
        answer = await client.post(url, json=WRITE | {"seed": seed, "temperature": 1.0})
        lines = [json.loads(line) for line in answer.text.splitlines()]
        return answer.status_code, [str(line.get("tokens")) for line in lines if line.get("kind") == "tokens"]

    async def together(count: int) -> list[tuple[int, list[str]]]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            return await asyncio.gather(*(write(client, seed % 50) for seed in range(count)))

    started = time.perf_counter()
    answers = asyncio.run(together(50))
    print(f"\n50 requests of 4 tokens on a tiny model: {time.perf_counter() - started:.1f} s", end="")
    assert {status for status, _ in answers} == {200}
    assert all(len(tokens) == 4 for _, tokens in answers)
    alone = json.loads(httpx.post(url, json=WRITE | {"seed": 7, "temperature": 1.0}, timeout=60).text.splitlines()[1])
    assert answers[7][1][0] == str(alone["tokens"])
    statuses = {status for status, _ in asyncio.run(together(90))}
    assert statuses <= {200, 503}
    assert httpx.get(running.address).status_code == 200
