"""Guards what a compiled step keeps: products and attention, with the gradients of an eager one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import run_and_get_code

from benchmarks.competitors import Ours, full_stack, make_case
from benchmarks.shapes import SHAPES, random_target
from drafter import model as model_module
from drafter import module as module_module
from drafter.attention import build_visibilities
from drafter.config import DrafterConfig
from drafter.model import Drafter
from drafter.recompute import INDUCTOR_OPTIONS
from tests.test_attention_visibility import small_drafter

ROWS, CONTEXT, BLOCKS, BLOCK_SIZE = 2, 40, 5, 8


def given(drafter: Drafter):
    torch.manual_seed(2)
    width = drafter.config.hidden_size
    anchors = torch.arange(1, 31, 6).expand(ROWS, -1)
    documents = torch.zeros(ROWS, CONTEXT, dtype=torch.long)
    return (
        torch.randn(ROWS, CONTEXT, width * len(drafter.config.target_layer_ids)).bfloat16(),
        torch.arange(CONTEXT).expand(ROWS, -1),
        torch.randn(ROWS, BLOCKS, BLOCK_SIZE, width),
        anchors.unsqueeze(-1) + torch.arange(BLOCK_SIZE),
        build_visibilities(drafter.config.layer_attention, anchors, documents, BLOCK_SIZE, "sdpa"),
    )


def traced():
    """Returns a compiler that keeps graphs and runs them as they are, and where it keeps them."""
    graphs = {}

    def keep(name):
        def compiler(graph, _):
            graphs[name] = graph.graph
            return make_boxed_func(graph)

        return compiler

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=partition
    )
    return backend, graphs


def step(run, drafter):
    drafter.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = run(*given(drafter))
    out.float().square().sum().backward()
    return out.detach(), [p.grad.clone() for p in drafter.parameters() if p.grad is not None]


def kept(graph):
    """Returns what the forward pass leaves for the backward pass: (what made it, shape)."""
    outputs = next(node for node in graph.nodes if node.op == "output").args[0]
    return Counter(
        (str(node.target), tuple(node.meta["val"].shape))
        for node in outputs[1:]  # the first is what the drafter returns
        if node.op != "placeholder" and hasattr(node.meta.get("val"), "shape")
    )


@pytest.fixture(scope="module")
def graphs_and_steps():
    drafter = small_drafter()
    backend, graphs = traced()
    torch._dynamo.reset()
    found = step(torch.compile(drafter.forward, backend=backend), drafter)
    return drafter, graphs, found, step(drafter.forward, drafter)


def test_gradients_are_those_of_an_eager_step(graphs_and_steps):
    _, _, (out, gradients), (expected_out, expected) = graphs_and_steps
    torch.testing.assert_close(out, expected_out, rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(gradients, expected, strict=True):
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()


def test_no_product_is_computed_again(graphs_and_steps):
    drafter, graphs, _, _ = graphs_and_steps
    products = [sum("mm.default" in str(n.target) for n in g.nodes) for g in graphs.values()]
    layers = drafter.config.num_hidden_layers
    assert products[0] == 1 + 9 * layers  # fc; keys and values are projected twice
    # two for each, but one for fc: features want no gradient
    assert products[1] == 2 * products[0] - 1


def test_neither_weights_in_the_products_dtype_nor_gates_are_kept(graphs_and_steps):
    drafter, graphs, _, _ = graphs_and_steps
    found = kept(graphs["forward"])
    inner = drafter.config.intermediate_size
    wide = {what: count for what, count in found.items() if inner in what[1]}
    slots = ROWS * BLOCKS * BLOCK_SIZE
    assert wide == {("aten.mm.default", (slots, inner)): 2 * drafter.config.num_hidden_layers}
    weights = {tuple(p.shape) for p in drafter.parameters() if p.ndim > 1}
    weights |= {shape[::-1] for shape in weights}
    assert not [what for what in found if what[1] in weights]


def test_by_itself_a_compiler_keeps_more(monkeypatch):
    """Or there would be no need of all this."""
    monkeypatch.setattr(model_module, "keep_products_only", lambda function, *args: function(*args))
    drafter = small_drafter()
    backend, graphs = traced()
    torch._dynamo.reset()
    step(torch.compile(drafter.forward, backend=backend), drafter)
    inner = drafter.config.intermediate_size
    wide = sum(count for what, count in kept(graphs["forward"]).items() if inner in what[1])
    assert wide > 2 * drafter.config.num_hidden_layers


def test_training_knows_the_groups_of_heads_and_how_to_compile(monkeypatch):
    seen = {}
    monkeypatch.setattr(Drafter, "compile", lambda self, **kwargs: seen.update(kwargs))
    target = random_target(SHAPES["toy"], 64, "cpu", torch.float32)
    case = make_case(target, tokens=40, anchors=4, layers=1, taps=2, block_size=4)
    ours = Ours(case, full_stack(), compiled=True)
    assert seen["options"] is INDUCTOR_OPTIONS
    make = module_module.build_visibilities

    def watch(*args):
        seen["groups"] = args[-1]
        return make(*args)

    monkeypatch.setattr(module_module, "build_visibilities", watch)
    ours.forward()
    assert seen["groups"] == 2
    assert DrafterConfig(num_attention_heads=6, num_key_value_heads=2).num_key_value_groups == 3


def test_sums_of_few_parts_are_made_before_they_are_read():
    parts = torch.randn(4, 64)

    def read_in_two_places(parts):
        total = parts.sum(0)
        return total[:16].exp(), total[16:].cos()

    def kernels(**options):
        torch._dynamo.reset()
        return run_and_get_code(torch.compile(read_in_two_places, **options), parts)[1][0]

    assert "buf0 = empty_strided_cpu((64, )" not in kernels()
    assert "buf0 = empty_strided_cpu((64, )" in kernels(options=INDUCTOR_OPTIONS)
