"""The model `semtoken` of lm-eval (Language Model Evaluation Harness): contexts are compressed, answers scored whole.

    semtoken lm-eval --model semtoken --model_args pretrained=FOLDER,target_ratio=2.4 --tasks lambada_openai

takes the options of `lm_eval`; `--include_path FOLDER` adds task files of one's own. In Python, importing this file
registers the model: `lm_eval.simple_evaluate(model="semtoken", model_args={"pretrained": FOLDER}, tasks=[...])`.

`--model_args` are those of lm-eval's `hf`, and every compression field of the configuration (`target_ratio`,
`max_slots`, `query_weight`, `min_prompt_length`, `compression`, ...). What a request type makes of them:

    loglikelihood, multiple_choice   the context is compressed without a look at the continuation, and read once for
                                     all choices; every token of the continuation is scored
    generate_until                   the prompt is compressed, as `generate` does; `--gen_kwargs target_ratio=4.0` too
    loglikelihood_rolling            every token is scored, so nothing may merge: exactly `hf`, with a warning

Contexts shorter than `min_prompt_length` are read exactly as `hf` reads them, and so is everything with
`compression=False`. How many tokens and slots were read is logged and stands in the results, `config` -> `semtoken`.

`--model hf --model_args pretrained=FOLDER,trust_remote_code=True` scores exactly as the plain model does: it asks for
all logits. Only its generate_until compresses, unless `compression=False` is among its model_args.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..configuration_semtoken import SemTokenConfigMixin

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("lm-eval is missing; install it with `pip install 'semtoken-hf[evaluate]'`") from error

# Below the logger of lm-eval, whose command line shows it.
logger = logging.getLogger("lm_eval.semtoken")

FIELDS = frozenset(field.name for field in fields(SemTokenConfigMixin))
Answer = tuple[float, bool]


@dataclass
class ReadCount:
    """What was read for the requests of one type.

    Attributes:
        compressed: contexts in which something merged; one that several choices share counts once.
        tokens, slots: of these contexts, before and after.
        plain: requests that were read exactly as the plain model reads them.
    """

    compressed: int = 0
    tokens: int = 0
    slots: int = 0
    plain: int = 0

    def add(self, tokens: Tensor, slots: Tensor) -> None:
        """Count contexts of `tokens` int64 [B] that were read in `slots` int64 [B]."""
        merged = slots < tokens
        self.compressed += int(merged.sum())
        self.tokens += int(tokens[merged].sum())
        self.slots += int(slots[merged].sum())
        self.plain += int((~merged).sum())

    def __str__(self) -> str:
        ratio = f" ({self.tokens / self.slots:.2f} tokens per slot)" if self.slots else ""
        return (
            f"{self.compressed} compressed contexts of {self.tokens} tokens were read in {self.slots} slots{ratio}; "
            f"{self.plain} requests were read plain"
        )


@register_model("semtoken")
class SemTokenLM(HFLM):
    """lm-eval's `hf`, except that the context of a request is compressed.

    Args:
        pretrained: a SemToken checkpoint (folder or Hub id), or a loaded model.
        kwargs: of `HFLM`; fields of the configuration among them override the checkpoint's.

    Raises:
        ValueError: the checkpoint is not a SemToken one, a field is out of its range, or fields were given together
            with a loaded model, whose configuration has them already.
    """

    def __init__(self, pretrained: Any, **kwargs: Any):
        given = sorted(FIELDS & kwargs.keys())
        if given and not isinstance(pretrained, str):
            raise ValueError(
                f"set {given} in the configuration of the loaded model, or give its folder as `pretrained`"
            )
        self.reads: dict[str, ReadCount] = {}
        self._request_type = "loglikelihood"
        super().__init__(pretrained, **kwargs)

    def _get_backend(self, config: Any, backend: Any = "default", trust_remote_code: bool | None = False) -> None:
        # The first thing that HFLM does with a configuration, before any weight is loaded.
        if not hasattr(config, "segmentation_mode"):
            raise ValueError(
                f"{getattr(config, '_name_or_path', '') or 'the model'!r} is a plain {config.model_type!r} checkpoint: "
                "convert it with `semtoken_hf.convert_checkpoint(model, encoder, output_dir)`, or evaluate it as it is "
                "with `--model hf`"
            )
        super()._get_backend(config, "causal" if backend == "default" else backend, trust_remote_code)

    @contextmanager
    def _counting(self, request_type: str) -> Iterator[None]:
        """Within this block, what is read counts for this type of request; logged at the end."""
        self._request_type = request_type
        self.reads[request_type] = ReadCount()
        yield
        logger.info(f"SemToken, {request_type}: {self.reads[request_type]}")

    @property
    def _count(self) -> ReadCount:
        return self.reads.setdefault(self._request_type, ReadCount())

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[Answer]:
        with self._counting("loglikelihood"):
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        if self.model._wants_compression(None, None):
            logger.warning(
                "SemToken compresses nothing in loglikelihood_rolling, where every token is scored, and runs the plain "
                "model exactly: for a context-compressed score, use a task with `output_type: loglikelihood`"
            )
        with self._counting("loglikelihood_rolling"):
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        with self._counting("generate_until"):
            return super().generate_until(requests, disable_tqdm)

    def get_model_info(self) -> dict[str, Any]:
        """Of `HFLM`, and what was read, for the field `config` of the results (in this process, if there are more)."""
        config = self.model.config
        own = {name: getattr(config, name) for name in ("compression", "target_ratio", "max_slots")}
        reads = {name: asdict(count) for name, count in self.reads.items()}
        return {**super().get_model_info(), "semtoken": own | reads}

    def _may_merge(self, context: tuple[int, ...]) -> bool:
        if self._request_type == "loglikelihood_rolling" or self.model._is_short(len(context)):
            return False
        return self.model._wants_compression(None, None)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Log-likelihood and greediness of continuations: requests are (key, context ids, continuation ids)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        plain = []
        for number, (_, context, continuation) in enumerate(requests):
            # As HFLM, which cuts on the left and never feeds the last token.
            fitted = tuple((context + continuation)[-self.max_length - 1 : -len(continuation)])
            if self._may_merge(fitted):
                groups.setdefault(fitted, []).append(number)
            else:
                plain.append(number)
        answers: dict[int, Answer] = {}
        if plain:
            self._count.plain += len(plain)
            chosen = [requests[number] for number in plain]
            answers |= zip(plain, super()._loglikelihood_tokens(chosen, disable_tqdm, override_bs), strict=True)
        cut = sum(len(requests[n][1]) > len(context) for context, numbers in groups.items() for n in numbers)
        if cut:
            logger.warning(f"{cut} requests exceed max_length={self.max_length}: their contexts are cut on the left")
        for number, answer in self._score_groups(groups, requests, disable_tqdm):
            answers[number] = answer
            if requests[number][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    def _score_groups(
        self, groups: dict[tuple[int, ...], list[int]], requests: Any, disable_tqdm: bool
    ) -> Iterator[tuple[int, Answer]]:
        """Number and answer of every request, batch by batch, the longest contexts first."""
        contexts = sorted(groups, key=lambda context: (-len(context), context))
        if not contexts:
            return
        size = self.batch_size
        if size == "auto":
            size = self._detect_batch_size([requests[groups[contexts[0]][0]]])
        hidden = disable_tqdm or self.rank != 0
        for start in tqdm(range(0, len(contexts), size), desc="Running compressed loglikelihood", disable=hidden):
            batch = contexts[start : start + size]
            numbers = [groups[context] for context in batch]
            continuations = [[requests[number][2] for number in row] for row in numbers]
            for row, index, answer in self._score_batch(batch, continuations):
                yield numbers[row][index], answer

    def _score_batch(
        self, contexts: list[tuple[int, ...]], continuations: list[list[list[int]]]
    ) -> Iterator[tuple[int, int, Answer]]:
        """Read B contexts once, and score the continuations of each behind them.

        Yields:
            row, number of the continuation in that row, answer.
        """
        ids = self._padded(contexts, "left")
        mask = self._padded([[1] * len(context) for context in contexts], "left")
        # Given, so that it does not depend on padding where a continuation starts, whether anything merged or not.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = self._forward(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        lengths, slots = mask.sum(1), outputs.get("compressed_lengths")
        self._count.add(lengths, lengths if slots is None else slots)
        for index, column in enumerate(zip_longest(*continuations, fillvalue=[])):
            # Padding behind a continuation is read by nobody and taken out of the cache again.
            behind = self._padded([tokens[:-1] for tokens in column], "right")
            logits, width = outputs.logits, behind.shape[1]
            if width:
                # Layers with a sliding window forget what the crop has to bring back.
                outputs.past_key_values.activate_past_recording()
                more = self._forward(
                    input_ids=behind,
                    attention_mask=torch.cat([mask, torch.ones_like(behind)], dim=1),
                    position_ids=lengths[:, None] + torch.arange(width, device=self.device),
                    past_key_values=outputs.past_key_values,
                )
                outputs.past_key_values.crop(-width)
                logits = torch.cat([logits, more.logits], dim=1)
            scores = logits.log_softmax(-1, dtype=self.softmax_dtype)
            for row, tokens in enumerate(column):
                if tokens:
                    yield row, index, self._answer(scores[row, : len(tokens)], tokens)

    def _answer(self, scores: Tensor, tokens: list[int]) -> Answer:
        """Answer from log-probabilities [t, V] of t tokens."""
        target = torch.tensor(tokens, device=scores.device)
        return float(scores.gather(1, target[:, None]).sum()), bool((scores.argmax(-1) == target).all())

    def _padded(self, rows: Any, side: str) -> Tensor:
        """int64 [B, longest row] on the device, padded with zeros."""
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_side=side).to(self.device)

    def _forward(self, **inputs: Any) -> Any:
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(**inputs, use_cache=True, return_dict=True)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        outputs = super()._model_generate(context, max_length, stop, **kwargs, return_dict_in_generate=True)
        mask = kwargs.get("attention_mask")
        tokens = (torch.ones_like(context) if mask is None else mask).sum(1).cpu()
        cache, merged = outputs.past_key_values, torch.zeros_like(tokens)
        if getattr(cache, "slot_lengths", None) is not None:
            # Beams of a prompt share its plan; generated tokens have a slot each.
            merged = (cache.original_lengths - cache.compressed_lengths).view(len(context), -1)[:, 0].cpu()
        self._count.add(tokens, tokens - merged)
        return outputs.sequences


def main(arguments: list[str] | None = None) -> None:
    """lm-eval's own command line, to which `--model semtoken` is known."""
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{__doc__}\n`semtoken lm-eval run --help` lists the options of lm-eval.")
        return
    sys.argv = ["semtoken lm-eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    main()
