"""Batched responses of the target, greedy or sampled.

Legend: B prompts of a batch, S padded prompt length, V vocabulary.

Random numbers are keyed by (seed, prompt, position), so a response does not depend on the company
that its prompt is generated in.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from drafter.errors import UserError
from drafter.sampling import STREAM_TARGET, Sampling, argmax, draw, keyed_uniforms, warp
from drafter.target_session import frozen

if TYPE_CHECKING:
    from drafter.target import Target


Watch = Callable[[int, int, Tensor], None]


@dataclass
class Response:
    """What the target answered.

    Attributes:
        ids: Token ids, with the EOS that ended it.
        log_probs: log p(token) under the warped distribution; empty when greedy.
        finished: Whether an EOS ended it rather than the limit.
    """

    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


def generate(
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    prompt_ids: Sequence[int] | None,
    batch_size: int,
    progress: bool | tqdm,
    watch: Watch | None = None,
) -> list[Response]:
    """Returns a response to every prompt, in the order given.

    Args:
        target: The frozen target.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit of a response.
        sampling: How tokens are chosen.
        seed: Of sampled responses.
        prompt_ids: With the seed, the keys of the random numbers; None for 0, 1, 2, ...
        batch_size: Prompts at once; those of similar length go together.
        progress: Show a bar; or a bar of the caller's to move on by every finished response.

        watch: Called with (prompt's place, step, its logits (V,)) for every token that is chosen.

    Raises:
        UserError: batch_size is not positive. (`Target.generate` checks the prompts.)
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    keys = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
    by_length = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    responses = [Response() for _ in prompts]
    with contextlib.ExitStack() as stack:
        bar = progress
        if isinstance(bar, bool):
            bar = stack.enter_context(
                tqdm(total=len(prompts), desc="target answers", unit="prompt", disable=not bar)
            )
        tokens, begun = 0, time.perf_counter()
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = _Batch(target, [prompts[i] for i in chosen], [keys[i] for i in chosen])
            if watch is not None:
                batch.watch = functools.partial(_watched, watch, chosen)
            answers = batch.run(max_new_tokens, sampling, seed, bar)
            for i, response in zip(chosen, answers, strict=True):
                responses[i] = response
                tokens += len(response.ids)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - begun):.0f} tokens/s")
    return responses


def _watched(watch: Watch, places: Sequence[int], row: int, step: int, logits_V: Tensor) -> None:
    watch(places[row], step, logits_V)


class _Batch:
    """Left-padded prompts and their cache; finished rows leave."""

    def __init__(
        self, target: Target, prompts: Sequence[Sequence[int]], keys: Sequence[int]
    ) -> None:
        longest = max(len(prompt) for prompt in prompts)
        device = target.device
        self.target = target
        self.keys = list(keys)
        self.ids_BS = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        self.mask_BS = torch.zeros_like(self.ids_BS)
        for row, prompt in enumerate(prompts):
            self.ids_BS[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=device)
            self.mask_BS[row, longest - len(prompt) :] = 1
        self.lengths_B = self.mask_BS.sum(1)
        self.cache = DynamicCache()  # whole context in every layer, see TargetSession
        self.watch: Watch | None = None

    def run(self, max_new_tokens: int, sampling: Sampling, seed: int, bar: tqdm) -> list[Response]:
        """Returns the responses, in the order of the prompts; moves `bar` on as each ends."""
        with frozen(self.target.device):
            uniforms_BN = self._uniforms(max_new_tokens, sampling, seed)
            return self._run(max_new_tokens, sampling, uniforms_BN, bar)

    def _uniforms(self, count: int, sampling: Sampling, seed: int) -> Tensor:
        """Returns (B, count) fp64 on the CPU, each row a function of (seed, key) alone."""
        if sampling.greedy:
            return torch.empty(len(self.keys), 0)
        rows = [keyed_uniforms(seed, key, count, STREAM_TARGET) for key in self.keys]
        return torch.from_numpy(np.stack(rows))

    def _run(
        self, max_new_tokens: int, sampling: Sampling, uniforms_BN: Tensor, bar: tqdm
    ) -> list[Response]:
        responses = [Response() for _ in self.keys]
        rows = list(range(len(self.keys)))  # which responses the batch's rows belong to
        ends = self.ids_BS.new_tensor(self.target.eos_token_ids)
        ids_BS, positions_BS = self.ids_BS, (self.mask_BS.cumsum(1) - 1).clamp(min=0)
        for step in range(max_new_tokens):
            last_BSD, _ = self.target.run(
                (),
                self.cache,
                input_ids=ids_BS,
                attention_mask=self.mask_BS,
                position_ids=positions_BS,
            )
            logits_BV = self.target.head.logits(last_BSD[:, -1])
            if self.watch is not None:
                for place, row in enumerate(rows):
                    self.watch(row, step, logits_BV[place])
            if sampling.greedy:
                chosen_B = argmax(logits_BV)
            else:
                probs_BV = warp(logits_BV, sampling)
                chosen_B = draw(probs_BV, uniforms_BN[rows, step])
                log_probs_B = probs_BV.gather(-1, chosen_B[:, None]).squeeze(-1).log()
                for row, log_prob in zip(rows, log_probs_B.tolist(), strict=True):
                    responses[row].log_probs.append(log_prob)
            tokens, ended = chosen_B.tolist(), torch.isin(chosen_B, ends).tolist()
            for row, token, end in zip(rows, tokens, ended, strict=True):
                responses[row].ids.append(token)
                responses[row].finished = end
            keep = [i for i, end in enumerate(ended) if not end and step + 1 < max_new_tokens]
            bar.update(len(rows) - len(keep))
            if not keep:
                break
            if len(keep) < len(rows):
                rows = [rows[i] for i in keep]
                index = torch.tensor(keep, device=chosen_B.device)
                # a spread target's layers keep theirs on several devices: the CPU's index fits all
                self.cache.batch_select_indices(index.cpu() if self.target.spread else index)
                self.mask_BS, chosen_B = self.mask_BS[index], chosen_B[index]
                self.lengths_B = self.lengths_B[index]
            ids_BS = chosen_B.unsqueeze(1)
            positions_BS = (self.lengths_B + step).unsqueeze(1)
            self.mask_BS = torch.cat((self.mask_BS, torch.ones_like(ids_BS)), 1)
        return responses
