"""The door of the server: who may ask, how, and how much; and what a browser is told of every answer.

Only pages of this very server talk to it. Another website that a browser on this machine has open can send requests to
127.0.0.1, too: its Origin betrays it, or, where it points its own name there (DNS rebinding), its Host.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .fields import MOST_BYTES

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


NAMES = ("127.0.0.1", "localhost")

TOO_LARGE = f"the request is larger than {MOST_BYTES >> 10} kB: write less"


class TooLargeError(Exception):
    """A body that is longer than it may be, whatever it has said."""


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        # Browsers leave the port out where it is http's own.
        self.hosts = {f"{name}{end}" for name in NAMES for end in ([f":{port}"] if port != 80 else [":80", ""])}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"no {scope['type']} is spoken")  # uvicorn is told to speak none

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if (problem := self._problem(scope)) is not None:
            status, text = problem
            await JSONResponse({"error": text}, status)(scope, receive, guarded)
            return
        await self.app(scope, _limited(receive), guarded)

    def _problem(self, scope: Scope) -> tuple[int, str] | None:
        """(status, sentence) for a request that is refused."""
        headers, method = Headers(scope=scope), scope["method"]
        if headers.getlist("host") != [headers.get("host", "")] or headers.get("host", "").lower() not in self.hosts:
            return 403, "this server answers to 127.0.0.1 and localhost only"
        origins = headers.getlist("origin")
        if any(origin.lower() not in {f"http://{host}" for host in self.hosts} for origin in origins):
            return 403, "this server answers its own page only"
        site = headers.get("sec-fetch-site", "none")
        # A link to the page, in a mail or on a website, may be followed: it does nothing before a click.
        is_visit = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        if site not in ("same-origin", "none") and not (is_visit and method == "GET" and scope["path"] == "/"):
            return 403, "this server answers its own page only"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "this server knows GET and POST"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "wanted application/json"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:12]) > MOST_BYTES:
            return 413, TOO_LARGE
        return None


def _limited(receive: Receive) -> Receive:
    """`receive` that counts the body, whatever its length was said to be."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MOST_BYTES:
            raise TooLargeError
        return message

    return limited
