"""The CPU face of Megatron-Core: its own modules are rewritten as they are imported, and nothing else is touched.

`REWRITES` (on the syntax tree) and `PATCHES` (on a module just imported) are the complete list of what changes, each
with its reason and the upstream lines it answers to. `install_cpu_face` does nothing where an accelerator is visible.
"""

from megatron_rl.devices.cpu_face.finder import install_cpu_face
from megatron_rl.devices.cpu_face.patches import KNOWN_VERSIONS, PATCHES, Patch
from megatron_rl.devices.cpu_face.rewrite import REWRITES, Rewrite

__all__ = ["KNOWN_VERSIONS", "PATCHES", "REWRITES", "Patch", "Rewrite", "install_cpu_face"]
