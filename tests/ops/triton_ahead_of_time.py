"""Compiles every Triton kernel to cubin for the architectures in argv, without a GPU; prints one JSON object.

A program of its own: kernels that were imported under TRITON_INTERPRET=1 cannot be compiled any more.
"""

from __future__ import annotations

import json
import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from megatron_rl.ops.accumulate.triton import BLOCK as SUM_BLOCK
from megatron_rl.ops.accumulate.triton import PACK as SUM_PACK
from megatron_rl.ops.accumulate.triton import sum_parts
from megatron_rl.ops.block_quantize.triton import quantize_blocks
from megatron_rl.ops.copy_spans.triton import NARROW, PACK, WIDE, copy_tiles
from megatron_rl.ops.gae.triton import BLOCK as GAE_BLOCK
from megatron_rl.ops.gae.triton import scan_sequences
from megatron_rl.ops.span_checksum.triton import COLS, ROWS, checksum_tiles
from megatron_rl.ops.span_checksum.triton import PACK as CHECKSUM_PACK
from megatron_rl.ops.token_logprobs.triton import BLOCK, fold_rows, gradient_rows

COPY = {"src": "*i32", "dst": "*i16", "tiles": "*i64"}
CHECKSUM = {"tensor": "*i16", "tiles": "*i64", "sums": "*i64"}
SUM = {"first": "*i16", "starts": "*i64", "num_parts": "i32", "out": "*i32", "n": "i32"}
QUANTIZE = {"x": "*i16", "codes": "*u8", "scales": "*fp32", "rows": "i32", "cols": "i32"}
STATISTICS = dict.fromkeys(("maximum", "total", "target", "moment", "log_total", "entropy"), "*fp32")
GRADIENTS = dict.fromkeys(("grad_logprob", "grad_entropy"), "*fp32")
SIZES = {"width": "i32", "first_row": "i32", "temperature": "fp32"}
LOGPROB = {"logits": "*i16", "targets": "*i64", **STATISTICS, **GRADIENTS, **SIZES}

TOKENS = {**dict.fromkeys(("rewards", "values", "advantages", "returns"), "*fp32"), "mask": "*i8"}
GAE = {**TOKENS, "bounds": "*i64", "gamma": "*fp64", "decay": "*fp64"}


def copy_constants(pack: int, shape: tuple[int, int], src: int = 1, dst: int = 2) -> dict[str, int]:
    return {"SRC": src, "DST": dst, "PACK": pack, "ROWS": shape[0], "COLS": shape[1]}


CHECKSUM_CONSTANTS = {"SRC": 0, "DST": 0, "PACK": CHECKSUM_PACK, "MASK": 0xFFFF, "ROWS": ROWS, "COLS": COLS}
LOGPROB_CONSTANTS = {"TYPE": 2, "ENTROPY": True, "BLOCK": BLOCK}
CASES = {
    "copy aligned wide": (copy_tiles, COPY, copy_constants(PACK, WIDE), 4),
    "copy aligned narrow": (copy_tiles, COPY, copy_constants(PACK, NARROW), 4),
    "copy unaligned": (copy_tiles, COPY, copy_constants(1, WIDE), 4),
    "copy bf16 bits": (copy_tiles, {**COPY, "src": "*i16"}, copy_constants(PACK, WIDE, 0, 0), 4),
    "checksum": (checksum_tiles, CHECKSUM, CHECKSUM_CONSTANTS, 4),
    "logprob fold": (fold_rows, LOGPROB, LOGPROB_CONSTANTS, 8),
    "logprob gradient": (gradient_rows, LOGPROB, LOGPROB_CONSTANTS, 8),
    "accumulate": (sum_parts, SUM, {"SRC": 2, "DST": 1, "PACK": SUM_PACK, "BLOCK": SUM_BLOCK}, 8),
    "gae": (scan_sequences, GAE, {"BLOCK": GAE_BLOCK}, 4),
    "quantize": (quantize_blocks, QUANTIZE, {"TYPE": 2, "BLOCK": 128}, 8),
}


def build(case: str, architecture: int) -> dict[str, object]:
    """What the test looks at: sizes, memory instructions, divisions and register spills to local memory."""
    kernel, signature, constants, warps = CASES[case]
    names = list(kernel.arg_names)
    signature = {name: signature.get(name, "constexpr") for name in names}
    # What the launcher finds out from the arguments: aligned pointers, and sizes that are multiples of 16.
    divisible = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] not in ("constexpr", "fp32")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    return {
        "cubin_bytes": len(compiled.asm["cubin"]),
        "loads": sorted(set(re.findall(r"ld\.global\S*", ptx))),
        "stores": sorted(set(re.findall(r"st\.global\S*", ptx))),
        "atomics": sorted(set(re.findall(r"(?:atom|red)\.\S*", ptx))),
        "divisions": sorted(set(re.findall(r"div\.\S+f32", ptx))),
        "local_memory": "st.local" in ptx,
    }


if __name__ == "__main__":
    print(json.dumps({f"{case} sm_{arch}": build(case, int(arch)) for arch in sys.argv[1:] for case in CASES}))
