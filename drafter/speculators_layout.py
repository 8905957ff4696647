"""The folder that the speculators library (0.9) writes and reads, and our drafter out of it.

`config.json` keeps the drafter's Qwen3 fields in `transformer_layer_config` and the rest beside it;
layer ids are in `aux_hidden_state_layer_ids` and count transformers' `hidden_states`, where entry 0
is the embedding: our id i is i + 1 there. Tensors have the z-lab names (method.md, last section).

What its state dict holds and ours does not:

* embedding, head and final norm of the verifier (our target). Its loader takes them from
  `speculators_config.verifier.name_or_path`, so that an export names the verifier and carries none
  of them. A file that has them is read without them, with a line; they must equal the target's.
* `t2d` (V,) bool and `d2t` (R,) int64, of a reduced draft vocabulary (`drafter.draft_vocabulary`):
  which tokens are kept, and token id minus draft id. Such a file also has `lm_head.weight`, the R
  rows of the verifier's head, which engines do not cut out of it themselves. A drafter of the whole
  vocabulary has none of the three.

Source: the library's public config and model classes (github.com/vllm-project/speculators).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafter.borrowed import BORROWED, WEIGHTS, leave_out, read_tensor, tensor_files
from drafter.config import NOT_COMPUTED, DrafterConfig, check_flag, check_supported
from drafter.draft_vocabulary import from_maps, mask_of, offsets
from drafter.errors import UserError
from drafter.files import write_atomic
from drafter.model import Drafter

VERSION = "0.9.0"
"""Of the library whose form this is."""
D2T, T2D = "d2t", "t2d"
OUR_MAP = "draft_tokens"
_OF_LAYERS_ONLY = {
    **{key: neutral for key, neutral, _ in NOT_COMPUTED},
    "causal": False,
    "final_logit_softcapping": False,
    "input_embedding_scale": 1.0,
    "is_causal": False,
    "output_multiplier": 1.0,
    "swa_window_size": False,
    "use_swa": False,
}
"""Keys of the z-lab layout, which outside transformer_layer_config would be read over, and their
values that ask for nothing."""
_NOT_OF_LAYERS = (
    "architectures",
    "block_size",
    "dflash_config",
    "is_causal",
    "draft_vocab_size",
    "num_target_layers",
    "transformers_version",
)


def told_block_size(said: Mapping[str, Any]) -> Any:
    """Returns what a config.json of the library has as block_size, None without."""
    nested = said.get("dflash_config")
    return said.get("block_size", nested.get("block_size") if isinstance(nested, dict) else None)


def is_speculators(said: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is the speculators library's."""
    return "speculators_model_type" in said


def verifier_of(
    path: str | None, gguf_file: str | None = None, named: str | None = None
) -> dict[str, Any]:
    """Returns `speculators_config.verifier` for a target.

    Args:
        path: The target's folder or hub name; None where it is not known.
        gguf_file: Its file within, if it is a GGUF.
        named: What to call it instead: the same model with safetensors.

    Raises:
        UserError: The library's loader could not read it.
    """
    name = named or path
    if name is None:
        raise UserError(
            "the speculators layout names its target, and what this drafter was trained for is "
            "not known; give the target's folder or hub name as --verifier."
        )
    if (named is None and gguf_file is not None) or name.endswith(".gguf"):
        raise UserError(
            f"the speculators library reads its target from safetensors, and {name} is GGUF; give "
            "the same model's folder or hub name as --verifier."
        )
    return {"name_or_path": name, "architectures": _local_config(name).get("architectures") or []}


def speculators_config(
    config: DrafterConfig, dtype: str, verifier: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns config.json in the speculators form.

    Args:
        config: Of the drafter.
        dtype: Of the weights in the file.
        verifier: From `verifier_of`.

    Raises:
        UserError: It has what this layout cannot tell.
    """
    layers_see = config.layer_attention
    untold = {
        "full-attention layers that are causal": any(
            one.causal and one.window is None for one in layers_see
        ),
        f"input_embedding_scale {config.embedding_scale:g}": config.embedding_scale != 1.0,
    }
    for what, applies in untold.items():
        if applies:
            raise UserError(f"the speculators layout has no place for {what}; use --format zlab.")
    said: dict[str, Any] = json.loads(config.to_json_string())  # as the z-lab layout has it
    layers = {key: value for key, value in said.items() if key not in _NOT_OF_LAYERS}
    layers |= config.told_logits  # where they were in dflash_config, which this layout has not
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": config.num_drafted,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    told: dict[str, Any] = {}  # ours; the library keeps what it ignores
    if config.num_target_layers:
        told["num_target_layers"] = config.num_target_layers
    return {
        "architectures": ["DFlashDraftModel"],
        "speculators_model_type": "dflash",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [greedy],
            "default_proposal_method": "greedy",
            "verifier": dict(verifier),
        },
        "transformer_layer_config": {**layers, "dtype": dtype},
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "target_hidden_size": None,  # the drafter's own
        "sample_from_anchor": False,
        "sliding_window_non_causal": any(
            one.window is not None and not one.causal for one in layers_see
        ),
        "tie_word_embeddings": False,
        "dtype": dtype,
        **told,
    }


def write_speculators(
    drafter: Drafter,
    folder: Path,
    verifier: Mapping[str, Any],
    head_rows: Tensor | None = None,
) -> None:
    """Writes config.json and model.safetensors.

    Args:
        drafter: In the dtype that the file is to have.
        folder: Exists.
        verifier: From `verifier_of`.
        head_rows: (R, D) the target's, of a reduced draft vocabulary.
    """
    dtype = str(drafter.dtype).removeprefix("torch.")
    said = speculators_config(drafter.config, dtype, verifier)
    write_atomic(folder / "config.json", json.dumps(said, indent=2, sort_keys=True) + "\n")
    state = {name: tensor.cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    kept = state.pop(OUR_MAP, None)
    if kept is not None:
        assert head_rows is not None
        state[D2T], state[T2D] = offsets(kept), mask_of(kept, drafter.config.vocab_size)
        state["lm_head.weight"] = head_rows.to(drafter.dtype).cpu().contiguous()
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def drafter_config(said: Mapping[str, Any], where: Path) -> DrafterConfig:
    """Returns our config of one in the speculators form.

    `sliding_window_non_causal` is our is_causal; absent it is false, as the library has it.

    Args:
        said: Content of config.json.
        where: The folder, for messages.

    Raises:
        UserError: It is another algorithm's, lacks something, or asks for what we don't do.
    """
    if said["speculators_model_type"] != "dflash":
        raise UserError(
            f"{where} holds a speculator of type {said['speculators_model_type']!r}; only dflash "
            "drafters can be read."
        )
    layers = copy.deepcopy(said.get("transformer_layer_config"))  # reading it changes its rope
    needed = {
        "transformer_layer_config": layers,
        "aux_hidden_state_layer_ids": said.get("aux_hidden_state_layer_ids"),
        "mask_token_id": said.get("mask_token_id"),
        "block_size": told_block_size(said),
    }
    for key, value in needed.items():
        if value is None:
            raise UserError(f"{where}: its config.json has no {key}; add it.")
    assert layers is not None
    vocab_size, width = layers.get("vocab_size"), layers.get("hidden_size")
    kept = said.get("draft_vocab_size") or vocab_size
    if not 1 <= kept <= vocab_size:
        raise UserError(f"{where} drafts from {kept} tokens of the target's {vocab_size}.")
    if said.get("target_hidden_size") not in (None, width):
        raise UserError(
            f"{where} is of width {width} for a target of width {said['target_hidden_size']}; only "
            "drafters of their target's width can be read."
        )
    if said.get("sample_from_anchor"):
        raise UserError(f"{where} predicts a token at the anchor's slot, which is never done here.")
    ids = [int(i) - 1 for i in needed["aux_hidden_state_layer_ids"]]
    if min(ids, default=0) < 0:
        raise UserError(
            f"{where}: aux_hidden_state_layer_ids names 0, the embedding, which is no layer's "
            "output; only drafters that read layers' outputs can be read."
        )
    _refuse_overlooked(said, where)
    for key in ("architectures", "model_type", "is_causal"):
        layers.pop(key, None)
    check_flag("sliding_window_non_causal", said.get("sliding_window_non_causal"))
    if said.get("sliding_window_non_causal"):  # of sliding layers; full ones are never causal
        layers["is_causal"] = False
    # in a drafter of as many tokens as the target has, a map decides (`read_speculators`)
    layers["draft_vocab_size"] = None if kept == vocab_size else int(kept)
    layers["block_size"] = int(needed["block_size"])
    layers["num_target_layers"] = said.get("num_target_layers") or _target_layers(said)
    layers["dflash_config"] = {"mask_token_id": needed["mask_token_id"], "target_layer_ids": ids}
    config: DrafterConfig = DrafterConfig.from_dict(layers)
    check_supported(config, where)
    return config


def _refuse_overlooked(said: Mapping[str, Any], where: Path) -> None:
    """Raises UserError for what the z-lab layout tells and this one has no place for."""
    layers = said["transformer_layer_config"]
    places = {"": said, "dflash_config.": said.get("dflash_config")}
    places["transformer_layer_config.dflash_config."] = layers.get("dflash_config")
    told = [
        (prefix + key, place.get(key), neutral)
        for prefix, place in places.items()
        for key, neutral in _OF_LAYERS_ONLY.items()
        if isinstance(place, Mapping)
    ]
    told.append(("transformer_layer_config.is_causal", layers.get("is_causal"), False))
    for key, value, neutral in told:
        if value is not None and value != neutral:
            raise UserError(
                f"{where} tells {key} {value!r}, which the speculators layout has no place for."
            )


def read_speculators(folder: Path, said: Mapping[str, Any]) -> tuple[Drafter, dict[str, Path]]:
    """Returns a folder's drafter in the file's dtype, and the files of tensors left out of it.

    Args:
        folder: With config.json and safetensors.
        said: Content of config.json.

    Raises:
        UserError: See `drafter_config`; or a tensor is missing, unknown, of another shape, or is
            said to be the target's and is not; or maps that contradict the config or each other.
    """
    config = drafter_config(said, folder)
    files = tensor_files(folder)
    borrowed = {name: file for name, file in files.items() if name in BORROWED}
    if D2T in files and config.draft_vocab_size is None:
        config.draft_vocab_size = config.vocab_size
    drafter = Drafter(config)
    wanted = drafter.state_dict()
    if wanted.pop(OUR_MAP, None) is not None:
        wanted[D2T] = torch.empty(0)
    # t2d says what d2t says
    own = {name for name in files if name not in borrowed and (name != T2D or D2T not in files)}
    missing, unexpected = sorted(wanted.keys() - own), sorted(own - wanted.keys())
    if missing or unexpected:
        raise UserError(f"{folder}: missing tensors {missing}, unexpected tensors {unexpected}.")
    state = {name: read_tensor(files[name], name) for name in wanted}
    kept = _kept(config, state.pop(D2T, None), files, str(folder))
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{folder}: {name} is {tuple(tensor.shape)}, but its config.json asks for "
                f"{tuple(wanted[name].shape)}."
            )
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    drafter = drafter.to(widest)
    drafter.load_state_dict(state if kept is None else {**state, OUR_MAP: kept})
    drafter.config.dtype = drafter.dtype
    if borrowed:
        leave_out(folder, borrowed, verifier_name(said), kept)
    return drafter.eval(), borrowed


def _kept(
    config: DrafterConfig, d2t: Tensor | None, files: Mapping[str, Path], where: str
) -> Tensor | None:
    """Returns the tokens (R,) that a file's maps name, None for all."""
    if d2t is None:
        return None
    assert config.draft_vocab_size is not None
    t2d = read_tensor(files[T2D], T2D) if T2D in files else None
    return from_maps(d2t, t2d, config.draft_vocab_size, config.vocab_size, where)


def verifier_name(said: Mapping[str, Any]) -> str | None:
    """Returns the target's folder or hub name as the config has it."""
    how = said.get("speculators_config")
    verifier = how.get("verifier") if isinstance(how, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return name if isinstance(name, str) and name else None


def local_verifier(said: Mapping[str, Any]) -> str | None:
    """Returns the target's name in a speculators config if it is a path of this machine."""
    name = verifier_name(said)
    if name is None or not (
        name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    ):
        return None
    return name


def _target_layers(said: Mapping[str, Any]) -> int:
    """Returns the verifier's decoder layers, 0 where it is not here."""
    config = _local_config(verifier_name(said) or "")
    return int((config.get("text_config") or config).get("num_hidden_layers", 0))


def _local_config(name: str) -> dict[str, Any]:
    file = Path(name) / "config.json"
    if not name or not file.is_file():
        return {}
    config: dict[str, Any] = json.loads(file.read_text())
    return config
