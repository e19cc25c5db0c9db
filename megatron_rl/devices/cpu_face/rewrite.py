"""The rewrites of Megatron-Core's syntax trees: five rules, as data.

`rewritten(source, path)` gives the code to run. Each rule looks at one kind of node and returns it or its
replacement; children are rewritten before their parents.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType

STAND_IN = "__torch_cuda__"  # global name under which a rewritten module finds the stand-in
WORDS = ("cuda", "pin_memory")  # a source without them has nothing to rewrite


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One rule: what it replaces and why; ``upstream`` cites lines of megatron-core 0.16.1 that need it."""

    name: str
    node: type[ast.AST]
    apply: Callable[..., ast.AST]
    reason: str
    upstream: tuple[str, ...]


def _torch_cuda(node: ast.Attribute) -> ast.AST:
    of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
    if node.attr == "cuda" and of_torch and isinstance(node.ctx, ast.Load):
        return ast.copy_location(ast.Name(STAND_IN, ast.Load()), node)
    return node


def _moves_to_device(node: ast.Call) -> ast.AST:
    # ``torch.cuda`` has become a Name by now, so what is left is a method of a tensor or a module.
    if isinstance(node.func, ast.Attribute) and node.func.attr in ("cuda", "pin_memory"):
        return node.func.value
    return node


def _pinned(node: ast.keyword) -> ast.AST:
    if node.arg == "pin_memory":
        node.value = ast.copy_location(ast.Constant(False), node.value)
    return node


def _device_name(node: ast.Constant) -> ast.AST:
    if isinstance(node.value, str) and node.value == "cuda":
        node.value = "cpu"
    return node


def _tensor_type(node: ast.Constant) -> ast.AST:
    if isinstance(node.value, str) and node.value.startswith("torch.cuda.") and node.value.endswith("Tensor"):
        node.value = node.value.replace("torch.cuda.", "torch.")
    return node


REWRITES = (
    Rewrite(
        "torch.cuda -> the stand-in module",
        ast.Attribute,
        _torch_cuda,
        "devices, streams, events and random states are asked of CUDA without a check that it is there",
        (
            "pipeline_parallel/p2p_communication.py:313 _communicate",
            "distributed/param_and_grad_buffer.py:783 _ParamAndGradBuffer.__init__",
            "tensor_parallel/random.py:235 CudaRNGStatesTracker.add",
        ),
    ),
    Rewrite(
        "x.cuda(...), x.pin_memory() -> x",
        ast.Call,
        _moves_to_device,
        "tensors are moved to the GPU, or pinned for it, by method",
        (
            "tensor_parallel/data.py:84 broadcast_data",
            "models/common/language_module/language_module.py:244 setup_embeddings_and_output_layer",
            "optimizer/optimizer.py:375 MegatronOptimizer",
        ),
    ),
    Rewrite(
        "pin_memory=... -> pin_memory=False",
        ast.keyword,
        _pinned,
        "pinning needs a CUDA driver",
        ("models/common/embeddings/rope_utils.py:63 get_pos_emb_on_this_cp_rank", "utils.py:2117"),
    ),
    Rewrite(
        "'cuda' -> 'cpu'",
        ast.Constant,
        _device_name,
        "the device is spelt out where tensors are made and compared",
        (
            "pipeline_parallel/schedules.py:596 forward_backward_no_pipelining",
            "optimizer/clip_grads.py:115 get_grad_norm_fp32",
            "optimizer/optimizer.py:473 MixedPrecisionOptimizer.__init__",
        ),
    ),
    Rewrite(
        "'torch.cuda.FloatTensor' -> 'torch.FloatTensor'",
        ast.Constant,
        _tensor_type,
        "Tensor.type() of a CPU tensor has no 'cuda' in it, and the optimizers sort parameters by that string",
        (
            "optimizer/distrib_optimizer.py:361 _build_model_and_main_param_groups",
            "optimizer/optimizer.py:671 Float16OptimizerWithFloat16Params.__init__",
            "optimizer/clip_grads.py:167 clip_grad_by_total_norm_fp32",
        ),
    ),
)


def rewritten(source: bytes, path: str, rewrites: tuple[Rewrite, ...] = REWRITES) -> CodeType:
    """Compile ``source`` with ``rewrites`` applied; line numbers stay those of ``path``."""
    rules: dict[type, list[Callable[..., ast.AST]]] = {}
    for rule in rewrites:
        rules.setdefault(rule.node, []).append(rule.apply)
    tree = ast.parse(source, path)
    _apply(tree, rules)
    return compile(tree, path, "exec", dont_inherit=True)


def _apply(node: ast.AST, rules: dict[type, list[Callable[..., ast.AST]]]) -> ast.AST:
    # ast.NodeTransformer does the same at twice the time, which every rank would pay at start.
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, list):
            value[:] = [_apply(item, rules) if isinstance(item, ast.AST) else item for item in value]
        elif isinstance(value, ast.AST):
            new = _apply(value, rules)
            if new is not value:
                setattr(node, field, new)
    for rule in rules.get(type(node), ()):
        node = rule(node)
    return node
