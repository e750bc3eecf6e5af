"""A small server that speaks OpenAI's completions protocol, for real clients on one machine.

One answer at a time, streamed as it comes. It does not try to replace engines that batch requests of many users.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from moekit.errors import BudgetError, MoekitError, OptionError
from moekit.run.answer import Cost, prompt_ids
from moekit.run.desk import BusyError, Desk, Request
from moekit.run.paging import paging

DEFAULT_NEW_TOKENS = 256
_LATER = {"n": 1, "best_of": 1, "logprobs": None, "echo": False, "suffix": None, "tools": None}
"""Fields that are accepted only where they ask for nothing."""


def app(desk: Desk, name: str) -> Starlette:
    """The application: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions`` and ``/health``.

    When it shuts down the desk answers who is in line, and the model's experts are let go.
    """
    server = _Server(desk, name)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.close)
        paging(desk.model).close()

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


@dataclass(frozen=True)
class _Piece:
    """What the desk's thread tells the event loop: text, or how it ended."""

    text: str = ""
    reason: str | None = None
    cost: Cost | None = None
    error: Exception | None = None


class _Server:
    def __init__(self, desk: Desk, name: str) -> None:
        self.desk, self.name, self.started = desk, name, int(time.time())

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, _: HttpRequest) -> Response:
        one = {"id": self.name, "object": "model", "created": self.started, "owned_by": "moekit"}
        return JSONResponse({"object": "list", "data": [one]})

    async def completions(self, request: HttpRequest) -> Response:
        return await self._reply(request, chat=False)

    async def chat(self, request: HttpRequest) -> Response:
        return await self._reply(request, chat=True)

    async def _reply(self, http: HttpRequest, chat: bool) -> Response:
        try:
            body = await _body(http)
            ids = self._ids(body, chat)
            pieces: asyncio.Queue[_Piece] = asyncio.Queue()
            asked = self._request(body, ids, pieces, asyncio.get_running_loop())
            self.desk.ask(asked)
        except BusyError as error:
            return _refusal(429, "server_busy", str(error))
        except MoekitError as error:
            return _refusal(400, "invalid_request_error", str(error))
        form = _Form(chat, self.name, f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}")
        if body.get("stream"):
            stream = self._streamed(pieces, form, asked)
            return StreamingResponse(stream, media_type="text/event-stream")
        return await self._whole(http, pieces, form, asked)

    async def _whole(self, http: HttpRequest, pieces: asyncio.Queue[_Piece], form: _Form, asked: Request) -> Response:
        text = ""
        while True:
            try:
                piece = await asyncio.wait_for(pieces.get(), timeout=0.5)
            except TimeoutError:
                if await http.is_disconnected():
                    asked.left.set()
                    return Response(status_code=499)
                continue
            text += piece.text
            if piece.error is not None:
                return _failure(piece.error)
            if piece.cost is not None:
                return JSONResponse(form.whole(text, piece.reason, piece.cost))

    async def _streamed(self, pieces: asyncio.Queue[_Piece], form: _Form, asked: Request) -> AsyncIterator[str]:
        try:
            while True:
                piece = await pieces.get()
                if piece.error is not None:
                    yield _event({"error": {"message": str(piece.error), "type": "server_error"}})
                    return
                yield _event(form.part(piece.text, piece.reason))
                if piece.cost is not None:
                    yield "data: [DONE]\n\n"
                    return
        finally:
            asked.left.set()  # also where the client went away

    def _ids(self, body: Mapping[str, Any], chat: bool) -> Tensor:
        tokenizer = self.desk.tokenizer
        if chat:
            return prompt_ids(tokenizer, _checked_messages(body.get("messages")), chat=True)
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise OptionError("prompt must be one string")
        return prompt_ids(tokenizer, prompt, chat=False)

    def _request(
        self, body: Mapping[str, Any], ids: Tensor, pieces: asyncio.Queue[_Piece], loop: asyncio.AbstractEventLoop
    ) -> Request:
        def tell(piece: _Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        most = paging(self.desk.model).context - ids.shape[1]
        wanted = body.get("max_completion_tokens", body.get("max_tokens"))
        new_tokens = min(DEFAULT_NEW_TOKENS, most) if wanted is None else _number(body, wanted, int, "max_tokens", 1)
        if new_tokens > most or most < 1:
            raise BudgetError(
                f"{ids.shape[1]} tokens of prompt and {max(new_tokens, 1)} of answer are more than the "
                f"{most + ids.shape[1]} that memory was set aside for: start the server with a larger --context"
            )
        stops = body.get("stop") or ()
        return Request(
            ids=ids,
            new_tokens=new_tokens,
            temperature=_number(body, body.get("temperature", 1.0), float, "temperature", 0),
            top_p=_number(body, body.get("top_p", 1.0), float, "top_p", 0),
            seed=_number(body, body.get("seed") or 0, int, "seed", 0),
            stops=tuple([stops] if isinstance(stops, str) else stops),
            say=lambda text: tell(_Piece(text)),
            done=lambda reason, cost: tell(_Piece(reason=reason, cost=cost)),
            failed=lambda error: tell(_Piece(error=error)),
        )


@dataclass(frozen=True)
class _Form:
    """How answers are written down."""

    chat: bool
    model: str
    name: str

    def whole(self, text: str, reason: str | None, cost: Cost) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        usage = {
            "prompt_tokens": cost.prompt_tokens,
            "completion_tokens": cost.new_tokens,
            "total_tokens": cost.prompt_tokens + cost.new_tokens,
        }
        return {**self._head(), "choices": [{"index": 0, **said, "finish_reason": reason}], "usage": usage}

    def part(self, text: str, reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
        return {**self._head(chunk=True), "choices": [{"index": 0, **said, "finish_reason": reason}]}

    def _head(self, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.name, "object": kind, "created": int(time.time()), "model": self.model}


async def _body(http: HttpRequest) -> dict[str, Any]:
    try:
        body = json.loads(await http.body())
    except ValueError:
        raise OptionError("the request's body is not JSON") from None
    if not isinstance(body, dict):
        raise OptionError("the request's body must be a JSON object")
    for field, neutral in _LATER.items():
        if body.get(field, neutral) not in (neutral, None, [], 0):
            raise OptionError(f"{field} is not supported here: leave it out")
    return body


def _checked_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise OptionError("messages must be a list of at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise OptionError("each message must have a role, and a content that is text")
    return messages


def _number(body: Mapping[str, Any], value: Any, kind: type, name: str, least: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < least or value != kind(value):
        raise OptionError(f"{name} must be {'a whole number' if kind is int else 'a number'} of at least {least}")
    return kind(value)


def _refusal(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)


def _failure(error: Exception) -> Response:
    busy = isinstance(error, BusyError)
    return _refusal(503 if busy else 500, "server_busy" if busy else "server_error", str(error))


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
