"""A flow is data: stages that declare what they read and write, joined with ``>>``, checked before they run."""

from megatron_rl.dataflow.flow import Flow, Stage

__all__ = ["Flow", "Stage"]
