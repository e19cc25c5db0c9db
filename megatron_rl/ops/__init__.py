"""Operations with one face and several implementations: `from megatron_rl.ops.copy_spans import copy_spans`.

Each operation is a folder: `interface.py` (the contract and the edge checks), `reference.py` (torch, the definition
of correct) and, where they exist, `cpu.py`, `triton.py`, `cuda.py` with the same signature. `selection.py` chooses.
"""
