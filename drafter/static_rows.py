"""What decoders on fixed shapes share: rows of prompts at fixed addresses on the device.

Legend: B rows (prompts side by side), N drafted slots, K = N + 1 block size, S places of a row, L
tapped layers, D hidden size, V vocabulary, n tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafter.attention import build_visibilities
from drafter.blocks import block_input_ids
from drafter.errors import UserError
from drafter.graphs import CudaRecorder, Recorder
from drafter.model import DraftContext, Drafter
from drafter.sampling import GeneratorSource, Sampling, argmax, draw, warp
from drafter.static_target import StaticTarget, asks_the_host, write
from drafter.target import Target
from drafter.target_session import frozen

ALIGNED = 16  # places of a row: attention's kernels copy masks of other widths


class StaticRows:
    """Where every row stands, its random numbers, and the caches of both models.

    A row's anchor is its newest token, not yet run; `_length_B` counts those before it, and
    `_emitted_B` those of the response, the anchor included.

    Args:
        target: The frozen target.
        drafter: None for the target alone.
        rows: B.
        length: The most tokens of prompt and response.
        behind: Places that passes write behind them, at most.
        sampling: How the target's tokens are chosen.
        recorder: None for CUDA graphs on a GPU, and for running kernel by kernel on a CPU.

    Raises:
        UserError: The target's attention, or the drafter's rope, needs the host.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        rows: int,
        length: int,
        behind: int,
        sampling: Sampling,
        recorder: Recorder | None,
    ) -> None:
        self.target = target
        self.drafter = drafter
        self.sampling = sampling
        self.block_size = 1 if drafter is None else drafter.config.block_size
        self.length = length
        if drafter is not None and asks_the_host(drafter.config):
            raise UserError(
                f"The drafter's rope is of type {asks_the_host(drafter.config)}, which asks the "
                "host for a length; decode it kernel by kernel."
            )
        places_of_a_row = -(-(length + behind) // ALIGNED) * ALIGNED
        self._layer_ids = () if drafter is None else drafter.config.target_layer_ids
        device = target.device
        with frozen(device):
            self._static = StaticTarget(target, self._layer_ids, rows=rows, length=places_of_a_row)
            places = torch.zeros(rows, dtype=torch.long, device=device)
            self._anchor_B, self._length_B, self._emitted_B = (places.clone() for _ in range(3))
            self._uniforms_BR = places.new_zeros(rows, self._static.length, dtype=torch.double)
            self._documents_BS = places.new_zeros(rows, self._static.length)
            self._context = self._empty_context()
        self._recorder = recorder or (CudaRecorder() if device.type == "cuda" else None)

    @property
    def rows(self) -> int:
        """B."""
        return self._static.rows

    # ------------------------------------------------------------------ on the device

    def _denoise(self) -> Tensor:
        """Returns the drafter's states (B, N, D) of the slots behind every row's anchor."""
        assert self.drafter is not None
        offsets_K = torch.arange(self.block_size, device=self.target.device)
        config = self.drafter.config
        anchors_B1 = self._length_B[:, None]
        visibility = build_visibilities(
            config.layer_attention, anchors_B1, self._documents_BS, self.block_size, "sdpa"
        )
        block_ids = block_input_ids(self._anchor_B[:, None], self.block_size, config.mask_token_id)
        hidden_BAKD = self.drafter.denoise(
            self.target.embed(block_ids),
            (anchors_B1 + offsets_K)[:, None],
            self._context,
            visibility,
        )
        return hidden_BAKD[:, 0, 1:]

    def _choose(self, logits: Tensor, places: Tensor, rows: slice = slice(None)) -> Tensor:
        """Returns the target's tokens (B, n) at places (B, n) of the responses."""
        if self.sampling.greedy:
            return argmax(logits)
        last = self._uniforms_BR.shape[1] - 1
        uniforms = self._uniforms_BR[rows].gather(1, places.clamp(max=last))
        return draw(warp(logits, self.sampling), uniforms)

    def _empty_taps(self, count: int) -> Tensor:
        """Returns (B, count, L*D) zeros, as the tapped layers of a pass give."""
        width = len(self._layer_ids) * self.target.hidden_size
        return self.target.embedding_weight.new_zeros(self.rows, count, width)

    def _empty_context(self) -> DraftContext:
        if self.drafter is None:
            return DraftContext()
        config, weights = self.drafter.config, self.drafter.fc.weight
        heads = config.num_key_value_heads or config.num_attention_heads
        shape = (self.rows, heads, self._static.length, config.head_dim)
        layers = range(config.num_hidden_layers)
        return DraftContext(*([weights.new_zeros(shape) for _ in layers] for _ in range(2)))

    def _take_in(self, taps: Tensor, positions_Bn: Tensor, rows: slice = slice(None)) -> None:
        """Writes features to the drafter's context; what lies behind an anchor is not seen yet."""
        if self.drafter is None:
            return
        new = self.drafter.encode_context(taps, positions_Bn)
        for buffers, states in ((self._context.keys, new.keys), (self._context.values, new.values)):
            for buffer, state in zip(buffers, states, strict=True):
                write(buffer[rows], state, positions_Bn)

    def _prefill(
        self,
        row: int,
        prompt_ids: Sequence[int],
        source: GeneratorSource | None,
        max_new_tokens: int,
    ) -> Tensor:
        """Runs a prompt, and puts its row where the first round begins.

        Returns:
            (1, 1) the response's first token.
        """
        device, count = self.target.device, len(prompt_ids)
        rows = slice(row, row + 1)
        with frozen(device):
            ids_1P = sent(torch.tensor([list(prompt_ids)]), device)
            positions_1P = torch.arange(count, device=device)[None]
            last_1PD, taps = self._static.run(ids_1P, positions_1P, rows)
            self._take_in(taps, positions_1P, rows)
            if source is not None:
                uniforms = torch.stack([source.uniform() for _ in range(max_new_tokens)])
                self._uniforms_BR[row, :max_new_tokens] = sent(uniforms, device)
            logits_11V = self.target.head.logits(last_1PD[:, -1:])
            first_11 = self._choose(logits_11V, torch.zeros_like(positions_1P[:, :1]), rows)
            self._anchor_B[row] = first_11[0, 0]
            self._length_B[row] = count
            self._emitted_B[row] = 1
        return first_11

    # ------------------------------------------------------------------ on the host

    def _record(self, work: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
        """Returns what does `work` from where `state` stands now, whatever recording did to it."""

        def done() -> None:
            with frozen(self.target.device):
                work()

        if self._recorder is None:
            return done
        kept = [tensor.clone() for tensor in state]
        self._recorder.rehearse(done)
        torch._foreach_copy_(list(state), kept)
        recorded = self._recorder(done)
        torch._foreach_copy_(list(state), kept)
        return recorded

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sources: Sequence[GeneratorSource] | None,
    ) -> None:
        """Raises UserError unless all prompts, and what comes of them, can be decoded."""
        for place, prompt in enumerate(prompts):
            self.target.check_length(len(prompt), max_new_tokens, f"Prompt {place}")
        if sources is None and not self.sampling.greedy:
            raise UserError("sampled decoding needs a source of random numbers for each prompt")
        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.length:
            raise UserError(
                f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the decoder's "
                f"length of {self.length}; make it with a larger one."
            )


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a host tensor on the device, without waiting for what runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
