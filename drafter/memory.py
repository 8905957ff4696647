"""What one training step takes of the accelerator's memory, by part, before the first step.

Legend: B rows, S context tokens, A anchors per row, K block size, Q = A*K block slots per row,
D hidden size, L tapped layers, H heads, G key/value heads, E head size, V vocabulary, C slots in a
chunk of the head.

The peak is at the end of the forward pass, while the head scores a chunk: all that the backward
pass will read is there by then, and so are the gradients of the step before, which Lightning drops
just before the backward pass. Not counted: target and kept features, the target's own pass over a
batch, the CUDA context, fragments, and what `compile_drafter`, `cuda_graphs` (two to four steps'
memory) or `log_gradient_norms_every` change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from drafter.config import DrafterConfig
from drafter.head import FrozenHead

FP32 = 4  # bytes of a weight, a statistic and the residual stream, whatever the precision

_SETTINGS = {
    "weights": "model.num_layers or model.intermediate_size",
    "features": "data.batch_size, data.max_length or model.num_taps",
    "activations": "data.batch_size, data.num_anchors or data.max_length",
    "scoring": "data.batch_size or data.num_anchors",
}


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a rank's largest micro-batch, and how it is computed.

    Args:
        rows: B.
        tokens: S, tokens of the longest row after padding.
        anchors: A per row.
        vocab_size: V, rows of the target's head.
        chunk_rows: C, see `FrozenHead.chunk_rows`.
        compute_bytes: Bytes of a value in the matrix products: 2 under bf16-mixed, else 4.
        feature_bytes: Bytes of a value in the target's dtype.
        casts_features: Whether features are of another dtype than matrix products.
        attention: What `choose_attention` gives for these sizes.
        device: Kernels differ in what they keep. CUDA's RMSNorm keeps its input, the CPU's its
            normalised input too; under autocast CUDA's returns fp32, the CPU's its input's dtype.
        logit_buffers: Chunks of fp32 logits that live together, see `logit_buffers`.
        gradient_copies: 1; 2 under DDP without `gradient_as_bucket_view`.
        soft_labels: Whether a loss reads KL to the target's distribution.
        whole_scores: How many scores a loss reads that need all of that distribution.
        optimizer: AdamW or Muon. What Muon's step needs for itself, a gigabyte and a half at most
            unless one matrix is larger than 2^26 values, is seldom the peak and not counted.
    """

    rows: int
    tokens: int
    anchors: int
    vocab_size: int
    chunk_rows: int
    compute_bytes: int = FP32
    feature_bytes: int = FP32
    casts_features: bool = False
    attention: Literal["sdpa", "flex"] = "sdpa"
    device: Literal["cuda", "cpu"] = "cuda"
    logit_buffers: float = 1.5
    gradient_copies: int = 1
    soft_labels: bool = False
    whole_scores: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a step; they add up to `total`."""

    weights: int
    """fp32 parameters."""
    gradients: int
    """fp32, of the step before."""
    optimizer: int
    """Two moments in fp32 (AdamW), or one of the matrices (Muon)."""
    weight_copies: int
    """Matrices in the compute dtype, made by autocast in every step."""
    features: int
    """The batch's tapped hidden states (B, S, L*D), in the target's dtype."""
    activations: int
    """What the drafter's forward keeps for its backward, and attention's mask."""
    scoring: int
    """What `score_blocks` keeps, and what lives only while it runs."""

    @property
    def total(self) -> int:
        """Bytes at the step's peak, beyond what is allocated without the drafter."""
        return sum(dataclasses.astuple(self))

    def describe(self) -> str:
        """Returns one line in GB (1e9 bytes), largest part first, parts under 5 MB left out."""
        parts = sorted(dataclasses.asdict(self).items(), key=lambda part: -part[1])
        shown = [f"{k.replace('_', ' ')} {v / 1e9:.2f}" for k, v in parts if v >= 5e6]
        head = f"[memory] about {self.total / 1e9:.2f} GB a step"
        return f"{head}: {', '.join(shown)}" if shown else head

    def lines(self) -> list[str]:
        """Returns `describe`'s line, and one with the settings behind the largest share."""
        shares = {name: getattr(self, name) for name in _SETTINGS}
        shares["weights"] += self.gradients + self.optimizer + self.weight_copies
        largest = max(shares, key=lambda name: shares[name])
        return [self.describe(), f"To need less, lower {_SETTINGS[largest]}"]


def estimate_step(config: DrafterConfig, sizes: StepSizes) -> MemoryEstimate:
    """Returns the memory of one training step, in bytes, if every drafted slot is valid.

    Args:
        config: The drafter's; K, L, layers and widths are read from it.
        sizes: Of the largest micro-batch.
    """
    matrices, vectors = count_weights(config)
    weights = FP32 * (matrices + vectors)
    return MemoryEstimate(
        weights=weights,
        gradients=weights * sizes.gradient_copies,
        optimizer=2 * weights - FP32 * matrices * (sizes.optimizer == "muon"),
        weight_copies=matrices * sizes.compute_bytes if sizes.compute_bytes < FP32 else 0,
        features=sizes.rows * sizes.tokens * _widths(config)[3] * sizes.feature_bytes,
        activations=saved_activations(config, sizes),
        scoring=saved_scoring(config, sizes) + _scoring_peak(config, sizes),
    )


def count_weights(config: DrafterConfig) -> tuple[int, int]:
    """Returns how many values the drafter's matrices and its vectors (norms, biases) hold."""
    hidden, query, kv, taps = _widths(config)
    matrices = 2 * hidden * (query + kv) + 3 * hidden * config.intermediate_size
    vectors = 2 * hidden + 2 * config.head_dim
    if config.attention_bias:
        vectors += query + 2 * kv + hidden
    layers = config.num_hidden_layers
    once = 2 * hidden + (hidden + 1) * config.confidence_head
    return taps * hidden + layers * matrices, once + layers * vectors


def saved_activations(config: DrafterConfig, sizes: StepSizes) -> int:
    """Returns the bytes of the mask and of what `Drafter.forward` keeps for its backward pass."""
    hidden, query, kv, taps = _widths(config)
    layers, head = config.num_hidden_layers, config.head_dim
    value = sizes.compute_bytes
    cuda, sdpa = sizes.device == "cuda", sizes.attention == "sdpa"
    norm = FP32 if cuda else 2 * FP32  # per value: under autocast it keeps an fp32 copy too
    statistic = FP32  # per normalised vector
    rope = 2 * FP32 * head  # cos and sin

    normed = hidden * value  # a norm's output, in the dtype of the products that read it

    # a context token: fc and hidden_norm once, a normalised key in every layer
    context = taps * value if sizes.casts_features else 0
    context += norm * hidden + statistic + rope
    context += normed
    context += layers * (norm * kv + statistic * kv // head)

    # a block slot: two norms, attention (query, output, log-sum-exp) and SwiGLU in every layer
    block = 2 * (norm * hidden + statistic) + 2 * normed
    block += norm * (query + kv) + statistic * (query + kv) // head
    block += 2 * value * query + FP32 * query // head
    block += 4 * value * config.intermediate_size  # gate, up, silu(gate), their product
    if not (sdpa and cuda):
        block += value * query  # the output lies head by head: o_proj reads a copy
    block = layers * block + norm * hidden + statistic + rope
    if not cuda:
        block -= FP32 * hidden + statistic  # embeddings need no gradient: the first norm's input

    # keys and values of [context ; block], which SDPA needs repeated for all heads
    slots = sizes.anchors * config.block_size
    keys = sizes.tokens + slots
    row = sizes.tokens * context + slots * block
    row += keys * layers * 2 * value * (query if sdpa else kv)
    if sdpa:
        masks = len(set(config.layer_attention))
        row += slots * keys * (masks + layers * value)  # every layer turns its mask into numbers
    return int(sizes.rows * row)


def logit_buffers(head: FrozenHead, whole: bool = False) -> float:
    """Returns how many chunks of fp32 logits live together while a head scores one.

    Args:
        head: The target's.
        whole: Whether scores of whole distributions are among them.
    """
    if whole:
        return 7.0
    if head.softcap is not None:
        return 3.0
    if head.bias is not None or head.scale != 1.0:
        return 2.0
    # the exponentials take the logits' place; a low-precision head's product needs a copy of them
    return 1.0 + (head.weight.element_size() % FP32) / FP32


def saved_scoring(config: DrafterConfig, sizes: StepSizes) -> int:
    """Returns the bytes that `score_blocks` keeps: a slope, an index and log q per slot.

    With soft labels a second slope, KL(p || q) and the slot's position come to that; with scores
    of whole distributions one more of each.
    """
    scored = sizes.rows * sizes.anchors * config.num_drafted
    a_slot = FP32 * config.hidden_size + 8 + FP32
    return int(scored * a_slot * (1 + sizes.soft_labels + sizes.whole_scores))


def _scoring_peak(config: DrafterConfig, sizes: StepSizes) -> int:
    """Returns the bytes that live only while scoring runs, or just before it if that is more."""
    hidden, _, kv, _ = _widths(config)
    scored = sizes.rows * sizes.anchors * config.num_drafted
    states = FP32 * hidden * (sizes.rows * sizes.anchors * config.block_size + 2 * scored)
    if sizes.soft_labels:  # a mean row and an entropy for each position, and again for each slot
        states += FP32 * (hidden + 1) * (sizes.rows * sizes.tokens + scored)
    if sizes.whole_scores:  # the target's state at each slot, in the head's dtype
        states += sizes.feature_bytes * hidden * scored
    logits = min(scored, sizes.chunk_rows) * sizes.vocab_size
    chunk = FP32 * sizes.logit_buffers * logits
    # the context's keys and values, as encoded, live until the last layer is done
    encoded = config.num_hidden_layers * 2 * sizes.compute_bytes * kv * sizes.rows * sizes.tokens
    return int(max(states + chunk, encoded - saved_scoring(config, sizes)))


def _widths(config: DrafterConfig) -> tuple[int, int, int, int]:
    """Returns D, H*E, G*E and L*D."""
    hidden, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
    kv_heads = config.num_key_value_heads or heads
    return hidden, heads * head, kv_heads * head, len(config.target_layer_ids) * hidden
