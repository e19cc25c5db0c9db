"""Rewards that a server gives over HTTP: vLLM, SGLang, text-embeddings-inference, a chat model as judge, any JSON."""

from megatron_rl.rewards.service.classifiers import SGLangReward, TextEmbeddingsReward, VllmReward
from megatron_rl.rewards.service.custom import HttpReward
from megatron_rl.rewards.service.judge import JudgeReward
from megatron_rl.rewards.service.service_config import ServiceConfig
from megatron_rl.rewards.service.service_reward import ServiceReward

SERVICES = ("vllm", "sglang", "tei", "tgi", "http", "judge")  # names in REWARDS

__all__ = [
    "SERVICES",
    "HttpReward",
    "JudgeReward",
    "SGLangReward",
    "ServiceConfig",
    "ServiceReward",
    "TextEmbeddingsReward",
    "VllmReward",
]
