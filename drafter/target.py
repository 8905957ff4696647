"""The frozen target: loads it, gives features, logits through its own head, and responses.

Legend: B rows, S tokens per row, L tapped layers, D hidden size, V vocabulary (embedding rows).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from drafter.errors import UserError
from drafter.generation import Response, Watch, generate
from drafter.layer_ids import assert_finite_features, check_layer_ids, default_layer_ids
from drafter.packing import unpack
from drafter.sampling import GREEDY, Sampling
from drafter.target_checks import (
    check_cached_pass,
    find_parts,
    fingerprint,
    match_embedding,
    match_head,
    probe,
)
from drafter.target_loading import Loaded, load_model_and_tokenizer
from drafter.target_masks import AttentionMasks, checked_tree_masks
from drafter.target_session import TargetSession, frozen

__all__ = [
    "Features",
    "Response",
    "Target",
    "TargetSession",
    "assert_finite_features",
    "check_layer_ids",
    "default_layer_ids",
]


class Features(NamedTuple):
    """What the drafter reads of the target."""

    hidden_states: Tensor
    """(B, S, L*D), tapped layers side by side in the order asked for; zero at padding."""
    last_hidden: Tensor | None
    """(B, S, D) after the final norm, what the head reads; None unless asked for."""


class _LastTap(Exception):
    """Leaves the decoder after the last tapped layer."""


class Target:
    """A frozen causal language model. A plain object, so that no module tree ever owns it.

    Attributes:
        path: What it was loaded from.
        gguf_file: The GGUF file's name, or None.
        model: The transformers model, eval mode, no gradients.
        tokenizer: Its tokenizer.
        config: Its (text) config.
        head: Its output projection with scaling and soft-capping.
        layers: Its decoder layers.
        final_norm: The norm before the head.
        spread: Whether its layers lie on several devices.
        fingerprint: Short hash of config, tokenizer and samples of the weights.
    """

    def __init__(
        self,
        loaded: Loaded,
        path: str,
        gguf_file: str | None,
        device: torch.device | None = None,
        spread: bool = False,
    ) -> None:
        # cuDNN's attention plans anew for every length that it has not seen: 60 ms a decoded token
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.path = path
        self.gguf_file = gguf_file
        self.spread = spread
        self.model = loaded.model.eval().requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self.config = self.model.config.get_text_config()
        self._base, self.layers, self.final_norm = find_parts(self.model, path)
        self._embedding: nn.Module = self.model.get_input_embeddings()
        # renamed in transformers 5.24; the old name goes in 5.40
        parameters = inspect.signature(self._base.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        with frozen(self.model.device):
            ran = probe(self.model, self._base, self.layers)
            self.head = match_head(self.model, ran, path)
            self._embedding_scale = match_embedding(self.model, ran, path)
            check_cached_pass(self, ran)
        self.head = self.head.to(device or self.head.weight.device)
        self.fingerprint = fingerprint(self.model, self.tokenizer)

    @classmethod
    def load(
        cls,
        path: str,
        gguf_file: str | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        device_map: str | dict[str, Any] | None = None,
    ) -> Target:
        """Returns a frozen target.

        Args:
            path: Hub id, folder, or .gguf file.
            gguf_file: Name of the GGUF file inside `path`.
            dtype: "auto" for the checkpoint's (fp32 for GGUF), or a torch dtype's name.
            device: Where to put it.
            revision: Hub revision.
            trust_remote_code: Run code from the repository.
            attn_implementation: As transformers names it; None for its choice (SDPA where the model
                has it).
            device_map: Spread the layers over several GPUs of this process, as transformers does:
                `auto`, `balanced`, `sequential` or module names to devices. What it gives is on
                `device`.

        Raises:
            UserError: There is no such model, it lacks tensors, its tokenizer is another model's,
                its layers keep recurrent state, or it computes embeddings or logits in a way that
                is not known here.
        """
        loaded = load_model_and_tokenizer(
            path,
            gguf_file=gguf_file,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            device_map=device_map,
        )
        if device_map is None:
            loaded.model.to(torch.device(device))
        return cls(loaded, path, gguf_file, torch.device(device), device_map is not None)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.config.hidden_size)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """V, rows of the embedding."""
        return len(self._embedding.weight)  # type: ignore[arg-type]

    @property
    def embedding_weight(self) -> Tensor:
        """(V, D), as stored: without the scaling that `embed` applies."""
        weight = self._embedding.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def embedding_scale(self) -> float:
        """What `embed` multiplies rows of the embedding with.

        Raises:
            UserError: `embed` does something else to them than scaling.
        """
        own = getattr(self._embedding, "embed_scale", 1.0)  # Gemma's module scales by itself
        scale = float(self._embedding_scale) * float(own)
        ids = torch.arange(min(8, self.vocab_size), device=self.device)
        rows = self.embedding_weight[ids]
        if not torch.allclose(self.embed(ids), (rows * scale).to(rows.dtype), rtol=1e-2):
            raise UserError(
                f"The target {self.path} changes its embeddings in a way that a feature cache "
                "can't keep; train online."
            )
        return scale

    @property
    def max_length(self) -> int:
        """Longest context in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a response."""
        generation = getattr(self.model, "generation_config", None)
        found: list[int] = []
        for value in (
            getattr(generation, "eos_token_id", None),
            self.config.eos_token_id,
            self.tokenizer.eos_token_id,
        ):
            found += value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(sorted({int(token) for token in found}))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.head.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Returns embeddings (..., D) of token ids (...), with the target's own scaling."""
        with frozen(self.device):
            out: Tensor = self._embedding(ids).to(ids.device)  # spread: it may lie elsewhere
            return out if self._embedding_scale == 1.0 else out * self._embedding_scale

    def let_go(self) -> None:
        """Frees what was loaded for one use: nothing of a target that is run in any case."""

    def features(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        layer_ids: Sequence[int],
        last_hidden: bool = False,
        packed: bool | None = None,
    ) -> Features:
        """Returns states of tapped layers.

        Documents packed into one row never see each other: each is run on its own.

        Args:
            input_ids: (B, S) int64.
            document_ids: (B, S) int64; a document's tokens are adjacent; -1 at padding.
            layer_ids: Tapped layers, L.
            last_hidden: Also return what the head reads; without it, layers after the last tap do
                not run.
            packed: False if every row is known to be one document from its start; None looks, and
                waits for the device.
        """
        with frozen(self.device):
            documents = unpack(input_ids, document_ids, packed)
            # right-padded rows of one document each: causal attention keeps padding out of sight
            last, taps = self.run(
                layer_ids, taps_only=not last_hidden, input_ids=documents.input_ids
            )
            return Features(documents.pack(taps), documents.pack(last) if last_hidden else None)

    def check_layers(self, layer_ids: Sequence[int]) -> None:
        """Raises UserError unless it can give these layers' states; the target itself gives all."""
        check_layer_ids(layer_ids, self.num_layers)

    def kept_features(self, tokens: Sequence[int], layer_ids: Sequence[int]) -> Tensor | None:
        """Returns features (1, S, L*D) that are kept somewhere, or None; here none are."""
        return None

    def run(
        self,
        layer_ids: Sequence[int],
        cache: DynamicCache | None = None,
        *,
        taps_only: bool = False,
        **inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Runs the decoder without its head.

        Args:
            layer_ids: Tapped layers, L; may be empty.
            cache: Keys and values to read and append to.
            taps_only: Stop after the last tapped layer (not with a cache).
            **inputs: `input_ids` (B, S) and, where needed, `attention_mask` and `position_ids`.

        Returns:
            (B, S, D) states after the final norm (empty with `taps_only`), and (B, S, L*D) tapped
            states.
        """
        assert not taps_only or (layer_ids and cache is None)
        kept: dict[int, Tensor] = {}
        final = max(layer_ids) if taps_only else None

        def keep(layer_id: int) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                kept[layer_id] = output[0] if isinstance(output, tuple) else output
                if layer_id == final:
                    raise _LastTap

            return hook

        handles = [self.layers[i].register_forward_hook(keep(i)) for i in set(layer_ids)]
        extra: dict[str, Any] = {} if cache is None else {self._cache_argument: cache}
        with frozen(self.device):
            try:
                out = self._base(**inputs, **extra, use_cache=cache is not None)
                last: Tensor = out.last_hidden_state
            except _LastTap:
                last = kept[max(layer_ids)][:, :0]
            finally:
                for handle in handles:
                    handle.remove()
            device = inputs["input_ids"].device  # a spread target's layers lie elsewhere
            last, taps = last.to(device), [kept[i].to(device) for i in layer_ids]
            return last, torch.cat(taps, -1) if taps else last[..., :0]

    @cached_property
    def tree_masks(self) -> AttentionMasks:
        """What trees of drafts are verified with; made, and looked at, once.

        Raises:
            UserError: It can't, or does not read the masks as they are meant.
        """
        return checked_tree_masks(self)

    def session(self) -> TargetSession:
        """Returns an empty KV cache for decoding one prompt."""
        return TargetSession(self)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        seed: int = 0,
        prompt_ids: Sequence[int] | None = None,
        batch_size: int = 32,
        progress: bool | tqdm = False,
        watch: Watch | None = None,
    ) -> list[Response]:
        """Returns the target's responses; see `drafter.generation.generate`."""
        for index, prompt in enumerate(prompts):
            self.check_length(len(prompt), max_new_tokens, f"Prompt {index}")
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise UserError(
                    f"Prompt {index} holds a token id outside the target's vocabulary of "
                    f"{self.vocab_size}; tokenise it with the target's own tokenizer."
                )
        return generate(
            self,
            prompts,
            max_new_tokens,
            sampling,
            seed=seed,
            prompt_ids=prompt_ids,
            batch_size=batch_size,
            progress=progress,
            watch=watch,
        )

    def check_length(self, prompt_tokens: int, max_new_tokens: int, name: str = "A prompt") -> None:
        """Raises UserError unless prompt and response fit the target's context."""
        if prompt_tokens < 1:
            raise UserError(f"{name} is empty; a response needs at least one token before it.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if prompt_tokens + max_new_tokens > self.max_length:
            raise UserError(
                f"{name} of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the "
                f"target's context of {self.max_length}; lower max_new_tokens or shorten prompts."
            )
