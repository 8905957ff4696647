# TEMPORARY stand-in until the target room lands
from __future__ import annotations
import hashlib, os
from typing import NamedTuple
from dataclasses import dataclass
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from drafter.errors import UserError
from drafter.head import FrozenHead
from drafter.sampling import GREEDY, argmax, warp


class Features(NamedTuple):
    hidden_states: Tensor
    last_hidden: Tensor | None


@dataclass
class Response:
    ids: list[int]
    log_probs: list[float]
    finished: bool


def default_layer_ids(n, L):
    return [n // 2] if L == 1 else sorted({round(x) for x in torch.linspace(1, n - 3, L).tolist()})


def check_layer_ids(ids, n):
    bad = [i for i in ids if not 0 <= i < n - 1]
    if bad:
        raise UserError(f"bad layer {bad}")


def assert_finite_features(h, layers, ids=None):
    if not torch.isfinite(h).all():
        raise UserError("nan")


class Target:
    @classmethod
    def load(cls, path, gguf_file=None, dtype="auto", device="cpu", revision=None, trust_remote_code=False):
        self = cls()
        self.path, self.gguf_file = path, gguf_file
        d, n = (os.path.split(path) if path.endswith(".gguf") else (path, gguf_file))
        kw = {"gguf_file": n} if n else {}
        self.tokenizer = AutoTokenizer.from_pretrained(d, **kw)
        m = self.model = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32 if dtype == "auto" else getattr(torch, dtype), **kw).to(device).eval().requires_grad_(False)
        self.config = m.config
        self.hidden_size, self.num_layers, self.vocab_size = m.config.hidden_size, m.config.num_hidden_layers, m.get_input_embeddings().weight.shape[0]
        self.max_length = m.config.max_position_embeddings
        e = m.generation_config.eos_token_id
        self.eos_token_ids = tuple(e) if isinstance(e, list) else (e,)
        self.dtype, self.device = m.dtype, torch.device(device)
        self.fingerprint = "tmp"
        self.head = FrozenHead(m.lm_head.weight.detach())
        self.final_norm, self.layers = m.model.norm, m.model.layers
        return self

    def embed(self, ids):
        with torch.no_grad():
            return self.model.get_input_embeddings()(ids)

    def _run(self, layer_ids, **kw):
        out = {}
        hs = [self.layers[i].register_forward_hook(lambda m, a, o, i=i: out.__setitem__(i, o[0] if isinstance(o, tuple) else o)) for i in layer_ids]
        with torch.no_grad():
            o = self.model.model(**kw)
        for h in hs:
            h.remove()
        return torch.cat([out[i] for i in layer_ids], -1), o.last_hidden_state

    def features(self, input_ids, document_ids, layer_ids, last_hidden=False):
        mask = (document_ids >= 0).long()
        h, last = self._run(layer_ids, input_ids=input_ids, attention_mask=mask)
        return Features(h * mask[..., None], last if last_hidden else None)

    def generate(self, prompts, max_new_tokens, sampling=GREEDY, seed=0, batch_size=32, progress=False):
        out = []
        for p in prompts:
            g = self.model.generate(torch.tensor([p], device=self.device), max_new_tokens=max_new_tokens, do_sample=False)[0, len(p):].tolist()
            out.append(Response(g, [], g[-1] in self.eos_token_ids))
        return out


class TargetSession:
    def __init__(self, target):
        self.t, self.cache, self.length = target, DynamicCache(), 0

    def forward(self, ids, layer_ids):
        taps, last = self.t._run(layer_ids, input_ids=ids[None], past_key_values=self.cache, use_cache=True) if layer_ids else (torch.zeros(1, len(ids), 0), self.t.model.model(input_ids=ids[None], past_key_values=self.cache).last_hidden_state)
        self.length += len(ids)
        return last[0], taps[0]

    def crop(self, length):
        if length < self.length:
            self.cache.crop(-(self.length - length))
            self.length = length


Target.session = lambda self: TargetSession(self)

Target.check_length = lambda self, a, b: None
