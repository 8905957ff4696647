"""The frozen target: loads it, gives features, logits through its own head, and responses.

Legend: B rows, S tokens per row, L tapped layers, D hidden size, V vocabulary (embedding rows),
P documents of a batch.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from drafter.errors import UserError
from drafter.generation import Response, generate
from drafter.head import FrozenHead
from drafter.layer_ids import assert_finite_features, check_layer_ids, default_layer_ids
from drafter.sampling import GREEDY, Sampling
from drafter.target_loading import Loaded, load_model_and_tokenizer

__all__ = [
    "Features",
    "Response",
    "Target",
    "TargetSession",
    "assert_finite_features",
    "check_layer_ids",
    "default_layer_ids",
]

PROBE_TOKENS = 6


class Features(NamedTuple):
    """What the drafter reads of the target."""

    hidden_states: Tensor
    """(B, S, L*D), tapped layers side by side in the order asked for; zero at padding."""
    last_hidden: Tensor | None
    """(B, S, D) after the final norm, what the head reads; None unless asked for."""


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
        fingerprint: Short hash of config, tokenizer and samples of the weights.
    """

    def __init__(self, loaded: Loaded, path: str, gguf_file: str | None) -> None:
        self.path = path
        self.gguf_file = gguf_file
        self.model = loaded.model.eval().requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self.config = self.model.config.get_text_config()
        self._base: nn.Module = self.model.get_decoder()
        self.layers: nn.ModuleList = self._base.layers  # type: ignore[assignment]
        self.final_norm: nn.Module = self._base.norm  # type: ignore[assignment]
        self._embedding: nn.Module = self.model.get_input_embeddings()
        self.head = _head_of(self.model, self.config)
        # renamed in transformers 5.24; the old name goes in 5.40
        parameters = inspect.signature(self._base.forward).parameters
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._check_head_and_embedding()
        self.fingerprint = _fingerprint(self.model, self.tokenizer)

    @classmethod
    def load(
        cls,
        path: str,
        gguf_file: str | None = None,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        revision: str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str = "sdpa",
    ) -> Target:
        """Returns a frozen target.

        Args:
            path: Hub id, folder, or .gguf file.
            gguf_file: Name of the GGUF file inside `path`.
            dtype: "auto" for the checkpoint's (fp32 for GGUF), or a torch dtype's name.
            device: Where to put it.
            revision: Hub revision.
            trust_remote_code: Run code from the repository.
            attn_implementation: As transformers names it.

        Raises:
            UserError: There is no such model, it lacks tensors, its layers keep recurrent state, or
                it computes embeddings or logits in a way that is not known here.
        """
        loaded = load_model_and_tokenizer(
            path,
            gguf_file=gguf_file,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        loaded.model.to(torch.device(device))
        return cls(loaded, path, gguf_file)

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
        return int(self._embedding.weight.shape[0])

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

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Returns embeddings (..., D) of token ids (...), with the target's own scaling."""
        out: Tensor = self._embedding(ids)
        return out

    @torch.no_grad()
    def features(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        layer_ids: Sequence[int],
        last_hidden: bool = False,
    ) -> Features:
        """Returns states of tapped layers.

        Documents packed into one row never see each other: each is run on its own.

        Args:
            input_ids: (B, S) int64.
            document_ids: (B, S) int64; a document's tokens are adjacent; -1 at padding.
            layer_ids: Tapped layers, L.
            last_hidden: Also return what the head reads.
        """
        real_BS = document_ids >= 0
        if bool((document_ids == torch.where(real_BS, 0, -1)).all()):
            return self._features_of_padded(input_ids, real_BS, layer_ids, last_hidden)
        starts_BS = real_BS.clone()
        starts_BS[:, 1:] &= document_ids[:, 1:] != document_ids[:, :-1]
        document_BS = starts_BS.flatten().cumsum(0).view_as(document_ids) - 1
        lengths_P = torch.bincount(document_BS[real_BS])
        offsets = torch.arange(int(lengths_P.max()), device=input_ids.device)
        inside_PS = offsets < lengths_P[:, None]
        unpacked = torch.zeros_like(inside_PS, dtype=torch.long)
        unpacked[inside_PS] = input_ids[real_BS]
        parts = self._features_of_padded(unpacked, inside_PS, layer_ids, last_hidden)

        def pack(states_PSF: Tensor) -> Tensor:
            out = states_PSF.new_zeros(*input_ids.shape, states_PSF.shape[-1])
            out[real_BS] = states_PSF[inside_PS]
            return out

        last = None if parts.last_hidden is None else pack(parts.last_hidden)
        return Features(pack(parts.hidden_states), last)

    def _features_of_padded(
        self, input_ids: Tensor, real_BS: Tensor, layer_ids: Sequence[int], last_hidden: bool
    ) -> Features:
        """Right-padded rows of one document each; causal attention keeps padding out of sight."""
        last, taps = self.run(layer_ids, input_ids=input_ids, attention_mask=real_BS.long())
        keep = real_BS.unsqueeze(-1)
        return Features(
            taps.masked_fill(~keep, 0.0), last.masked_fill(~keep, 0.0) if last_hidden else None
        )

    @torch.no_grad()
    def run(
        self, layer_ids: Sequence[int], cache: DynamicCache | None = None, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the decoder without its head.

        Args:
            layer_ids: Tapped layers, L; may be empty.
            cache: Keys and values to read and append to.
            **inputs: `input_ids` (B, S) and, where needed, `attention_mask` and `position_ids`.

        Returns:
            (B, S, D) states after the final norm, and (B, S, L*D) tapped states.
        """
        kept: dict[int, Tensor] = {}

        def keep(layer_id: int) -> Any:
            def hook(module: nn.Module, arguments: Any, output: Any) -> None:
                kept[layer_id] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self.layers[i].register_forward_hook(keep(i)) for i in layer_ids]
        try:
            extra = {} if cache is None else {self._cache_argument: cache}
            out = self._base(**inputs, **extra, use_cache=cache is not None)
        finally:
            for handle in handles:
                handle.remove()
        last: Tensor = out.last_hidden_state
        taps = [kept[i] for i in layer_ids]
        return last, torch.cat(taps, -1) if taps else last[..., :0]

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
        progress: bool = False,
    ) -> list[Response]:
        """Returns the target's responses; see `drafter.generation.generate`."""
        for prompt in prompts:
            self.check_length(len(prompt), max_new_tokens)
        return generate(
            self,
            prompts,
            max_new_tokens,
            sampling,
            seed=seed,
            prompt_ids=prompt_ids,
            batch_size=batch_size,
            progress=progress,
        )

    def check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raises UserError unless prompt and response fit the target's context."""
        if prompt_tokens < 1:
            raise UserError("A prompt is empty; a response needs at least one token before it.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if prompt_tokens + max_new_tokens > self.max_length:
            raise UserError(
                f"A prompt of {prompt_tokens} tokens and {max_new_tokens} new ones exceed the "
                f"target's context of {self.max_length}; lower max_new_tokens or shorten prompts."
            )

    @torch.no_grad()
    def _check_head_and_embedding(self) -> None:
        """Compares head and embedding with the model's own on a few tokens.

        An unknown transformation of logits or embeddings would train and measure nonsense.
        """
        ids = torch.arange(PROBE_TOKENS, device=self.device).unsqueeze(0) % self.vocab_size
        seen: list[Tensor] = []
        hook = self.layers[0].register_forward_pre_hook(
            lambda module, arguments, keywords: seen.append(
                arguments[0] if arguments else keywords["hidden_states"]
            ),
            with_kwargs=True,
        )
        expected = self.model(input_ids=ids, use_cache=False).logits.float()
        hook.remove()
        last, _ = self.run((), input_ids=ids)
        logits = self.head.logits(last)
        # bf16 logits are rounded to 8 bits by the model itself
        bound = 1e-3 if self.dtype == torch.float32 else 0.03
        scale = float(expected.abs().max().clamp(min=1.0))
        if (
            not torch.isfinite(expected).all()
            or float((logits - expected).abs().max()) > bound * scale
        ):
            raise UserError(
                f"{self.path}: {type(self.model).__name__} computes its logits in a way that is not "
                "known here (beyond a linear head with scaling and soft-capping), so it can't be "
                "a target."
            )
        if not torch.allclose(seen[0], self.embed(ids), atol=bound, rtol=bound):
            raise UserError(
                f"{self.path}: {type(self.model).__name__} changes its embeddings in a way that is "
                "not known here, so it can't be a target."
            )


class TargetSession:
    """Keys and values of one prompt and what follows it.

    Every layer keeps the whole context, sliding-window ones too (the mask still slides): so a crop
    after a rejected draft can't have lost what it needs.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._cache = DynamicCache()
        self.length = 0
        """Tokens held."""

    def forward(self, ids: Tensor, layer_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Appends tokens.

        Args:
            ids: (n,) int64.
            layer_ids: Tapped layers, L.

        Returns:
            (n, D) states after the final norm, (n, L*D) tapped states.
        """
        positions = torch.arange(self.length, self.length + len(ids), device=ids.device)
        last, taps = self._target.run(
            layer_ids,
            self._cache,
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
        )
        self.length += len(ids)
        return last[0], taps[0]

    def crop(self, length: int) -> None:
        """Keeps the first `length` tokens."""
        assert 0 < length <= self.length
        if length < self.length:
            # a positive argument means something else in each version of transformers
            self._cache.crop(length - self.length)
            self.length = length


def _head_of(model: Any, config: Any) -> FrozenHead:
    """Returns the model's output projection with the scalings that families put behind it."""
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return FrozenHead(
        output.weight.detach(),
        None if bias is None else bias.detach(),
        scale,
        None if softcap is None else float(softcap),
    )


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Returns 16 hex digits over config, tokenizer and a sample of every weight."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        config.pop(volatile, None)
    digest.update(repr(sorted(config.items(), key=str)).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def is_gguf(path: str) -> bool:
    """Returns whether a path names a GGUF file."""
    return Path(path).suffix == ".gguf"
