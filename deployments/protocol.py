"""The endpoints: HTTP and WebSocket to the batcher and back, as one raw ASGI application.

    POST /v2/models/{model}[/versions/{v}]/infer    one message in, one out
    GET  /v2/models/{model}[/versions/{v}]/stream   WebSocket: many, answered as they finish
    GET  /v2/models/{model}[/versions/{v}][/ready | /config]  metadata, readiness
    GET  /v2, /v2/health/live, /v2/health/ready, /v2/stats; POST /v2/repository/index

Every fault has its row in the table of docs/wire.md and leaves the connection and all other
requests untouched. Where the application has tokens, they are checked before anything else of a
request is looked at.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

from datamix import wire
from datamix.errors import (
    DataMixError,
    NotAllowed,
    NotFound,
    TooLarge,
    Unauthorized,
    Unavailable,
    Unsupported,
    WireError,
)
from deployments import oip
from deployments.admission import Admission, Route, encode, presentable
from deployments.exchange import Exchange
from deployments.model import ServedModel
from deployments.waiting import Computed
from deployments.websocket import EXTENSION, Messages

if TYPE_CHECKING:
    from deployments.backbone import Backbone

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

logger = logging.getLogger(__name__)

_ROUTE = re.compile(
    r"/v2/models/(?P<model>[^/]+)(/versions/(?P<version>[^/]+))?"
    r"(/(?P<action>infer|stream|ready|config))?/?"
)

# Load balancers ask these, and have no token.
_OPEN = frozenset({"/v2/health/live", "/v2/health/ready"})


class Answer(NamedTuple):
    """The body of a good HTTP answer, its content type and further headers."""

    body: bytes
    media: str
    extra: tuple[tuple[bytes, bytes], ...] = ()


# Makes the answer of what a model computed.
Finish = Callable[[ServedModel, Computed], Answer]


class Protocol:
    """The ASGI application of one replica."""

    def __init__(self, backbone: Backbone) -> None:
        """Serve ``backbone``."""
        self._backbone = backbone
        self._limits = backbone.config
        self._admission = Admission(backbone)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispatch one connection or request."""
        if prefix := scope.get("root_path"):
            # Serve leaves the route prefix of the application in the path.
            scope = {**scope, "path": scope["path"].removeprefix(prefix)}
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Start at once; stop when the backbone has drained."""
        await receive()  # lifespan.startup
        await send({"type": "lifespan.startup.complete"})
        await receive()  # lifespan.shutdown
        try:
            await self._backbone.close()
        except Unavailable as error:
            await send({"type": "lifespan.shutdown.failed", "message": str(error)})
        else:
            await send({"type": "lifespan.shutdown.complete"})

    # --- HTTP ---

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            path = scope["path"]
            if scope["method"] != "GET" or path not in _OPEN:
                self._authorise(scope)
            if scope["method"] == "POST":
                if path == "/v2/repository/index":
                    await self._index(scope, receive, send)
                    return
                route = self._route(path)
                if route.action != "infer":
                    raise NotFound(f"nothing is to be posted at {path[:200]!r}")
                await self._infer(route, scope, receive, send)
            elif scope["method"] == "GET":
                body = json.dumps(self._describe(path)).encode()
                await _reply(send, 200, "application/json", body)
            else:
                raise NotAllowed(f"method is {scope['method']}, expected GET or POST")
        except Exception as fault:
            error = presentable(fault)
            if scope["method"] == "POST" or isinstance(error, Unauthorized):
                self._admission.count(None, error)
            await _reply_error(send, error)

    async def _infer(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        # Until the message is read, which may name another version.
        model = self._backbone.catalog.find(route.model, route.version)
        request_id = ""
        try:
            request, answer = await self._read(scope, receive)
            request_id = request.request_id
            model = self._admission.find(route, request)
            body, media, extra = answer(model, await self._compute(model, request))
        except Exception as fault:
            error = presentable(fault)
            self._admission.count(model, error, request_id)
            await _reply_error(send, error)
            return
        self._admission.count(model, body)
        self._backbone.traffic.sent_bytes += len(body)
        await _reply(send, 200, media, body, extra=extra)

    async def _read(self, scope: Scope, receive: Receive) -> tuple[wire.Request, Finish]:
        """Read one request in whichever protocol it came, and how it is to be answered."""
        media = _header(scope, b"content-type")
        kind = media.partition(";")[0].strip().lower()
        if kind == wire.MEDIA_TYPE:
            return self._read_arrow(await self._body(scope, receive))
        if kind in ("", *oip.MEDIA_TYPES) or _header(scope, oip.LENGTH_HEADER):
            # NVIDIA's tritonclient names no content type.
            return await self._read_oip(scope, receive)
        raise Unsupported(
            f"content type is {media[:100]!r}, expected {wire.MEDIA_TYPE!r} or one of "
            f"{', '.join(oip.MEDIA_TYPES)}"
        )

    def _read_arrow(self, body: bytes) -> tuple[wire.Request, Finish]:
        request = self._admission.decode(body)

        def answer(model: ServedModel, computed: Computed) -> Answer:
            parts = encode(model, request, computed)
            if isinstance(parts, DataMixError):
                raise parts
            return Answer(b"".join(parts), wire.MEDIA_TYPE)

        return request, answer

    async def _read_oip(self, scope: Scope, receive: Receive) -> tuple[wire.Request, Finish]:
        encoding = _header(scope, b"content-encoding")
        if encoding.lower() not in ("", "identity"):
            raise Unsupported(f"content encoding is {encoding[:100]!r}, expected none")
        body = await self._body(scope, receive)
        self._backbone.traffic.received_bytes += len(body)
        length = _header(scope, oip.LENGTH_HEADER)
        request = oip.decode_request(body, length, max_rows=self._limits.max_request_rows)

        def answer(model: ServedModel, computed: Computed) -> Answer:
            found = oip.encode_response(request, computed, model=model.name, version=model.version)
            if found.json_length is None:
                return Answer(found.body, "application/json")
            extra = ((oip.LENGTH_HEADER, str(found.json_length).encode()),)
            return Answer(found.body, "application/octet-stream", extra)

        return request.wire, answer

    async def _compute(self, model: ServedModel, request: wire.Request) -> Computed:
        """Queue a request and wait for its batch; whoever stops waiting cancels it."""
        answer: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()

        def done(outcome: Computed | DataMixError) -> None:
            if answer.done():
                return  # the client went away while the batch was computed
            if isinstance(outcome, DataMixError):
                answer.set_exception(outcome)
            else:
                answer.set_result(outcome)

        job = self._admission.admit(model, request, done)
        try:
            return await answer
        finally:
            job.cancelled = True  # answered, or nobody waits any more

    async def _index(self, scope: Scope, receive: Receive, send: Send) -> None:
        backbone = self._backbone
        idle = "" if backbone.ready else "the replica is not ready"
        models = [
            (row["name"], row["version"], row["reason"] or idle)
            for row in backbone.catalog.status()
        ]
        index = oip.repository_index(models, await self._body(scope, receive))
        await _reply(send, 200, "application/json", json.dumps(index).encode())

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._limits.max_request_bytes
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared) > limit:
            raise TooLarge(f"body has {int(declared)} bytes, expected at most {limit}")
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise WireError("the connection closed before the whole body had come")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise TooLarge(f"body has more than {limit} bytes, the most that is accepted")
            if not message.get("more_body"):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _describe(self, path: str) -> dict[str, Any]:
        """Answer a GET."""
        backbone = self._backbone
        if path.rstrip("/") == "/v2":
            return backbone.server_metadata()
        if path == "/v2/health/live":
            return {"live": True}
        if path == "/v2/health/ready":
            if not backbone.ready:
                raise Unavailable("the replica is not ready")
            return {"ready": True}
        if path == "/v2/stats":
            return backbone.stats()
        route = self._route(path)
        model = backbone.catalog.find(route.model, route.version)
        if route.action == "":
            return model.metadata(backbone.catalog.versions(model.name))
        if route.action == "ready":
            if not backbone.ready:
                raise Unavailable(f"model {route.model!r} is not ready")
            return {"name": route.model, "ready": True}
        if route.action == "config":
            return oip.model_config(model.name, model.engine.blocks, self._limits.max_request_rows)
        raise NotFound(f"nothing is to be read at {path[:200]!r}")

    # --- WebSocket ---

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        try:
            token = self._authorise(scope)
            route = self._route(scope["path"])
            if route.action != "stream":
                raise NotFound(f"no stream is at {scope['path'][:200]!r}")
            self._backbone.catalog.find(route.model, route.version)
            messages: Messages | None = scope["extensions"].get(EXTENSION)
            if messages is None:
                # Through Serve's own proxy, to which HAProxy turns while it knows no replica.
                raise Unavailable("no replica takes streams at the moment, try again")
        except DataMixError as error:
            if isinstance(error, Unauthorized):
                self._admission.count(None, error)
            await _reply_error(send, error, kind="websocket.http.response")
            return
        streams = self._backbone.streams
        stream = streams.open(messages, token)
        Exchange(self._admission, route, stream)
        try:
            await send({"type": "websocket.accept"})
            await receive()  # websocket.disconnect; messages come by the other way
        finally:
            streams.close(stream)

    # --- both ---

    def _authorise(self, scope: Scope) -> bytes | None:
        """Refuse who has no token; return its digest, or None where none is needed."""
        tokens = self._backbone.tokens
        if tokens is None:
            return None
        return tokens.check(next((v for k, v in scope["headers"] if k == b"authorization"), b""))

    def _route(self, path: str) -> Route:
        """Read a path."""
        match = _ROUTE.fullmatch(path)
        if match is None:
            raise NotFound(f"nothing is at {path[:200]!r}")
        return Route(match["model"], match["version"], match["action"] or "")


def _header(scope: Scope, name: bytes) -> str:
    value: bytes = next((v for k, v in scope["headers"] if k == name), b"")
    return value.decode("latin-1")


async def _reply(
    send: Send,
    status: int,
    media: str,
    body: bytes,
    *,
    extra: tuple[tuple[bytes, bytes], ...] = (),
    kind: str = "http.response",
) -> None:
    headers = [
        (b"content-type", media.encode()),
        (b"content-length", str(len(body)).encode()),
        *extra,
    ]
    await send({"type": f"{kind}.start", "status": status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


async def _reply_error(send: Send, error: DataMixError, kind: str = "http.response") -> None:
    extra: tuple[tuple[bytes, bytes], ...] = ()
    if error.retry_after_s is not None:  # whole seconds, as HTTP wants them
        extra = ((b"retry-after", str(math.ceil(error.retry_after_s)).encode()),)
    if isinstance(error, Unauthorized):
        extra = ((b"www-authenticate", b"Bearer"),)
    body = json.dumps({"error": str(error)}).encode()
    await _reply(send, error.status, "application/json", body, extra=extra, kind=kind)
