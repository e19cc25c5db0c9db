"""Thousands of strided 2-D copies in one call, with a cast: how every weight byte moves."""

from megatron_rl.ops.copy_spans.interface import JOB_COLUMNS, check_jobs, copy_spans

__all__ = ["JOB_COLUMNS", "check_jobs", "copy_spans"]
