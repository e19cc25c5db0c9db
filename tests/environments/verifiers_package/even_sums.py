"""A taskset of `verifiers` as its users write one: sums, and a harness that asks for the answer once more."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import verifiers.v1 as vf

__all__ = ["AskTwiceHarness", "EvenSums"]


class SumData(vf.TaskData):
    total: int


class SumTask(vf.Task[SumData, vf.State]):
    @vf.reward
    async def closeness(self, trace: vf.Trace) -> float:
        return float(len(trace.assistant_messages)) + self.data.total / 100

    @vf.reward(weight=0.5)
    async def asked_for_it(self, trace: vf.Trace) -> float:
        return float(trace.messages[0].content == self.data.prompt)


class EvenSums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> Iterator[SumTask]:
        for number in range(3):
            yield SumTask(SumData(prompt=f"what is {number}+{number}?", total=2 * number), self.config.task)


class AskTwiceHarness(vf.Harness[vf.HarnessConfig]):
    """In the process of the environment: it needs no program of its own."""

    NEEDS_CONTAINER = False
    EXECUTES_CODE = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):  # type: ignore[no-untyped-def]
        if "fail" in self.config.env:
            raise OSError("the harness is gone")
        messages = [{"role": "user", "content": data.prompt}]
        headers = {"authorization": f"Bearer {secret}"}
        async with httpx.AsyncClient(base_url=endpoint, headers=headers, timeout=60) as client:
            for _ in range(2):
                body = {"model": ctx.model, "messages": messages}
                answer = await client.post("chat/completions", json=body)
                answer.raise_for_status()
                messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": "are you sure?"}]
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")
