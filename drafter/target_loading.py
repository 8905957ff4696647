"""Loads a target's weights and tokenizer, and refuses what could not be one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from drafter.errors import UserError

RECURRENT = ("mamba", "rwkv", "recurrent", "lfm2")  # model types, whatever layer_types says
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


class Loaded(NamedTuple):
    """A causal LM of transformers and its tokenizer."""

    model: Any
    tokenizer: Any


def load_model_and_tokenizer(
    path: str,
    *,
    gguf_file: str | None,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
    device_map: str | dict[str, Any] | None = None,
) -> Loaded:
    """Returns model and tokenizer, read from safetensors or GGUF only; see `Target.load`."""
    if dtype not in DTYPES:
        raise UserError(f"target_dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    folder, gguf_file = _locate(path, gguf_file)
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file:
        common["gguf_file"] = gguf_file
    source: dict[str, Any] = {} if gguf_file else {"use_safetensors": True}
    if device_map is not None:
        source["device_map"] = device_map
    try:
        if not gguf_file:  # before gigabytes are read; a GGUF file's config takes seconds itself
            _refuse_recurrent(AutoConfig.from_pretrained(folder, **common), path)
        tokenizer = AutoTokenizer.from_pretrained(folder, **common)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_dtype(dtype, gguf_file),
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **source,
            **common,
        )
    except UserError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"The target {path} can't be loaded: {reason}") from error
    _refuse_recurrent(model.config, path)
    _refuse_missing(model, info, path)
    _refuse_offloaded(model, path)
    _check_tokenizer(tokenizer, model, path)
    return Loaded(model, tokenizer)


def _locate(path: str, gguf_file: str | None) -> tuple[str, str | None]:
    """Returns (folder or hub id, GGUF file name)."""
    where = Path(path).expanduser()
    if where.suffix == ".gguf":
        if not where.is_file():
            raise UserError(
                f"The target {path} is not there. (`make target` fetches the quickstart's.)"
            )
        return str(where.parent), where.name
    looks_local = where.is_absolute() or path.startswith(".") or path.count("/") > 1
    if looks_local and not where.is_dir():
        raise UserError(f"The target {path} is not there: no such folder or file.")
    if gguf_file and where.is_dir() and not (where / gguf_file).is_file():
        raise UserError(f"The target's folder {path} has no file {gguf_file}.")
    return str(where) if where.is_dir() else path, gguf_file


def _dtype(dtype: str, gguf_file: str | None) -> Any:
    if dtype == "auto":
        return torch.float32 if gguf_file else "auto"
    return getattr(torch, dtype)


def _refuse_recurrent(config: Any, path: str) -> None:
    """Refuses layers whose state can't be cropped after a rejected draft (field report C7)."""
    text = config.get_text_config()
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or []}
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    strange = sorted(kinds - attention)
    named = [word for word in RECURRENT if word in str(text.model_type).lower()]
    if strange or named:
        raise UserError(
            f"The target {path} ({text.model_type}) has layers of kind "
            f"{', '.join(strange or named)}, whose state can't be taken back after a rejected "
            "draft; only attention layers are supported."
        )


def _refuse_missing(model: Any, info: dict[str, Any], path: str) -> None:
    """A tensor that the checkpoint lacks would be random (field report A3)."""
    missing = sorted(str(name) for name in info.get("missing_keys", ()))
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
    if missing or mismatched:
        shown = ", ".join((missing or mismatched)[:5])
        raise UserError(
            f"The target {path} lacks {len(missing or mismatched)} tensor(s) that "
            f"{type(model).__name__} needs ({shown}); they would be random."
        )
    unexpected = info.get("unexpected_keys", ())
    if unexpected:
        logging.getLogger(__name__).warning(
            "%s: %d tensors of the checkpoint are not used, such as %s",
            path,
            len(unexpected),
            sorted(map(str, unexpected))[0],
        )


def _refuse_offloaded(model: Any, path: str) -> None:
    """A part that accelerate keeps in host memory or on disk would be read anew in every pass."""
    outside = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if outside:
        raise UserError(
            f"The target {path} does not fit on the GPUs: {len(outside)} of its tensors (such as "
            f"{outside[0]}) would be kept elsewhere. Use more GPUs, a lower target_dtype, or a "
            "feature cache (`python -m data.cache build`)."
        )


def _check_tokenizer(tokenizer: Any, model: Any, path: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    words = getattr(tokenizer, "vocab_size", 0)
    if words > rows:
        raise UserError(
            f"The tokenizer of {path} has {words} tokens, the model's embedding {rows} rows: the "
            "two do not belong together."
        )
