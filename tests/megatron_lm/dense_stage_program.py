"""Two pipeline stages of a job's own chunks with latent attention; the layers of the first are all dense.

Prints for each model whether every rank reads the architecture that the chunks were built from.
"""

from __future__ import annotations

from families import two_layers

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.build import from_chunks, from_hf
from megatron_rl.engines.megatron.model_proof import prove
from megatron_rl.parallel import ParallelContext, ParallelSizes

MODELS = ("deepseek_v2", "deepseek_v3", "deepseek_v3, halves turn, weights not rescaled")


def main() -> None:
    current_platform().init_process_group(timeout=120)
    context = ParallelContext.create(ParallelSizes(pp=2), 60)
    for name in MODELS:
        built = from_hf(two_layers(name, 256), context)
        adopted = from_chunks(built.chunks, context, vocab=256)
        prove(adopted, packing=True)
        read, wanted = adopted.architecture, built.architecture
        same = (read.experts, read.mla, read.family) == (wanted.experts, wanted.mla, wanted.family)
        if context.rank == 0:
            print(f"{name}: {'as it was built' if same else read}")
        assert all(context.gather_objects(same)), (context.rank, read, wanted)


if __name__ == "__main__":
    main()
