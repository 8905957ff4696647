"""What is found out about a target when it is loaded, by running it on a few tokens.

A transformation of logits or embeddings that is not known here would train and measure nonsense
without any error, so head, embedding and cache are compared with the model's own forward pass.

Legend: S probe tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from drafter.errors import UserError
from drafter.head import FrozenHead

if TYPE_CHECKING:
    from drafter.target import Target

PROBE_TOKENS = 8
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")
LOGIT_SCALES = (
    ("logit_scale", 1),  # Cohere multiplies
    ("logits_scaling", -1),  # Granite divides
    ("logits_scaling", 1),  # HyperCLOVA X multiplies
)
"""Config fields that scale logits, and their power; the probe tells which is meant."""


class Probe(NamedTuple):
    """One pass over a few tokens."""

    ids: Tensor
    """(1, S)"""
    embedded: Tensor
    """(1, S, D), what the first layer read."""
    last_hidden: Tensor
    """(1, S, D), after the final norm."""
    logits: Tensor
    """(1, S, V), the model's own."""


def find_parts(model: Any, path: str) -> tuple[nn.Module, nn.ModuleList, nn.Module]:
    """Returns (decoder without head, its layers, its final norm).

    Raises:
        UserError: It is not built like a decoder-only language model.
    """
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    norms = [getattr(decoder, name) for name in FINAL_NORMS if hasattr(decoder, name)]
    if (
        not isinstance(layers, nn.ModuleList)
        or not norms
        or model.get_output_embeddings() is None
        or model.get_input_embeddings() is None
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        raise UserError(
            f"The target {path} ({type(model).__name__}) is not a plain causal language model "
            "(token embedding, decoder layers, final norm, head)."
        )
    if getattr(model, "_is_stateful", False):
        raise UserError(
            f"The target {path} ({type(model).__name__}) keeps recurrent state, which can't be "
            "taken back after a rejected draft; only attention layers are supported."
        )
    return decoder, layers, norms[0]


def probe(model: Any, decoder: nn.Module, layers: nn.ModuleList) -> Probe:
    """Runs model and decoder on tokens spread over the vocabulary."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(PROBE_TOKENS, device=model.device).unsqueeze(0) * rows // PROBE_TOKENS
    seen: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(
            arguments[0] if arguments else keywords["hidden_states"]
        ),
        with_kwargs=True,
    )
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return Probe(ids, seen[0], decoder(input_ids=ids, use_cache=False).last_hidden_state, logits)


def match_head(model: Any, ran: Probe, path: str) -> FrozenHead:
    """Returns the output projection with the scaling and soft-capping that the family puts behind.

    Raises:
        UserError: No known one gives the model's logits.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    named = [(getattr(config, name, None), power) for name, power in LOGIT_SCALES]
    for scale in [float(value) ** power for value, power in named if value] or [1.0]:
        head = FrozenHead(
            output.weight.detach(), None if bias is None else bias.detach(), scale, cap
        )
        # low precision: the model rounds its own logits, after each step it takes with them
        last = ran.last_hidden.to(head.weight.device)  # elsewhere, if the target is spread
        if _close(head.logits(last), ran.logits, _bound(ran, 1e-3, 0.03)):
            return head
    raise UserError(
        f"The target {path} ({type(model).__name__}) computes its logits in a way that is not "
        "known here (beyond a linear head with scaling and soft-capping), or they are not finite; "
        "it can't be a target."
    )


def match_embedding(model: Any, ran: Probe, path: str) -> float:
    """Returns the factor between the embedding module's output and what the first layer reads.

    Raises:
        UserError: Something else is done to embeddings, such as adding learned positions.
    """
    embedded = model.get_input_embeddings()(ran.ids)
    named = getattr(model.config.get_text_config(), "embedding_multiplier", None)  # Granite
    for scale in (float(named or 1.0), 1.0):
        if _close(embedded * scale, ran.embedded, _bound(ran, 1e-5, 1e-2)):
            return scale
    raise UserError(
        f"The target {path} ({type(model).__name__}) changes its embeddings before the first layer "
        "in a way that is not known here, so it can't be a target."
    )


def check_cached_pass(target: Target, ran: Probe) -> None:
    """Decodes the probe in pieces, with a crop between them, and compares with the whole pass.

    Raises:
        UserError: The result differs: layers keep something else than keys and values.
    """
    ids = ran.ids[0]
    half = PROBE_TOKENS // 2
    try:
        session = target.session()
        first, _ = session.forward(ids[:half], ())
        session.forward(ids[:half].flip(0), ())
        session.crop(half)
        second, _ = session.forward(ids[half:], ())
        same = _close(torch.cat((first, second)), ran.last_hidden[0], _bound(ran, 1e-3, 0.1))
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError):
        same = False  # some layers break on a plain cache of keys and values
    if not same:
        raise UserError(
            f"The target {target.path} ({type(target.model).__name__}) gives other states with a "
            "cache of keys and values than without; it can't be decoded speculatively."
        )


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Returns 16 hex digits over config, tokenizer and a sample of every weight."""
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "quantization_config"):
        config.pop(volatile, None)
    digest.update(repr(sorted(config.items(), key=str)).encode())
    digest.update(str(getattr(tokenizer, "chat_template", None)).encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    for name, sample, shape in _samples(model):
        digest.update(f"{name}{shape}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(model: Any) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.flatten()
        # rounded to bf16, so that a load at another precision is the same target
        sample = flat[:: max(1, len(flat) // 64)].bfloat16().float().cpu()
        yield name, sample, tuple(tensor.shape)


def _bound(ran: Probe, full: float, low: float) -> float:
    """The relative difference that rounding explains, at full or at 16-bit precision."""
    return low if ran.last_hidden.dtype in (torch.bfloat16, torch.float16) else full


def _close(ours: Tensor, theirs: Tensor, bound: float) -> bool:
    """Whether the largest difference is within a bound relative to the largest value."""
    ours, theirs = ours.float(), theirs.float().to(ours.device)
    difference = float((ours - theirs).abs().max())
    return difference <= bound * float(theirs.abs().max())  # false for NaN
