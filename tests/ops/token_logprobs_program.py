"""Run on 2 ranks: `token_logprobs` with the vocabulary split over them, against plain torch in float64."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from megatron_rl.ops.token_logprobs import from_logits, token_logprobs


def check(vocab: int, rows: int, scale: float, implementation: str) -> float:
    """Largest error, relative to the largest value, over outputs and gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(21, 12, generator=generator)
    weight = torch.randn(rows * size, 12, generator=generator) * scale
    targets = torch.randint(0, vocab, (21,), generator=generator)
    factors = torch.randn(2, 21, generator=generator)

    whole = [x.double().requires_grad_() for x in (hidden, weight)]
    logs = torch.log_softmax(whole[0] @ whole[1][:vocab].t() / 0.8, dim=-1)
    want = [logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)]
    (want[0] @ factors[0].double() + want[1] @ factors[1].double()).backward()

    mine = [hidden.clone().requires_grad_(), weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()]
    logprobs, entropy = token_logprobs(
        *mine,
        targets,
        vocab_start=rank * rows,
        vocab_size=vocab,
        temperature=0.8,
        group=dist.group.WORLD,
        with_entropy=True,
        chunk_tokens=8,
        implementation=implementation,
    )
    (logprobs @ factors[0] + entropy @ factors[1]).backward()
    grad_hidden = mine[0].grad.clone()
    dist.all_reduce(grad_hidden)  # each rank's gradient is what its rows contribute
    got = [logprobs, entropy, grad_hidden, mine[1].grad]
    want += [whole[0].grad, whole[1].grad[rank * rows : (rank + 1) * rows]]
    pairs = zip(got, want, strict=True)
    return max(((a.detach() - b).abs().max() / b.detach().abs().max().clamp_min(1e-3)).item() for a, b in pairs)


def check_logits(implementation: str) -> float:
    """The same from logits, of which the last rank's are all -inf for some tokens."""
    rank, rows, vocab = dist.get_rank(), 32, 50
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(21, rows * dist.get_world_size(), generator=generator)
    logits[:9, rows:] = -torch.inf
    targets = torch.randint(0, rows, (21,), generator=generator)
    factors = torch.randn(2, 21, generator=generator)

    whole = logits.double().requires_grad_()
    logs = torch.log_softmax(whole[:, :vocab], dim=-1)
    held = torch.where(logs.isneginf(), 0.0, logs)
    want = [logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * held).sum(-1)]
    (want[0] @ factors[0].double() + want[1] @ factors[1].double()).backward()

    mine = logits[:, rank * rows : (rank + 1) * rows].clone().requires_grad_()
    logprobs, entropy = from_logits(
        mine,
        targets,
        vocab_start=rank * rows,
        vocab_size=vocab,
        group=dist.group.WORLD,
        with_entropy=True,
        implementation=implementation,
    )
    (logprobs @ factors[0] + entropy @ factors[1]).backward()
    got = [logprobs, entropy, mine.grad]
    want.append(whole.grad[:, rank * rows : (rank + 1) * rows])
    return max((a.detach() - b).abs().max().item() for a, b in zip(got, want, strict=True))


def main() -> None:
    dist.init_process_group("gloo")
    for implementation in sys.argv[1:]:
        # even; padding on the last rank; a last rank of nothing but padding; logits far apart on the two ranks
        for vocab, rows, scale in ((64, 32, 1.0), (50, 32, 1.0), (30, 32, 1.0), (50, 32, 10.0)):
            error = torch.tensor(check(vocab, rows, scale, implementation))
            dist.all_reduce(error, op=dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                print(f"case|{implementation}|{vocab} of {rows}+{rows} x {scale}|{error:.3e}", flush=True)
        error = torch.tensor(check_logits(implementation)).nan_to_num(nan=torch.inf)
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(f"case|{implementation}|from logits|{error:.3e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
