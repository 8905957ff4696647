"""The frozen parts of a target beside a feature cache: training needs no more of it.

Embedding, head and final norm, config and tokenizer. What else is asked of it (responses, the
real loop, features that the cache lacks) loads the whole target, once, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.cache_format import REPLAY, CachedRows, file_sha256, read_manifest
from drafter.errors import UserError
from drafter.files import replace_atomic, write_atomic
from drafter.head import FrozenHead
from drafter.initialise import effective_weight
from drafter.model import RMSNorm
from drafter.target import Features, Target


class StoredTarget(Target):
    """What a cache keeps of its target, in the target's place.

    Args:
        folder: Of the cache.
        device: Where the frozen parts go, and the whole target if it is ever needed.
        dtype: "auto" for the one that the cache was built with.

    Raises:
        UserError: The cache is not there, half-built, or lacks these parts.
    """

    FOLDER = "target"
    WEIGHTS = "frozen.safetensors"

    def __init__(self, folder: Path, device: str | torch.device = "cpu", dtype: str = "auto"):
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoTokenizer

        manifest = read_manifest(folder)
        own = folder / self.FOLDER
        said = manifest.identity["target"]
        self.path, self.gguf_file = said["path"], said["gguf_file"]
        self.fingerprint = said["fingerprint"]
        self._revision = said["revision"]
        self._manifest = manifest
        self._cache = folder
        self._num_layers = int(said["num_layers"])
        self._dtype_name = said["dtype"] if dtype == "auto" else dtype
        self.spread = False
        self._whole: Target | None = None
        self._replay: CachedRows | None = None
        try:
            tensors = load_file(own / self.WEIGHTS)
            facts = json.loads((own / "facts.json").read_text())
            self.tokenizer = AutoTokenizer.from_pretrained(own)
            self.config = AutoConfig.from_pretrained(own).get_text_config()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{own} can't be read: {reason}; `python -m data.cache repair {folder}` makes it "
                "anew."
            ) from error
        wanted = getattr(torch, self._dtype_name)
        tensors = {name: t.to(device=device, dtype=wanted) for name, t in tensors.items()}
        embedding = tensors["embedding"]
        self._embedding = nn.Embedding.from_pretrained(embedding, freeze=True)
        self._embedding_scale = facts["embedding_scale"]
        self._eos_token_ids = tuple(facts["eos_token_ids"])
        self.head = FrozenHead(
            tensors.get("head", embedding),
            tensors.get("head_bias"),
            facts["head_scale"],
            facts["head_softcap"],
        )
        norm = RMSNorm(len(tensors["norm"]), 0.0)
        norm.weight = nn.Parameter(tensors["norm"], requires_grad=False)
        self.final_norm = norm

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole target."""
        return self._num_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a response."""
        return self._eos_token_ids

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.head.weight.dtype

    def __getattr__(self, name: str) -> Any:
        """Decoder layers and the transformers model are the whole target's."""
        if name in ("layers", "model"):
            return getattr(self.whole, name)
        raise AttributeError(name)

    @property
    def whole(self) -> Target:
        """The target itself, loaded when it is first needed.

        Raises:
            UserError: It is not there any more, or has other weights now.
        """
        if self._whole is None:
            print(f"[cache] loading the whole target {self.path}", flush=True)
            self._whole = Target.load(
                self.path,
                gguf_file=None if str(self.path).endswith(".gguf") else self.gguf_file,
                dtype=self._dtype_name,
                device=self.device,
                revision=self._revision,
            )
            if self._whole.fingerprint != self.fingerprint:
                raise UserError(
                    f"{self.path} has other weights, config or tokenizer than when the cache "
                    f"{self._cache} was built; build the cache anew."
                )
        return self._whole

    def let_go(self) -> None:
        """Frees the whole target, if it was loaded."""
        self._whole = None

    def check_layers(self, layer_ids: Sequence[int]) -> None:
        """Raises UserError unless the cache holds exactly these layers, in this order."""
        kept = self._manifest.identity["layer_ids"]
        if list(layer_ids) != kept:
            raise UserError(
                f"the cache {self._cache} holds target layers {kept}, the drafter reads "
                f"{list(layer_ids)}; set --model.target_layer_ids to {kept}, or build another "
                "cache."
            )

    def run(self, layer_ids: Sequence[int], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See `Target.run`; loads the whole target."""
        return self.whole.run(layer_ids, *args, **kwargs)

    def features(self, *args: Any, **kwargs: Any) -> Features:
        """See `Target.features`; loads the whole target."""
        return self.whole.features(*args, **kwargs)

    def kept_features(self, tokens: Sequence[int], layer_ids: Sequence[int]) -> Tensor | None:
        """Returns stored features (1, S, L*D) of a held-out trajectory, or None."""
        self.check_layers(layer_ids)
        if self._replay is None:
            self._replay = CachedRows(self._cache, self._manifest.part(REPLAY))
            self._places = {
                tuple(self._replay[i].input_ids.tolist()): i for i in range(len(self._replay))
            }
        place = self._places.get(tuple(tokens))
        if place is None:
            return None
        return self._replay.hidden_states(place).unsqueeze(0).to(self.device)


def save_target(target: Target, folder: Path) -> dict[str, str]:
    """Writes the frozen parts of a target; returns the sha256 of each file by name."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    embedding, head = target.embedding_weight, target.head.weight
    tensors = {"embedding": embedding.detach().cpu().contiguous()}
    if head.data_ptr() != embedding.data_ptr():
        tensors["head"] = head.detach().cpu().contiguous()
    if target.head.bias is not None:
        tensors["head_bias"] = target.head.bias.detach().cpu().contiguous()
    like = torch.empty(target.hidden_size, dtype=torch.float32)
    tensors["norm"] = effective_weight(target.final_norm, like).detach().cpu().contiguous()
    replace_atomic(folder / StoredTarget.WEIGHTS, lambda aside: save_file(tensors, aside))
    facts = {
        "embedding_scale": target.embedding_scale,
        "eos_token_ids": list(target.eos_token_ids),
        "head_scale": target.head.scale,
        "head_softcap": target.head.softcap,
    }
    write_atomic(folder / "facts.json", json.dumps(facts))
    target.tokenizer.save_pretrained(folder)
    target.config.save_pretrained(folder)
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
