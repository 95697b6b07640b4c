"""`semtoken serve`: prompts are compressed on their way to inference engines."""

from __future__ import annotations

import socket
from typing import Annotated

import typer

from .main import CONTEXT
from .options import Json, SpreadingCommand
from .output import console, ending_well, write_json

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(cls=SpreadingCommand, context_settings=CONTEXT)
def serve(
    upstream: Annotated[
        list[str], typer.Option("--upstream", metavar="URL", help="of a server of the plain model, such as vLLM; many")
    ],
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="the SemToken folder or Hub id of that plain model")],
    host: Annotated[str, typer.Option("--host", help="where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 8080,
    max_in_flight: Annotated[
        int, typer.Option("--max-in-flight", min=1, help="requests at once; others get 503 and Retry-After")
    ] = 256,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="seconds that a server may stay silent")] = 600.0,
    as_json: Json = False,
) -> None:
    """Compress the prompts of OpenAI requests on their way to vLLM, which runs the plain model over the slots.

    The plain model is what `semtoken export` writes; start its servers with `--enable-prompt-embeds`. Completions and
    chats are compressed, streamed or not; a request may carry `target_ratio` and `compression`. `/health` asks the
    servers, `/metrics` is for Prometheus. SIGTERM lets running requests end first. Needs the extra `proxy`.

    **Examples**

        semtoken serve --upstream http://127.0.0.1:8000 --checkpoint my-semtoken
        semtoken serve --upstream http://gpu1:8000 http://gpu2:8000 --checkpoint my-semtoken --host 0.0.0.0 --port 80

    **Exit codes**: 1 the checkpoint or the address cannot be used; 2 wrong usage; 130 Ctrl-C; 143 terminated.
    """
    with ending_well("every request that ran has ended"):
        import uvicorn

        from ..serving.proxy import build_proxy
        from ..serving.request_compression import RequestCompressor

        proxy = build_proxy(RequestCompressor(checkpoint), upstream, max_in_flight=max_in_flight, timeout=timeout)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family, backlog=2048) as listening:
            address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
            if as_json:
                write_json({"address": address, "checkpoint": checkpoint, "upstreams": upstream})
            else:
                console(stderr=True).print(f"SemToken listens on {address} for {', '.join(upstream)}")
            config = uvicorn.Config(proxy, log_level="warning", timeout_graceful_shutdown=int(timeout) + 1)
            uvicorn.Server(config).run(sockets=[listening])
