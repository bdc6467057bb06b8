"""What a replica with an echo engine has to answer, worked out beside it from its contract.

The bytes are opened by the same codec, but by one without memory: whatever the replica has met
before may not change what it makes of a message.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from datamix import wire
from datamix.errors import DataMixError, NotFound, TooLarge, Unsupported, WireError
from datamix.unframing import Reader
from deployments import oip
from deployments.config import Config

_MODEL, _VERSION = "echo", "1"
_SOON_S = 60.0  # with less time left it is a matter of luck whether an answer is in time
_TELLING = re.compile(r"Traceback|\n|\.py\b|[a-z]Error\b|0x[0-9a-f]{6}|object at ")


class Output(NamedTuple):
    """What a good answer holds: the rows, and the scales of int8 ones; as bytes."""

    dtype: str
    shape: tuple[int, ...]
    features: bytes
    scale: bytes

    @classmethod
    def of(cls, features: Any, scale: Any) -> Output:
        """The bytes of arrays."""
        raw = b"" if scale is None else scale.tobytes()
        return cls(features.dtype.name, features.shape, features.tobytes(), raw)


@dataclass(frozen=True, slots=True)
class Expected:
    """The answers that are right for one message.

    Attributes:
        statuses: any of these.
        request_id: that the answer names, if it comes on a stream.
        sentence: the error, word for word; "" where that is not foretold.
        output: what an answer with status 200 holds.
        binary: of an answer in the Open Inference Protocol: whether it comes as binary data.
    """

    statuses: frozenset[int]
    request_id: str = "-"
    sentence: str = ""
    output: Output | None = None
    binary: bool = False


class Reply(NamedTuple):
    """One HTTP response: its header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Post(NamedTuple):
    """One HTTP request; names of headers are in lower case, and may come more than once."""

    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str:
        """The first value."""
        return next((value for key, value in self.headers if key == name), "")


class Oracle:
    """Knows the answers of a replica with these settings."""

    def __init__(self, config: Config) -> None:
        """Foresee an echo model's answers, at one row shape."""
        assert config.echo_shape is not None
        self._config = config
        self._shape = config.echo_shape

    def stream(self, body: bytes | None) -> Expected:
        """What answers one message of a stream; None is a text message."""
        request_id = wire.peek_request_id(body or b"")
        try:
            if body is None:
                raise WireError("a text frame came on the stream, expected binary messages")
            return self._answer(self._decode(body))
        except DataMixError as error:
            return Expected(frozenset({error.status}), request_id, str(error))

    def post(self, post: Post) -> Expected:
        """What answers one POST."""
        try:
            self._route(post.path)
            too_large = len(post.body) > self._config.max_request_bytes
            kind = post.header("content-type").partition(";")[0].strip().lower()
            length = post.header("inference-header-content-length")
            if kind == wire.MEDIA_TYPE and not too_large:
                return self._answer(self._decode(post.body))
            if kind not in ("", wire.MEDIA_TYPE, *oip.MEDIA_TYPES) and not length:
                raise Unsupported("")
            encoding = post.header("content-encoding").lower()
            if kind != wire.MEDIA_TYPE and encoding not in ("", "identity"):
                raise Unsupported("")
            if too_large:
                raise TooLarge("")
            found = oip.decode_request(post.body, length, max_rows=self._config.max_request_rows)
            return self._answer(found.wire, json_too=found)
        except DataMixError as error:
            return Expected(frozenset({error.status}), sentence=str(error))

    def _route(self, path: str) -> None:
        path = unquote(path.partition("?")[0])
        if not re.fullmatch(rf"/v2/models/{_MODEL}(/versions/{_VERSION})?/infer/?", path):
            raise NotFound("")

    def _decode(self, body: bytes) -> wire.Request:
        """Open a message with an empty memory, and leave the process's own as it is."""
        kept = wire.requests
        wire.requests = Reader(kept._variables, kept._parse)
        try:
            config = self._config
            return wire.decode_request(
                body, max_bytes=config.max_request_bytes, max_rows=config.max_request_rows
            )
        finally:
            wire.requests = kept

    def _answer(self, request: wire.Request, json_too: oip.Request | None = None) -> Expected:
        """What becomes of a request that could be read."""
        named = (request.model in (None, _MODEL)) and request.model_version in (None, _VERSION)
        if not named or request.block:
            return Expected(frozenset({404}), request.request_id)
        if request.features.shape[1:] != self._shape:
            return Expected(frozenset({400}), request.request_id)
        statuses = {200}
        if request.deadline_s is not None and request.deadline_s < _SOON_S:
            statuses = {200, 408, 429} if request.deadline_s else {408, 429}
        echo = request.features
        if request.scale is not None:
            echo = wire.dequantise(request.features, request.scale)
        binary = json_too is not None and json_too.binary
        dtype = "float32" if json_too is not None and not binary else request.dtype
        output = Output.of(*wire.quantise(echo, dtype))
        return Expected(frozenset(statuses), request.request_id, output=output, binary=binary)


# --- judging ----------------------------------------------------------------------------------


def judge_sentence(expected: Expected, sentence: str | None) -> str:
    """What is wrong with the words of an error; "" if nothing is."""
    if not sentence or len(sentence) > 400 or _TELLING.search(sentence):
        return f"the error is no plain sentence: {sentence!r}"
    if expected.sentence and sentence != expected.sentence:
        return f"the error is {sentence!r}, expected {expected.sentence!r}"
    return ""


def judge(expected: Expected, response: wire.Response) -> str:
    """What is wrong with an answer in Arrow; "" if nothing is."""
    if response.status not in expected.statuses:
        return (
            f"status {response.status} ({response.error}), expected {sorted(expected.statuses)} "
            f"({expected.sentence})"
        )
    if response.request_id != expected.request_id:
        return f"the answer is to {response.request_id!r}, expected {expected.request_id!r}"
    if response.status != 200:
        return judge_sentence(expected, response.error)
    if Output.of(response.features, response.scale) != expected.output:
        return "the answer's values are not those of the request"
    if (response.model, response.model_version, response.block) != (_MODEL, _VERSION, 0):
        return "the answer comes from another model"
    return ""


def judge_reply(expected: Expected, reply: Reply) -> str:
    """What is wrong with an HTTP response; "" if nothing is."""
    if reply.status not in expected.statuses:
        return (
            f"status {reply.status} ({reply.body[:200]!r}), expected {sorted(expected.statuses)} "
            f"({expected.sentence})"
        )
    kind = reply.headers.get("content-type", "")
    if reply.status != 200:
        try:
            return judge_sentence(expected, json.loads(reply.body)["error"])
        except (ValueError, KeyError, TypeError):
            return f"an error of type {kind!r} is not JSON with an error"
    if kind == wire.MEDIA_TYPE:
        return judge(expected, wire.decode_response(reply.body))
    return _judge_oip(expected, reply)


def _judge_oip(expected: Expected, reply: Reply) -> str:
    length = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    message, tail = json.loads(reply.body[:length]), reply.body[length:]
    (tensor,) = message["outputs"]
    if ("data" in tensor) == expected.binary or message.get("id", "") != expected.request_id:
        return "the answer is in the other form, or to another request"
    dtype = {"FP16": "float16", "FP32": "float32"}[tensor["datatype"]]
    values = np.frombuffer(tail, dtype) if expected.binary else np.array(tensor["data"], dtype)
    found = Output.of(values.reshape(tensor["shape"]), None)
    return "" if found == expected.output else "the answer's values are not those of the request"
