"""Guards the memory estimate: what a real forward keeps, and the real peak of a step.

On a CPU the formulas for CUDA are held to stand-ins that keep what CUDA's kernels keep.

Legend: B rows, S tokens, A anchors per row, K block size, D hidden size, L tapped layers.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from callbacks.memory import MemoryReport
from drafter import attention as attention_module
from drafter import head as head_module
from drafter.attention import build_visibility
from drafter.blocks import DraftBatch, build_blocks
from drafter.config import DrafterConfig
from drafter.graphs import trained_scores
from drafter.head import FrozenHead, score_blocks, score_slots
from drafter.memory import (
    MemoryEstimate,
    StepSizes,
    count_weights,
    estimate_step,
    logit_buffers,
    saved_activations,
    saved_scoring,
)
from drafter.model import Drafter
from drafter.optimisation import OptimiserSettings, make_optimizer
from drafter.soft_labels import soft_labels
from drafter.whole_scores import TargetStates
from losses.scores import WHOLE_SCORES
from tests.runs import cli
from tests.tiny import tiny_config

SHAPES = {  # B, S, A, K, layers, heads, kv heads, D, L, V
    "small": (2, 40, 3, 4, 2, 4, 2, 32, 3, 100),
    "many rows": (6, 24, 3, 4, 1, 4, 4, 32, 2, 100),
    "long context": (1, 400, 2, 4, 3, 4, 1, 32, 5, 100),
    "many blocks": (2, 64, 24, 4, 1, 8, 2, 64, 1, 100),
    "long blocks": (2, 48, 3, 16, 4, 4, 4, 32, 3, 100),
    "large vocabulary": (2, 40, 4, 8, 1, 2, 1, 64, 2, 3000),
}


class Step:
    """A drafter with a batch in which every slot is valid, and one forward as in training."""

    def __init__(
        self,
        shape,
        *,
        mixed=False,
        attention="sdpa",
        device="cpu",
        target=None,
        soft=False,
        whole=False,
    ):
        rows, tokens, anchors, block, layers, heads, kv_heads, width, taps, vocab = shape
        torch.manual_seed(0)
        self.config = DrafterConfig.for_target(
            tiny_config(
                "qwen3",
                hidden_size=width,
                intermediate_size=3 * width,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=16,
                num_hidden_layers=taps,
            ),
            block_size=block,
            num_layers=layers,
            target_layer_ids=tuple(range(taps)),
            mask_token_id=0,
        )
        self.drafter = Drafter(self.config)
        self.mixed, self.attention = mixed, attention
        dtype = target or (torch.bfloat16 if mixed else torch.float32)
        self.head = FrozenHead(torch.randn(vocab, width, dtype=dtype))
        places = torch.linspace(1, tokens - block, anchors).long()
        self.batch = DraftBatch(
            input_ids=torch.randint(0, vocab, (rows, tokens)),
            supervised=torch.ones(rows, tokens, dtype=torch.bool),
            document_ids=torch.zeros(rows, tokens, dtype=torch.long),
            positions=torch.arange(tokens).repeat(rows, 1),
            anchors=places.repeat(rows, 1),
            sample_ids=torch.arange(rows),
            hidden_states=torch.randn(rows, tokens, taps * width, dtype=dtype),
        )
        self.sizes = StepSizes(
            rows=rows,
            tokens=tokens,
            anchors=anchors,
            vocab_size=vocab,
            chunk_rows=self.head.chunk_rows(whole),
            compute_bytes=2 if mixed else 4,
            feature_bytes=dtype.itemsize,
            casts_features=dtype != (torch.bfloat16 if mixed else torch.float32),
            attention=attention,
            device=device,
            logit_buffers=logit_buffers(self.head, whole),
            soft_labels=soft,
            whole_scores=len(WHOLE_SCORES) if whole else 0,
        )
        self.last_hidden = torch.randn(rows, tokens, width, dtype=dtype)

    def forward(self):
        """Returns (loss, the mask), the mask as the module holds it until the step's end."""
        batch, block = self.batch, self.config.block_size
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            blocks = build_blocks(batch, block, 0)
            mask = build_visibility(batch.anchors, batch.document_ids, block, self.attention)
            embeds = F.embedding(blocks.input_ids, self.head.weight)
            hidden = self.drafter(
                batch.hidden_states, batch.positions, embeds, blocks.positions, mask
            )
            soft = None
            if self.sizes.soft_labels:
                soft = soft_labels(self.head, self.last_hidden.flatten(0, 1))
            target = None
            if self.sizes.whole_scores:
                target = TargetStates(self.last_hidden.flatten(0, 1), 1.0, WHOLE_SCORES)
            scores = score_blocks(self.head, hidden, blocks, soft=soft, target=target)
        return torch.stack([s.sum() for s in trained_scores(scores).values()]).sum(), mask

    def kept(self):
        """Returns bytes of distinct storages that a forward keeps: (weight copies, the rest)."""
        ours = [*self.drafter.parameters(), self.batch.hidden_states]
        seen = {tensor.untyped_storage().data_ptr() for tensor in ours}
        saved = []

        def pack(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _, mask = self.forward()
        saved += [] if mask.dense is None else [mask.dense]
        copies = rest = 0
        for tensor in saved:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            if is_weight_copy(tensor.grad_fn):
                copies += storage.nbytes()
            else:
                rest += storage.nbytes()
        return copies, rest


def is_weight_copy(node):
    while node is not None and node.name() in ("TBackward0", "ToCopyBackward0"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


class CudaNorm(torch.autograd.Function):
    """Keeps what the fused RMSNorm keeps: its input and a statistic per vector."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale)
        return (x * scale * weight).contiguous()


class CudaAttention(torch.autograd.Function):
    """Keeps what memory-efficient SDPA (with a mask) or compiled flex (without) keeps."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        rows, heads, slots, size = query.shape
        if mask is None:
            out = torch.zeros_like(query).contiguous()
        else:
            mask = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
            out = query.new_zeros(rows, slots, heads, size).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, torch.zeros(rows, heads, slots))
        return out


@pytest.fixture
def cuda_kernels(monkeypatch):
    """Replaces the kernels that keep something else on a GPU than on a CPU."""

    def rms_norm(x, shape, weight, eps):
        # CUDA's autocast has rms_norm on its fp32 list, the CPU's has not
        return CudaNorm.apply(x.float(), weight.float(), eps)

    def sdpa(query, key, value, attn_mask):
        return CudaAttention.apply(query, key, value, attn_mask)

    def flex(query, key, value, block_mask, enable_gqa, kernel_options):
        return CudaAttention.apply(query, key, value, None)

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(attention_module, "_compiled_flex", lambda: flex)


class Live(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if torch.is_tensor(t)}
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def ratio_kept(step):
    """Returns the estimate over the truth; they were equal with torch 2.13."""
    expected = saved_activations(step.config, step.sizes) + saved_scoring(step.config, step.sizes)
    return expected / step.kept()[1]


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_a_forward_keeps_on_a_cpu(shape, mixed):
    assert ratio_kept(Step(shape, mixed=mixed)) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_a_forward_keeps_with_cuda_kernels(cuda_kernels, shape, mixed, attention):
    step = Step(shape, mixed=mixed, attention=attention, device="cuda")
    assert ratio_kept(step) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scores", [{"soft": True}, {"whole": True}, {"soft": True, "whole": True}])
def test_what_a_forward_keeps_with_the_targets_distribution(shape, mixed, scores):
    assert ratio_kept(Step(shape, mixed=mixed, **scores)) == pytest.approx(1, abs=0.01)


def test_features_in_bf16_are_copied_for_an_fp32_drafter():
    step = Step(SHAPES["small"], target=torch.bfloat16)
    assert ratio_kept(step) == pytest.approx(1, abs=0.01)
    estimate = estimate_step(step.config, step.sizes)
    assert estimate.features == step.batch.hidden_states.nbytes


def test_autocast_copies_the_matrices():
    step = Step(SHAPES["small"], mixed=True)
    # fc's copy is not kept for the backward pass (features need no gradient) but lives as long
    real = step.kept()[0] + 2 * step.drafter.fc.weight.numel()
    assert estimate_step(step.config, step.sizes).weight_copies == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
def test_weights_gradients_and_optimizer_are_exact(bias):
    step = Step(SHAPES["long context"])
    step.config.attention_bias = bias
    step.drafter = Drafter(step.config)
    parameters = list(step.drafter.parameters())
    settings = OptimiserSettings(1e-3, 0.0, (0.9, 0.95), 0.0, 0.0)
    optimizer, _ = make_optimizer(parameters, settings, 10, fused=False)
    step.forward()[0].backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    moments = [value for value in states if value.ndim]  # the rest are counts of steps
    estimate = estimate_step(step.config, step.sizes)
    assert estimate.weights == sum(p.nbytes for p in parameters)
    assert estimate.gradients == sum(p.grad.nbytes for p in parameters)
    assert estimate.optimizer == sum(m.nbytes for m in moments)
    assert count_weights(step.config)[0] == sum(p.numel() for p in parameters if p.ndim > 1)
    twice = dataclasses.replace(step.sizes, gradient_copies=2)
    assert estimate_step(step.config, twice).gradients == 2 * estimate.gradients


@pytest.mark.parametrize("chunk", [1 << 23, 3000], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("scores", [{}, {"soft": True}, {"soft": True, "whole": True}])
def test_the_total_is_the_peak_of_a_step(monkeypatch, shape, chunk, scores):
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", chunk)
    step = Step(shape, **scores)
    optimizer = torch.optim.AdamW(step.drafter.parameters())
    with Live() as live:
        for _ in range(2):  # the second has the first one's gradients and moments
            loss, _ = step.forward()
            optimizer.zero_grad()  # where Lightning does it
            loss.backward()
            optimizer.step()
    estimate = estimate_step(step.config, step.sizes)
    real = live.peak + estimate.weights + estimate.features  # which no operation made
    assert estimate.total == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "head", [{}, {"bias": True}, {"scale": 0.5}, {"softcap": 30.0}], ids=lambda head: str(*head)
)
@pytest.mark.parametrize("names", [None, ("overlap",), WHOLE_SCORES])
def test_how_many_chunks_of_logits_live_together(monkeypatch, head, dtype, names):
    def matmul(left, right):  # as on CUDA: the product comes in fp32, without a copy in between
        out = torch.empty(len(left), right.shape[1])
        with _disable_current_modes():
            return out.copy_(left @ right)

    monkeypatch.setattr(head_module, "matmul_fp32", matmul)
    chunk, vocab, width = 256, 4096, 8
    bias = torch.randn(vocab, dtype=dtype) if head.get("bias") else None
    rest = {name: value for name, value in head.items() if name != "bias"}
    frozen = FrozenHead(torch.randn(vocab, width, dtype=dtype), bias=bias, **rest)
    hidden = torch.randn(4 * chunk, width, requires_grad=True)
    states = torch.randn(4 * chunk, width, dtype=dtype)
    target = None if names is None else TargetStates(states, 0.5, names)
    with Live() as live:
        score_slots(
            frozen, hidden, torch.zeros(len(hidden), dtype=torch.long), chunk, target=target
        )
    expected = logit_buffers(frozen, whole=names is not None)
    assert live.peak / (4 * chunk * vocab) == pytest.approx(expected, abs=0.1)


def test_the_parts_in_words():
    estimate = MemoryEstimate(
        weights=500_000_000,
        gradients=500_000_000,
        optimizer=1_000_000_000,
        weight_copies=250_000_000,
        features=1_000_000,
        activations=3_200_000_000,
        scoring=900_000_000,
    )
    assert estimate.total == 6_351_000_000
    first, second = estimate.lines()
    assert first == estimate.describe()
    assert first == (
        "[memory] about 6.35 GB a step: activations 3.20, optimizer 1.00, scoring 0.90, "
        "weights 0.50, gradients 0.50, weight copies 0.25"
    )
    assert "data.num_anchors" in second
    static = dataclasses.replace(estimate, activations=2_000_000_000)
    assert "model.num_layers" in static.lines()[1]


def test_fewer_rows_taps_and_anchors_need_less():
    step = Step(SHAPES["small"])
    whole = estimate_step(step.config, step.sizes)
    for name in ("rows", "tokens", "anchors"):
        less = dataclasses.replace(step.sizes, **{name: getattr(step.sizes, name) - 1})
        assert estimate_step(step.config, less).total < whole.total
    flex = dataclasses.replace(step.sizes, attention="flex")
    assert estimate_step(step.config, flex).activations < whole.activations


def test_a_run_says_what_a_step_of_its_longest_rows_takes(tmp_path, capsys):
    run = cli(tmp_path, trainer__max_epochs=1)
    said = capsys.readouterr().out
    (report,) = [c for c in run.trainer.callbacks if isinstance(c, MemoryReport)]
    assert report.estimate.describe() in said
    longest = max(len(row.input_ids) for row in run.datamodule.train_rows)
    config = run.model.drafter.config
    values = 2 * longest * len(config.target_layer_ids) * config.hidden_size  # batches of 2
    assert report.estimate.features == 4 * values
    weights = sum(p.numel() for p in run.model.drafter.parameters())
    assert report.estimate.gradients == 4 * weights
