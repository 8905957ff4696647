"""Finds drafters in checkpoints, run folders and published folders, and holds them to a target."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drafter.borrowed import check_borrowed
from drafter.config import DrafterConfig, check_block_size, check_supported, refuse_dflash2
from drafter.draft_length import DraftLength
from drafter.draft_vocabulary import ReducedHead
from drafter.errors import UserError
from drafter.files import pieces
from drafter.layer_ids import check_layer_ids
from drafter.model import Drafter
from drafter.search import Search
from drafter.speculators_layout import is_speculators, read_speculators, verifier_name
from drafter.target import Target

PROVENANCE = "provenance.json"
"""Beside an exported drafter: what it was trained for, and how."""
MASK_EMBEDDING = "mask_embedding.pt"
"""Beside a published drafter: what its drafted slots hold instead of a row of the embedding."""

_INCIDENTAL = ("transformers_version", "_name_or_path", "dtype")


@dataclass
class LoadedDrafter:
    """A drafter and what its file says of its target.

    Attributes:
        name: What tables call it.
        drafter: Eval mode; measuring moves it and casts it.
        fingerprint: 20 hex digits of a hash over config and weights as they were read.
        path: The file or folder it was read from.
        target_path: What the checkpoint says of its target, or None; so the other three.
        target_gguf_file: Likewise.
        target_fingerprint: Likewise.
        target_dtype: Likewise.
        run_config: The run's configuration, of its last piece, if it is there.
        other_block_size: K, where it is not the one that the drafter was trained with.
        provenance: What lies beside an exported drafter.
        search: How its drafts are searched; None for the one draft.
        length: Which of its slots are verified; None for all.
        borrowed: Tensors beside its own in the folder, which must be the target's, and their files.
    """

    name: str
    drafter: Drafter
    fingerprint: str
    path: str = ""
    target_path: str | None = None
    target_gguf_file: str | None = None
    target_fingerprint: str | None = None
    target_dtype: str = "auto"
    run_config: Path | None = None
    other_block_size: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    search: Search | None = None
    length: DraftLength | None = None
    borrowed: dict[str, Path] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether a round is one draft of all slots."""
        return self.search is None and self.length is None

    @property
    def contender(self) -> str:
        """What its rounds depend on, as text: weights, K, and what is done with a block."""
        ways = [self.search and self.search.label, self.length and self.length.key]
        plain = [self.fingerprint, str(self.drafter.config.block_size)]
        return "/".join([*plain, *(way for way in ways if way)])


def drafter_fingerprint(drafter: Drafter, layers_told: bool = True) -> str:
    """Returns 20 hex digits of a hash over a drafter's config and weights.

    Args:
        drafter: As it was read.
        layers_told: Whether its folder tells the target's number of layers; what is found out
            otherwise depends on what else is there, and does not count.
    """
    left_out = _INCIDENTAL if layers_told else (*_INCIDENTAL, "num_target_layers")
    config = {k: v for k, v in drafter.config.to_dict().items() if k not in left_out}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(drafter.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:20]


def load_drafter(path: str, block_size: int | None = None) -> LoadedDrafter:
    """Returns the drafter in a checkpoint, a run folder or a published drafter's folder.

    Args:
        path: A Lightning .ckpt; a run folder (its best checkpoint, or else its last); or a folder
            with config.json and model.safetensors, in the z-lab or the speculators layout.
        block_size: K to decode with; None for the one it was trained with.

    Raises:
        UserError: None of these, or the weights don't fit the config; names the tensors.
    """
    where = Path(path)
    if where.is_dir() and (where / "checkpoints").is_dir():
        found = [where / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        where = next((file for file in found if file.is_file()), found[0])
    if block_size is not None:
        check_block_size(block_size)
    if where.is_dir() and (where / "config.json").is_file():
        loaded = _read_folder(where, path)
        _read_provenance(loaded, where / PROVENANCE)
        loaded.run_config = _newest_config(where)
    elif where.is_file():
        loaded = _read_checkpoint(where, path)
    else:
        raise UserError(f"{path}: no checkpoint, run folder or drafter folder is there.")
    if block_size is not None and block_size != loaded.drafter.config.block_size:
        loaded.drafter.config.block_size = block_size
        loaded.other_block_size = block_size
    return loaded


def _full(path: str) -> str:
    """A folder such as "." has a name, too."""
    return path.rstrip("/") if Path(path).name else str(Path(path).resolve())


def _read_folder(folder: Path, path: str) -> LoadedDrafter:
    borrowed: dict[str, Path] = {}
    target_path = None
    layers_told = True
    if (folder / MASK_EMBEDDING).is_file():
        raise UserError(
            f"{folder} has a mask embedding of its own ({MASK_EMBEDDING}); only drafters whose "
            "mask token is a row of the target's embedding can be read."
        )
    try:
        said = json.loads((folder / "config.json").read_text())
        refuse_dflash2(said, folder)
        if is_speculators(said):
            drafter, borrowed = read_speculators(folder, said)
            target_path = verifier_name(said)
            layers_told = bool(said.get("num_target_layers"))
        else:
            drafter = _read_zlab(folder)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is not a drafter's folder: {reason}") from error
    return LoadedDrafter(
        _full(path),
        drafter.eval(),
        drafter_fingerprint(drafter, layers_told),
        str(folder),
        target_path,
        borrowed=borrowed,
    )


def _read_zlab(folder: Path) -> Drafter:
    drafter: Drafter
    said = json.loads((folder / "config.json").read_text())
    changes: dict[str, Any] = {}
    if "draft_vocab_size" in said:
        if said["draft_vocab_size"] not in (None, said.get("vocab_size")):
            raise UserError(
                f"{folder} drafts from {said['draft_vocab_size']} tokens of the target's "
                f"{said.get('vocab_size')}, and the z-lab layout does not say which; only the "
                "speculators layout can be read with a reduced draft vocabulary."
            )
        changes["draft_vocab_size"] = None
    config = DrafterConfig.from_dict(said | changes)
    _ = config.target_layer_ids, config.mask_token_id  # a config without them raises here
    check_supported(config, folder)  # before a model is made of it
    drafter, info = Drafter.from_pretrained(
        folder, output_loading_info=True, use_safetensors=True, **changes
    )
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise UserError(f"{folder}: missing tensors {missing}, unexpected tensors {unexpected}.")
    return drafter


def _read_provenance(loaded: LoadedDrafter, file: Path) -> None:
    """Takes what an exported drafter's folder says of its target; published ones say little."""
    if not file.is_file():
        return
    try:
        loaded.provenance = json.loads(file.read_text())
        target = loaded.provenance["target"]
        loaded.target_path = target["path"] or loaded.target_path
        loaded.target_gguf_file = target["gguf_file"]
        loaded.target_fingerprint, loaded.target_dtype = target["fingerprint"], target["dtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} can't be read ({error}); remove it to go without.") from error


def _read_checkpoint(file: Path, path: str) -> LoadedDrafter:
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config = DrafterConfig.from_dict(checkpoint["drafter_config"])
        prefix = "drafter."
        state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items()}
    except Exception as error:
        raise UserError(
            f"{file} is not a checkpoint of a drafter ({type(error).__name__})."
        ) from error
    drafter = Drafter(config)
    missing, unexpected = drafter.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise UserError(f"{file}: missing tensors {missing}, unexpected tensors {unexpected}.")
    target = checkpoint.get("target", {})
    return LoadedDrafter(
        _full(path),
        drafter.eval(),
        drafter_fingerprint(drafter),
        str(file),
        target.get("path"),
        target.get("gguf_file"),
        target.get("fingerprint"),
        target.get("dtype", "auto"),
        _newest_config(file.parent.parent),
    )


def _newest_config(folder: Path) -> Path | None:
    return next(reversed(pieces(folder, "config", ".yaml")), None)


def check_fits(loaded: LoadedDrafter, target: Target) -> None:
    """Raises UserError for a target of another shape; warns of another target of the same."""
    config = loaded.drafter.config
    if config.num_target_layers == 0:  # the speculators library's folders do not say
        config.num_target_layers = target.num_layers
    wanted = {
        "hidden size": (config.hidden_size, target.hidden_size),
        "layers": (config.num_target_layers, target.num_layers),
        "vocabulary": (config.vocab_size, target.config.vocab_size),
    }
    wrong = [
        f"{name} {ours}, not {theirs}" for name, (ours, theirs) in wanted.items() if ours != theirs
    ]
    if wrong:
        raise UserError(
            f"{loaded.name} was made for a target of {', '.join(wrong)} as {target.path} has; give "
            "the target that it was trained with."
        )
    check_layer_ids(config.target_layer_ids, target.num_layers)
    if config.mask_token_id >= target.vocab_size:
        raise UserError(
            f"{loaded.name}: its mask token id {config.mask_token_id} is beyond the target's "
            f"{target.vocab_size} embedding rows."
        )
    _check_scales(loaded, target)
    if loaded.borrowed:
        head = loaded.drafter.head(target.head)
        theirs = {
            "embedding": target.embedding_weight,
            "head": (head.rows if isinstance(head, ReducedHead) else head).weight,
            "whole head": target.head.weight,
            "final norm": getattr(target.final_norm, "weight", None),  # OLMo's has none
        }
        known = {what: weight for what, weight in theirs.items() if weight is not None}
        gguf = target.gguf_file is not None or target.path.endswith(".gguf")
        check_borrowed(loaded.name, loaded.borrowed, known, target.path, exact=not gguf)
    if loaded.target_fingerprint not in (None, target.fingerprint):
        print(f"warning: {loaded.name} was trained with other weights than {target.path} holds")


def _check_scales(loaded: LoadedDrafter, target: Target) -> None:
    """Raises UserError unless what a drafter says of logits and embeddings holds with the target.

    Most say nothing: scaling and soft-capping are the target's own. Of a drafter's own factor on
    embeddings public code has two readings, in place of the target's (z-lab) and beside it (MLX),
    which are the same unless the target scales its embeddings.
    """
    config, head = loaded.drafter.config, target.head
    theirs = {"output_multiplier": head.scale, "final_logit_softcapping": head.softcap or 0.0}
    wrong = [
        f"{key} {value:g}, not {theirs[key]:g}"
        for key, value in config.told_logits.items()
        if not math.isclose(value, theirs[key], rel_tol=1e-4)
    ]
    if wrong:
        raise UserError(
            f"{loaded.name} has {', '.join(wrong)} as the head of {target.path} has; give the "
            "target that it was trained with."
        )
    if config.embedding_scale != 1.0 and not math.isclose(target.embedding_scale, 1.0):
        raise UserError(
            f"{loaded.name} has input_embedding_scale {config.embedding_scale:g}, and "
            f"{target.path} scales its embeddings, too; public code differs on which is meant."
        )
