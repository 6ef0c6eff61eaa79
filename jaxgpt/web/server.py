"""The server of all pages: a Starlette application behind a guard, open to this machine only unless told otherwise.

The guard (`Guard`, an ASGI middleware) blocks everything that a browser on this machine could be tricked into:

    Host           must be a name we serve under (Starlette's TrustedHost), which stops DNS rebinding
    Origin         calls that change something must come from our own page, as JSON
    token          anywhere but on 127.0.0.1 every call must carry one; the page takes it from its address's fragment,
                   which browsers never send, and sends it as a header, which no other site can
    body, rate     64 KiB and 10 s per request; a limited number of calls per second from one address
    headers        a policy under which only our own files run; no sniffing, framing or caching

Files are read into memory when the program starts: no request names a path.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import os
import platform
import secrets
import socket
import time
import webbrowser
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from jaxgpt.config import Range, check_settings
from jaxgpt.errors import UserError, needs_extra
from jaxgpt.runs.endings import Stopped

with needs_extra("web"):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import BaseRoute, Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_BODY_BYTES = 64 * 1024  # maximum bytes of a request
BODY_TIMEOUT = 10.0  # seconds for a request's body; twice that for a connection's first request
CALLS_PER_SECOND, BURST = 100.0, 300.0  # calls per second from one address, and how many at once
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Where the page is served. Anywhere but on this machine it requires a token (generated if not given)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Range(0, 65535)] = 8000  # 0: any free one
    names: tuple[str, ...] = ()  # further host names to serve under, such as "lab-pc.local"
    token: str = ""

    def __post_init__(self) -> None:
        check_settings(self)

    def required_token(self) -> str:
        """The token that calls must carry, or '' for none."""
        return self.token or ("" if self.host in LOCAL else secrets.token_urlsafe(24))


class RequestRefused(Exception):  # noqa: N818  a response, not an error of ours
    """A request that is answered with a status and a message instead of a result."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """See the module's docstring. `names`: host names without ports; `token`: '' for none."""

    def __init__(self, app: ASGIApp, names: frozenset[str], token: str) -> None:
        self.app, self.names, self.token = app, sorted(names), token
        self._calls: dict[str, tuple[float, float]] = {}  # address: (calls left, at what time)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is allowed; answer everything else with a status and a message."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # no websockets: nothing answers them
        trusted = False

        async def serve_if_allowed(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal trusted
            trusted = True
            await self._serve(scope, receive, send)

        async def send_if_trusted(message: Message) -> None:
            if trusted:  # otherwise our refusal, below, says more than Starlette's
                await send(message)

        await TrustedHostMiddleware(serve_if_allowed, self.names, www_redirect=False)(scope, receive, send_if_trusted)
        if not trusted:
            refusal = {"error": "this page isn't served under that host name; --serve.names adds one"}
            await JSONResponse(refusal, 400)(scope, receive, _with_headers(send))

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            body = await asyncio.wait_for(_read(receive), BODY_TIMEOUT)
        except RequestRefused as refusal:
            response = JSONResponse({"error": str(refusal)}, refusal.status)
            await response(scope, receive, _with_headers(send))
            return
        except TimeoutError:
            await JSONResponse({"error": "the request took too long"}, 408)(scope, receive, _with_headers(send))
            return
        sent = False

        async def once() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, once, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if not self._allow(scope["client"][0] if scope.get("client") else ""):
            raise RequestRefused(429, "too many calls; wait a second")
        if not scope["path"].startswith("/api/"):
            if scope["method"] not in ("GET", "HEAD"):
                raise RequestRefused(405, "only GET is allowed here")
            return
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            raise RequestRefused(403, "calls must come from this page")
        if scope["method"] != "GET":
            origin = headers.get("origin", "")
            if urlsplit(origin).netloc != headers.get("host") or urlsplit(origin).scheme not in ("http", "https"):
                raise RequestRefused(403, "calls must come from this page")
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise RequestRefused(415, "send application/json")
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.token and not hmac.compare_digest(given.encode(), self.token.encode()):
            raise RequestRefused(401, "open the page at the full address that was printed, token included")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY_BYTES:
            raise RequestRefused(413, f"a request may have at most {MAX_BODY_BYTES // 1024} KiB")

    def _allow(self, address: str) -> bool:
        """Whether this address may make another call: a token bucket of BURST, refilled at RATE."""
        now = time.monotonic()
        left, when = self._calls.get(address, (BURST, now))
        left = min(BURST, left + (now - when) * CALLS_PER_SECOND)
        if len(self._calls) > 10_000:
            self._calls.clear()
        self._calls[address] = (max(left - 1, 0.0), now)
        return left >= 1


async def _read(receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestRefused(400, "the client disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise RequestRefused(413, f"a request may have at most {MAX_BODY_BYTES // 1024} KiB")
        if not message.get("more_body"):
            return b"".join(parts)


def _with_headers(send: Send) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sender


# ---- an application ----

Call = Callable[[dict[str, Any]], Awaitable[Any]]


def application(
    page: str, calls: Mapping[str, Call], config: ServeConfig, token: str, more: tuple[BaseRoute, ...] = ()
) -> Guard:
    """The page (static/PAGE.html, .js, and style.css) and its calls: POST /api/NAME with a JSON object, answered with
    what the function returns; a UserError or Refused becomes a status with a message."""
    folder = importlib.resources.files("jaxgpt.web") / "static"
    routes: list[BaseRoute] = [*more]
    for name in (f"{page}.html", f"{page}.js", "shared.js", "style.css", "icon.svg"):
        content = (folder / name).read_bytes()
        kind = TYPES[name[name.rindex(".") :]]
        routes.append(Route("/" if name.endswith(".html") else f"/{name}", _serve_file(content, kind)))
    routes += [Route(f"/api/{name}", _handle_call(call), methods=["POST"]) for name, call in calls.items()]
    names = {config.host, *config.names}
    names |= {*LOCAL} if config.host in (*LOCAL, "0.0.0.0", "::") else set()
    if config.host in ("0.0.0.0", "::"):
        names |= {socket.gethostname().lower(), network_address()}
    return Guard(Starlette(routes=routes), frozenset(name.lower() for name in names), token)


def _serve_file(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send


async def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object."""

    def no(constant: str) -> None:
        raise ValueError(constant)

    try:
        data = json.loads(await request.body(), parse_constant=no)
    except (ValueError, RecursionError):
        raise RequestRefused(400, "the request isn't JSON") from None
    if not isinstance(data, dict):
        raise RequestRefused(400, "send a JSON object")
    return data


def _handle_call(function: Call) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await function(await read_json(request)))
        except RequestRefused as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    return answer


def require_field(data: Mapping[str, Any], name: str, kind: Any, default: Any = ...) -> Any:
    """data[name], or Refused if it lacks this type (a bool is not a number) or is missing without a default."""
    value = data.get(name, default)
    if value is ...:
        raise RequestRefused(400, f"field {name!r} is missing")
    if value is default and name not in data:
        return value
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestRefused(400, f"field {name!r} has the wrong type")
    return value


# ---- serving ----


class _Connection(H11Protocol):
    """Closes a connection that sends no request, so that nobody can use up all connections."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(2 * BODY_TIMEOUT, self._close_if_silent)

    def _close_if_silent(self) -> None:
        silent: Any = self.cycle is None
        if silent and not self.transport.is_closing():
            self.transport.close()


class Server:
    """A bound socket and its address; `run` serves until Ctrl-C, SIGTERM or `stop`, which may come first."""

    def __init__(self, config: ServeConfig, token: str) -> None:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((config.host, config.port))
            self._socket.listen(1024)  # from here on, early clients wait instead of being refused
        except OSError as error:
            self._socket.close()
            raise UserError(
                f"can't serve on {config.host}:{config.port} ({error.strerror}); choose another --serve.port, or 0"
            ) from error
        self.port = self._socket.getsockname()[1]
        host = config.host if config.host not in ("0.0.0.0", "::") else network_address()
        host = f"[{host}]" if ":" in host else host
        self.address = f"http://{host}:{self.port}/" + (f"#token={token}" if token else "")
        settings = uvicorn.Config(  # not in `run`: its thread must not add loggers while another iterates over them
            "",
            http=_Connection,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=20,
            timeout_graceful_shutdown=2,
            server_header=False,
            date_header=False,
        )
        self._server = uvicorn.Server(settings)

    def run(self, app: ASGIApp) -> None:
        """Serve until Ctrl-C, SIGTERM or `stop`."""
        self._server.config.app = app
        with contextlib.suppress(KeyboardInterrupt, Stopped):  # uvicorn raises the signal again once it has shut down
            self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """End `run`, now or as soon as it starts."""
        self._server.should_exit = True


def network_address() -> str:
    """The address of this machine as others on its network see it. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def open_page(address: str) -> None:
    """Open the page in this desktop's browser, if there is one."""
    desktop = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if desktop or platform.system() in ("Darwin", "Windows"):
        webbrowser.open(address)
