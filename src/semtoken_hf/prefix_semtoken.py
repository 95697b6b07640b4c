"""A text that many prompts begin with, compressed once: `compress_prefix`, and what `generate` does with the result.

- A prefix is its slots: embeddings, positions, lengths. The layers read them on first use; every use after that gets a
  cache of its own with those keys and values, so that a further question costs the reading of the question.
- Prefixes that were compressed apart are joined as slots and read together: keys that were made apart have seen nothing
  of the texts before them, and only some rotary embeddings could move them.
- Its file is safetensors, with what the model must have in common with the one that made it.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .cache_semtoken import SemTokenCache
from .compression import CompressedPrompt
from .logging_semtoken import get_logger
from .read_positions import KeptPositions

logger = get_logger(__name__)

# Of one layer, [1, H_kv, M, D] each; layers with a sliding window hold the last columns alone.
KeysAndValues = tuple[Tensor, Tensor]
FORMAT, VERSION = "semtoken_prefix", "1"
# Of the configuration. Which tokens merge is settled in the file: the ratio, protection and the encoder may differ.
FIELDS = (
    *("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "rope_parameters", "sliding_window", "position_mode", "merge_mode", "merger_base"),
)
# What to do where one of these differs, before the file is given up.
REMEDIES = {
    "dtype": "load the model with that dtype",
    "position_mode": "set `config.position_mode` to the file's",
    "weights": "load the weights that made it (a fine-tuned, quantised or differently adapted model is another one)",
}
# Numbers of each weight that its digest reads.
SAMPLES = 16


class CompressedPrefix:
    """One text as slots of one model; `model.compress_prefix` makes it, `generate` takes it as `past_key_values`.

    Attributes:
        model: that reads the slots.
        input_ids: int64 [1, T].
        prompt: its M slots, a `CompressedPrompt` of one row without its origin.
        position_mode: in which the slots have their positions.
        layers: keys and values of every layer; None until they are needed.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, prompt: CompressedPrompt, layers: list[KeysAndValues] | None = None
    ):
        self.model, self.input_ids, self.prompt, self.layers = model, input_ids, prompt, layers
        self.position_mode = model.config.position_mode

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self.original_length}, slots={self.compressed_length})"

    @property
    def original_length(self) -> int:
        """Tokens."""
        return self.input_ids.shape[1]

    @property
    def compressed_length(self) -> int:
        """Slots."""
        return self.prompt.slot_counts[0]

    def inputs(
        self, text: str | list[str] | Tensor, tokenizer: Any = None, attention_mask: Tensor | None = None
    ) -> dict[str, Any]:
        """What `generate` takes to go on behind the prefix: whole sequences, their mask, and the prefix itself.

        Args:
            text: what follows the prefix, in one row or several: text, or int64 [B, Q].
            tokenizer: for text, which gets no special tokens; several rows are padded on the left.
            attention_mask: int64 [B, Q], of ids, 0 for padding.

        Returns:
            `input_ids` and `attention_mask`, int64 [B, T + Q], and `past_key_values`.

        Raises:
            ValueError: text without a tokenizer, or ids of another shape.
        """
        encoded = None if isinstance(text, Tensor) else encode(text, tokenizer, add_special_tokens=False)
        new: Any = text if encoded is None else encoded["input_ids"]
        if new.ndim != 2:
            raise ValueError(f"`text` must be text or ids of shape [batch, tokens], got {tuple(new.shape)}")
        mask = attention_mask if encoded is None else encoded["attention_mask"]
        mask = torch.ones_like(new) if mask is None else mask
        before = self.input_ids.expand(len(new), -1)
        return {
            "input_ids": torch.cat([before, new.to(before)], dim=1),
            "attention_mask": torch.cat([torch.ones_like(before), mask.to(before)], dim=1),
            "past_key_values": self,
        }

    def cache(self) -> SemTokenCache:
        """A new cache of one row that holds the prefix; what is appended to it leaves the prefix as it is.

        Raises:
            ValueError: `config.position_mode` was changed since.
        """
        if self.position_mode != (mode := self.model.config.position_mode):
            raise ValueError(
                f"the prefix was compressed with position_mode='{self.position_mode}', and the model's is now "
                f"'{mode}': set it back, or compress the text again"
            )
        if self.layers is None:
            self.layers = read_slots(self.model, self.input_ids, self.prompt)
        cache = SemTokenCache(config=self.model.config)
        cache.record(self.prompt.slot_lengths, self.original_length, compressed=self.prompt.is_merged, padded=False)
        cache.prefix_ids = self.input_ids
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys, values, index)
            layer: Any = cache.layers[index]
            if hasattr(layer, "cumulative_length"):  # of a window, which has forgotten what came before
                layer.cumulative_length = self.compressed_length
        if self.prompt.is_merged:
            with torch.no_grad():
                self.model.base_model._makes_ragged(cache, 1)
        return cache

    def save(self, path: str | Path, with_keys: bool = True) -> None:
        """Write the prefix to a safetensors file, which appears whole or not at all.

        Args:
            path: of the file; its folder exists.
            with_keys: False leaves out keys and values, which take most of the room: the layers then read the slots
                again after loading. For prefixes that are kept to be joined.
        """
        prompt = self.prompt
        tensors = {"input_ids": self.input_ids, "inputs_embeds": prompt.inputs_embeds}
        tensors |= {"position_ids": prompt.position_ids, "slot_lengths": prompt.slot_lengths}
        if with_keys:
            if self.layers is None:
                self.layers = read_slots(self.model, self.input_ids, prompt)
            for index, (keys, values) in enumerate(self.layers):
                tensors |= {f"keys.{index}": keys, f"values.{index}": values}
        write_prefix(self.model, Path(path), tensors)

    @classmethod
    def load(cls, path: str | Path, model: Any) -> CompressedPrefix:
        """Read what `save` has written.

        A model that is spread over several devices reads the slots again, since each layer's keys lie beside it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no prefix, it is damaged, or the model is not the one that made it: the message names
                what differs, both values, and what to do.
        """
        tensors = read_prefix(model, Path(path))
        device = model.get_input_embeddings().weight.device
        devices = {parameter.device for parameter in model.base_model.parameters()}
        if device.type != "meta":
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        ids = tensors["input_ids"]
        prompt = prompt_of_slots(tensors["inputs_embeds"], tensors["position_ids"], tensors["slot_lengths"])
        layers = None
        if "keys.0" in tensors and len(devices) == 1:
            count = model.config.num_hidden_layers
            layers = [(tensors[f"keys.{index}"], tensors[f"values.{index}"]) for index in range(count)]
        return cls(model, ids, prompt, layers)


def encode(text: Any, tokenizer: Any, **options: Any) -> Any:
    """Ids and mask, int64 [B, n], of one text or several, padded on the left.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("text needs its `tokenizer`; or pass ids, an integer tensor [batch, tokens]")
    is_padded = {} if isinstance(text, str) else {"padding": True, "padding_side": "left"}
    return tokenizer(text, return_tensors="pt", **is_padded, **options)


def prompt_of_slots(inputs_embeds: Tensor, position_ids: Tensor, slot_lengths: Tensor) -> CompressedPrompt:
    """One row of M slots, [1, M, H], [1, M] and [1, M], as what the layers read."""
    count = slot_lengths.shape[1]
    span_ids = torch.arange(count, device=slot_lengths.device).repeat_interleave(slot_lengths[0])[None]
    kept = torch.full_like(slot_lengths[:, 0], count)
    return CompressedPrompt(
        inputs_embeds=inputs_embeds,
        position_ids=position_ids,
        attention_mask=torch.ones_like(slot_lengths),
        slot_lengths=slot_lengths,
        span_ids=span_ids,
        original_lengths=slot_lengths.sum(1),
        kept_lengths=kept,
        budgets=kept,
        budget_met=kept == kept,
        slot_counts=[count],
        is_merged=count < span_ids.shape[1],
        is_padded=False,
    )


@torch.no_grad()
def read_slots(model: Any, input_ids: Tensor, prompt: CompressedPrompt) -> list[KeysAndValues]:
    """Keys and values of one row of slots, in chunks where the model's generation configuration says so."""
    cache = SemTokenCache(config=model.config)
    call = {"past_key_values": cache, "use_cache": True}
    call["prefill_chunk_size"] = model.generation_config.prefill_chunk_size
    if prompt.is_merged:
        model.base_model(slot_reading=KeptPositions(prompt, 1), **call)
    else:
        model.base_model(input_ids, compression=False, **call)
    layers: list[Any] = cache.layers
    held = [(layer.keys, layer.values) for layer in layers]
    if cache.ragged_rows is None:
        return held
    count = cache.ragged_rows.lengths[0]
    return [(k[:count].transpose(0, 1)[None], v[:count].transpose(0, 1)[None]) for k, v in held]


class SemTokenPrefixMixin:
    """What a language model does with prefixes."""

    # What the family's classes bring.
    config: Any
    compress: Any
    get_input_embeddings: Any
    _wants_compression: Any

    @torch.no_grad()
    def compress_prefix(
        self,
        prefix: str | Tensor,
        tokenizer: Any = None,
        target_ratio: float | None = None,
        span_ids: Tensor | None = None,
        protected_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        query_weight: float | None = None,
    ) -> CompressedPrefix:
        """A text that prompts begin with, compressed once and for all of them.

        Which question will be asked is unknown by then: unless `query_mask` marks one, the latest sentences stay.

        Args:
            prefix: text, or int64 [1, T], such as the first messages of a chat.
            tokenizer: for text, which gets the special tokens that open a sequence.
            target_ratio, span_ids, protected_mask, query_mask, query_weight: as in `compress`.

        Raises:
            ValueError: text without a tokenizer, ids of more rows than one or of none, or what `compress` refuses.
        """
        ids = prefix if isinstance(prefix, Tensor) else encode(prefix, tokenizer)["input_ids"]
        if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
            raise ValueError(
                f"`prefix` must be one text or ids of shape [1, tokens], got {tuple(ids.shape)}: compress several one "
                "by one, and join them with `join_prefixes`"
            )
        embeddings = self.get_input_embeddings()
        if embeddings.weight.device.type != "meta":
            ids = ids.to(embeddings.weight.device)
        if self._wants_compression(None, target_ratio, query_weight):
            planning = {"span_ids": span_ids, "protected_mask": protected_mask, "query_mask": query_mask}
            prompt = self.compress(ids, target_ratio=target_ratio, query_weight=query_weight, **planning)
            prompt.origin = None
        else:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            prompt = prompt_of_slots(embeddings(ids), positions, torch.ones_like(positions))
        return CompressedPrefix(self, ids, prompt)

    def join_prefixes(self, prefixes: list[CompressedPrefix]) -> CompressedPrefix:
        """Prefixes one behind the other, in this order: nothing is planned again, and the layers read them together.

        Raises:
            ValueError: there are none, or one is of another model or position mode.
        """
        if not prefixes:
            raise ValueError("`prefixes` must hold at least one prefix")
        mode, positions, offset = self.config.position_mode, [], 0
        for number, prefix in enumerate(prefixes):
            if prefix.model is not self or prefix.position_mode != mode:
                raise ValueError(
                    f"prefix {number} was compressed by another model, or with another position mode: save it and load "
                    "it with this model, which says what differs, or compress its text again"
                )
            positions.append(prefix.prompt.position_ids + offset)
            offset += prefix.compressed_length if mode == "compact" else prefix.original_length
        embeds, lengths = (
            torch.cat([getattr(prefix.prompt, name) for prefix in prefixes], 1)
            for name in ("inputs_embeds", "slot_lengths")
        )
        ids = torch.cat([prefix.input_ids for prefix in prefixes], 1)
        return CompressedPrefix(self, ids, prompt_of_slots(embeds, torch.cat(positions, 1), lengths))

    def load_prefix(self, path: str | Path) -> CompressedPrefix:
        """`CompressedPrefix.load` for this model, where no package is there to import the class from."""
        return CompressedPrefix.load(path, self)


def identity_of(model: Any) -> dict[str, Any]:
    """What must be alike where slots and keys are used again; None for weights that lie where they cannot be read."""
    found = {name: getattr(model.config, name, None) for name in FIELDS}
    found |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": digest_of_weights(model)}
    return json.loads(json.dumps(found))


def digest_of_weights(model: Any) -> str | None:
    """16 hexadecimal digits that training changes: of a few values of every tensor but the encoder's, which made the
    plan and nothing else. None where some are offloaded."""
    samples = []
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor) or "semantic_encoder." in name:
            continue
        for part in _plain_parts(value):
            if part.device.type == "meta":
                return None
            flat = part.detach().reshape(-1)
            samples.append(flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES].float().cpu())
    return sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16]


def _plain_parts(value: Tensor) -> list[Tensor]:
    """The tensors that a quantised or sharded one is made of."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [part for tensor in inner for part in _plain_parts(tensor)]


def write_prefix(model: Any, path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors beside `path`, then rename: it is whole or not there."""
    metadata = {"format": FORMAT, "version": VERSION, "identity": json.dumps(identity_of(model))}
    staged = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, staged, metadata)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def read_prefix(model: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `write_prefix` has written for a model like this one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no prefix, it is damaged, or it was made by another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is no compressed prefix: write one with `prefix.save(path)`")
            if metadata["version"] != VERSION:
                raise ValueError(
                    f"{path} is of version {metadata['version']}, this code reads {VERSION}: compress the text again"
                )
            check_identity(path, json.loads(metadata["identity"]), identity_of(model))
            names = file.keys()
            # Copies: what maps the file breaks when somebody writes to it.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no compressed prefix, or it is damaged ({error}): compress the text again"
        ) from error
    lengths = tensors["slot_lengths"]
    if int(lengths.sum()) != tensors["input_ids"].shape[1] or lengths.shape != tensors["inputs_embeds"].shape[:2]:
        raise ValueError(f"{path} is damaged: its slots do not add up to its tokens; compress the text again")
    return tensors


def check_identity(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ValueError at the first thing in which the model of a file and this one differ."""
    for name, value in ours.items():
        other = theirs.get(name)
        if name == "weights" and None in (value, other):
            logger.warning_once(
                "Whether the weights are those that made a prefix was not checked: some are offloaded, or were when it "
                "was saved."
            )
        elif value != other:
            remedy = REMEDIES.get(name, "load the model that made it")
            raise ValueError(
                f"{path} does not fit this model: `{name}` is {other!r} in the file and {value!r} in the model; "
                f"{remedy}, or compress the text again with `compress_prefix`"
            )


__all__ = ["CompressedPrefix", "SemTokenPrefixMixin", "read_prefix", "write_prefix"]
