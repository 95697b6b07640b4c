"""A stand-in for vLLM's server: its protocol, with a digest of the prompt in place of an answer.

python -m tests.serving.stand_in PORT
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import sys
import zipfile
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

# Words of an answer; a client that calls itself `slow` waits so many seconds for each.
WORDS, PAUSE = 4, 0.1
# Of an embedding of the embedded checkpoint: 256 numbers in bfloat16.
ROW_BYTES = 512


def digest(rows: bytes) -> str:
    """What the stand-in answers to embeddings."""
    return hashlib.sha256(rows).hexdigest()[:12]


def decode(data: str) -> bytes:
    """The bytes of the tensor that `torch.save` has written.

    Raises:
        ValueError: not base64, or not of that format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(base64.b64decode(data, validate=True))) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data/0")]
            return archive.read(name)
    except zipfile.BadZipFile as wrong:
        raise ValueError(str(wrong)) from wrong


def error(message: str) -> Response:
    kind = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": kind}, status_code=400)


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) and not isinstance(value[0], int) else [value]


async def completions(request: Request) -> Response:
    body = await request.json()
    if body.keys() & {"target_ratio", "compression", "messages", "tools"}:
        return error(f"unknown fields: {sorted(body)}")
    try:
        embeds = [decode(data) for data in as_list(body["prompt_embeds"])]
        answers = [(digest(rows), len(rows) // ROW_BYTES) for rows in embeds]
    except KeyError:
        answers = [("plain", len(prompt)) for prompt in as_list(body["prompt"])]
    except ValueError as wrong:
        return error(str(wrong))
    return await answer(request, body, "text_completion", answers)


async def chat(request: Request) -> Response:
    body = await request.json()
    return await answer(request, body, "chat.completion", [("plain chat", len(body["messages"]))])


async def answer(request: Request, body: dict[str, Any], kind: str, answers: list[tuple[str, int]]) -> Response:
    state, prompt_tokens = request.app.state, sum(length for _, length in answers)
    pause = PAUSE if body.get("user") == "slow" else 0.0
    state.seen.append({name: value for name, value in body.items() if name != "prompt_embeds"})
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + WORDS, "completion_tokens": WORDS}
    head = {"id": "cmpl-1", "object": kind, "created": 1, "model": body.get("model")}
    if body.get("stream"):
        with_usage = (body.get("stream_options") or {}).get("include_usage")
        events = stream(state, head, answers, pause, usage if with_usage else None)
        return StreamingResponse(events, media_type="text/event-stream")
    for _ in range(WORDS):
        await asyncio.sleep(pause)
        if await request.is_disconnected():
            state.left += 1
            return Response()
    choices = [
        {"index": i, "text": text, "logprobs": None, "finish_reason": "stop"} for i, (text, _) in enumerate(answers)
    ]
    if body.get("logprobs") is not None:
        choices[0]["logprobs"] = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5, "b": -2.0}]}
    return JSONResponse({**head, "choices": choices, "usage": usage})


async def stream(state: Any, head: dict[str, Any], answers: list[tuple[str, int]], pause: float, usage: Any) -> Any:
    try:
        for number in range(WORDS):
            await asyncio.sleep(pause)
            for index, (text, _) in enumerate(answers):
                length = -(-len(text) // WORDS)
                choice = {"index": index, "text": text[number * length :][:length], "finish_reason": None}
                yield f"data: {json.dumps({**head, 'choices': [choice], 'usage': None})}\n\n"
        if usage is not None:
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
    except asyncio.CancelledError:
        state.left += 1
        raise


async def version(request: Request) -> Response:
    return JSONResponse({"version": "of the stand-in"})


async def state_of(request: Request) -> Response:
    return JSONResponse({"seen": request.app.state.seen, "left": request.app.state.left})


def stand_in() -> Starlette:
    app = Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/responses", chat, methods=["POST"]),
            Route("/health", state_of),
            Route("/version", version),
        ]
    )
    app.state.seen, app.state.left = [], 0
    return app


if __name__ == "__main__":
    import uvicorn

    uvicorn.run(stand_in(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
