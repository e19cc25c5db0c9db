"""Engines that train: one face (`base.TrainingEngine`), and a folder for each backend behind it.

Roles (`megatron_rl.workers`) know the face alone; `build.py` is the one place that chooses a backend.
"""
