"""vLLM's own server, with prompts compressed on their way in: an entry point of the group `vllm.endpoint_plugins`.

    VLLM_PLUGINS=semtoken SEMTOKEN_CHECKPOINT=my-semtoken vllm serve my-plain --enable-prompt-embeds

Of vLLM it uses the protocol of such plugins (`vllm/plugins/endpoint_plugins/interface.py`, seen in 0.32) and the field
`prompt_embeds` of /v1/completions, nothing else.
"""

from __future__ import annotations

import os
from typing import Any

from ..logging_semtoken import get_logger

logger = get_logger(__name__)

CHECKPOINT = "SEMTOKEN_CHECKPOINT"
# What must be the same in the checkpoint and in the model that vLLM runs.
SHARED = ("hidden_size", "vocab_size", "num_hidden_layers")
# Options of vLLM's chat endpoint, which compressed chats do not reach.
CHAT_OPTIONS = ("chat_template", "default_chat_template_kwargs", "reasoning_parser")


class SemTokenEndpointPlugin:
    """What vLLM loads. Importing and making it do nothing that may fail: vLLM would go on without it, plain."""

    name = "semtoken"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Load the checkpoint that SEMTOKEN_CHECKPOINT names and put the compression around `app`, a FastAPI.

        Raises:
            ValueError: the variable is not set, or an engine cannot read that checkpoint's slots.
        """
        checkpoint = os.environ.get(CHECKPOINT)
        if not checkpoint:
            raise ValueError(f"set {CHECKPOINT} to the SemToken folder whose plain model this server runs")
        from .middleware import CompressionMiddleware
        from .request_compression import RequestCompressor
        from .serving_metrics import ServingMetrics

        compressor = RequestCompressor(checkpoint)
        app.add_middleware(CompressionMiddleware, compressor=compressor, metrics=ServingMetrics())
        self.config = compressor.config

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Check that vLLM runs the checkpoint's plain model and takes embeddings.

        Raises:
            ValueError: it does not.
        """
        if not args.enable_prompt_embeds:
            raise ValueError("start vLLM with --enable-prompt-embeds: compressed prompts are embeddings")
        check_served(self.config, engine_client.model_config.hf_config)
        for name in CHAT_OPTIONS:
            if getattr(args, name, None):
                option = name.replace("_", "-")
                logger.warning(
                    f"--{option} does not reach compressed chats: the checkpoint's chat template renders them, and "
                    "their answers come back as they are"
                )


def check_served(config: Any, served: Any) -> None:
    """Raise ValueError unless `served`, vLLM's configuration, is that of the plain model of `config`."""
    if str(served.model_type).startswith("semtoken_"):
        raise ValueError(
            "vLLM runs a SemToken folder as a plain model: serve the folder that `semtoken export` writes instead"
        )
    for name in SHARED:
        ours, theirs = getattr(config, name), getattr(served, name, None)
        if ours != theirs:
            raise ValueError(
                f"vLLM runs another model than the plain one of the checkpoint: {name} {theirs}, not {ours}"
            )


__all__ = ["SemTokenEndpointPlugin", "check_served"]
