"""The server: the page's files, its requests as jobs, their events as lines of JSON; on loopback alone."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import BaseModelError, LoraLiteError
from .fields import MOST_TEXT, Fields, parse
from .fit import DIRECTIONS, METHODS, Recipe
from .generate import MOST_NEW_TOKENS
from .guard import TOO_LARGE, Guard, TooLargeError
from .jobs import BusyError, Event, Job, Priority, Steps, Worker, sentence
from .playground import MOST_COLUMNS, Playground
from .saving import SUFFIXES, saved

HOST = "127.0.0.1"
AT_ONCE, PATIENCE = 0.5, 30.0  # seconds for the running step at the end: before it is told of, and after that
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}

Handler = Callable[[Request], Awaitable[Response]]


def application(play: Playground, worker: Worker, port: int) -> Guard:
    """The ASGI application, behind its guard."""
    routes = [Route(path, _file(name)) for path, name in _files().items()]
    routes.append(Route("/api/state", _call(worker, lambda fields: play.state()), methods=["GET"]))
    streams: dict[str, tuple[Priority, Callable[[Fields], Steps]]] = {
        "write": (Priority.WRITE, lambda fields: _write(play, fields)),
        "sweep": (Priority.WRITE, lambda fields: _sweep(play, fields)),
        "fit": (Priority.FIT, lambda fields: _fit(play, fields)),
        "measure": (Priority.DAMAGE, lambda fields: _measure(play, fields)),
        "system": (Priority.DAMAGE, lambda fields: _system(play, fields)),
        "map": (Priority.MAP, lambda fields: _map(play, fields)),
    }
    for name, (priority, steps) in streams.items():
        routes.append(Route(f"/api/{name}", _stream(worker, priority, steps), methods=["POST"]))
    calls: dict[str, Callable[[Fields], Any]] = {
        "remove": lambda fields: _remove(play, fields),
        "rename": lambda fields: _rename(play, fields),
        "save": lambda fields: _save(play, fields),
    }
    for name, answer in calls.items():
        routes.append(Route(f"/api/{name}", _call(worker, answer), methods=["POST"]))
    handlers: dict[Any, Any] = {LoraLiteError: _refused, TooLargeError: _refused, Exception: _failed}
    handlers |= {404: _missing, 405: _missing}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), port)


def serve(play: Playground, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted; `ready` gets its address first.

    Raises:
        BaseModelError: where the port is taken.
    """
    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise BaseModelError(
            f"port {port} can't be taken: {error}\n  name another with --port; 0 is any free"
        ) from error
    worker, port = Worker(), listener.getsockname()[1]
    worker.start()
    try:
        ready(f"http://{HOST}:{port}/")
        app = application(play, worker, port)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                log_level="critical",  # errors are logged by `sentence`; a stream that Ctrl-C cuts off is none
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=1,
            )
        )
        server.run(sockets=[listener])
    finally:
        listener.close()
        _end(worker)


def _end(worker: Worker) -> None:
    """The end of the worker, or of the process, where the running step takes too long or Ctrl-C is pressed again."""
    try:
        has_ended = worker.stop(AT_ONCE)
        if not has_ended:
            print("ending after the running step; Ctrl-C ends it at once", flush=True)
            has_ended = worker.stop(PATIENCE)
    except KeyboardInterrupt:
        has_ended = False
    if not has_ended:
        os._exit(130)  # an interpreter that ends as usual under a thread in a forward aborts


# ---- what a request asks for ------------------------------------------------------------------------


def _options(fields: Fields) -> dict[str, Any]:
    return {
        "prompt": fields.text("prompt"),
        "seed": fields.whole("seed", 0, 2**31 - 1, 0),
        "temperature": fields.number("temperature", 0.0, 2.0, 0.0),
        "max_new_tokens": fields.whole("tokens", 1, MOST_NEW_TOKENS, 64),
    }


def _write(play: Playground, fields: Fields) -> Steps:
    scales, system, options = fields.scales(), fields.text("system", MOST_TEXT, empty=True).strip(), _options(fields)
    fields.end()
    return play.write(scales, system=system, **options)


def _sweep(play: Playground, fields: Fields) -> Steps:
    scales, name, cs = fields.scales(), fields.text("adapter", 20), fields.numbers("cs", MOST_COLUMNS)
    options = _options(fields)
    fields.end()
    return play.sweep(scales, name, cs, **options)


def _measure(play: Playground, fields: Fields) -> Steps:
    scales, target = fields.scales(), fields.number("budget", 0.001, 10.0, 0.1)
    fields.end()
    return play.measure(scales, target)


def _system(play: Playground, fields: Fields) -> Steps:
    system, name = fields.text("system").strip(), fields.text("adapter", 20, empty=True)
    fields.end()
    return play.system_prompt(system, name or None)


def _recipe(play: Playground, fields: Fields) -> Recipe:
    lines, method = fields.lines(), fields.choice("method", METHODS)
    direction = fields.choice("direction", DIRECTIONS)
    return Recipe(lines, method, direction, fields.whole("layer", 0, len(play.fitter.blocks) - 1))


def _fit(play: Playground, fields: Fields) -> Steps:
    recipe, label = _recipe(play, fields), fields.label("label")
    replaces = fields.text("replaces", 20, empty=True)
    fields.end()
    return play.fit(recipe, label, replaces or None)


def _map(play: Playground, fields: Fields) -> Steps:
    recipe, scales = _recipe(play, fields), fields.numbers("cs", 12)
    fields.end()
    return play.map(recipe, scales)


def _remove(play: Playground, fields: Fields) -> Event:
    name = fields.text("adapter", 20)
    fields.end()
    play.remove(name)
    return {"adapters": play.listed()}


def _rename(play: Playground, fields: Fields) -> Event:
    name, label = fields.text("adapter", 20), fields.label("label")
    fields.end()
    play.rename(name, label)
    return {"adapters": play.listed()}


def _save(play: Playground, fields: Fields) -> Response:
    entry, c = play.entry(fields.text("adapter", 20)), fields.number("c", -8.0, 8.0)
    format, rank = fields.choice("format", SUFFIXES), fields.whole_or_none("rank", 1, 1024)
    fields.end()
    name, contents = saved(play.model, entry.id, entry.label, c, format, rank)
    headers = {"content-disposition": f'attachment; filename="{name}"'}  # of plain letters, by `slug`
    return Response(contents, media_type="application/octet-stream", headers=headers)


# ---- how it is answered -----------------------------------------------------------------------------


def _files() -> dict[str, str]:
    """{path on the server: name in the package} of the page; no other path leads to a file."""
    names = (file.name for file in resources.files(__package__).joinpath("page").iterdir())
    return {"/" if name == "index.html" else f"/{name}": name for name in names if name.rpartition(".")[2] in TYPES}


def _file(name: str) -> Handler:
    contents = resources.files(__package__).joinpath("page", name).read_bytes()

    async def answer(request: Request) -> Response:
        return Response(contents, media_type=TYPES[name.rpartition(".")[2]])

    return answer


def _call(worker: Worker, function: Callable[[Fields], Any]) -> Handler:
    """A request that is answered at once, of one step on the worker's thread."""

    async def answer(request: Request) -> Response:
        fields = parse(await request.body()) if request.method == "POST" else Fields({})
        future: Future[Any] = worker.call(lambda: function(fields))
        result = await asyncio.wrap_future(future)
        return result if isinstance(result, Response) else JSONResponse(result)

    return answer


def _stream(worker: Worker, priority: Priority, steps_of: Callable[[Fields], Steps]) -> Handler:
    """A request that is answered by events, one JSON object a line, as they come."""

    async def answer(request: Request) -> Response:
        steps = steps_of(parse(await request.body()))
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

        def deliver(event: Event | None) -> None:
            with suppress(RuntimeError):  # the server has ended, and its loop with it
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(priority, steps, deliver)
        worker.submit(job)

        async def lines() -> AsyncIterator[str]:
            try:
                while (event := await events.get()) is not None:
                    yield json.dumps(event, allow_nan=False) + "\n"
            finally:
                job.cancel()  # the page has gone, or has all of it

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return answer


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, TooLargeError):
        return JSONResponse({"error": TOO_LARGE}, 413)
    return JSONResponse({"error": sentence(error)}, 503 if isinstance(error, BusyError) else 400)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": sentence(error)}, 500)


async def _missing(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "there is no such page on this server"}, getattr(error, "status_code", 404))
