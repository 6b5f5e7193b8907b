"""The training run: Muon for matrices, AdamW for the rest, a schedule over wall-clock time.

    python -m demo.train SHARDS OUT --minutes 15 --lr 0.004

Writes OUT/log.jsonl as it goes, OUT/weights.pt now and then and at the end.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo.data import TOKENS, batches
from demo.model import Config, DemoModel, Packed, head_loss, loss

MTP_WEIGHT = 0.2
WARMUP_STEPS = 150
DECAY_FROM = 0.4
BIAS_SPEED = 1e-3
WEIGHT_DECAY = 0.05


def orthogonalize(g: Tensor) -> Tensor:
    """Roughly the nearest orthogonal matrices of g [..., rows, cols], by Newton-Schulz."""
    x = g.bfloat16() if g.is_cuda else g
    wide = x.size(-2) > x.size(-1)
    x = x.mT if wide else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
    return (x.mT if wide else x).float()


class Muon:
    """Momentum, orthogonalized. Matrices of one shape are stacked and updated at once."""

    def __init__(self, params: Iterable[Tensor], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            self.groups.setdefault((p.shape[-2], p.shape[-1]), []).append(p)
        self.buffers = {
            shape: [torch.zeros_like(p) for p in group] for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update; the step's size does not depend on a matrix's shape (Moonlight's scale)."""
        for (rows, cols), params in self.groups.items():
            updates = []
            for p, m in zip(params, self.buffers[rows, cols], strict=True):
                assert p.grad is not None
                m.lerp_(p.grad, 1 - self.momentum)
                updates.append(p.grad.lerp(m, self.momentum).view(-1, rows, cols))
            scale = 0.2 * max(rows, cols) ** 0.5
            stacked = orthogonalize(torch.cat(updates)) * scale
            at = 0
            for p in params:
                count = p.numel() // (rows * cols)
                p.mul_(1 - lr * WEIGHT_DECAY).sub_(lr * stacked[at : at + count].view_as(p))
                at += count


def split_parameters(model: DemoModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices for Muon, and everything else."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        other = p.ndim < 2 or name in ("embed_tokens", "lm_head.weight") or "gate.weight" in name
        (rest if other else matrices).append(p)
    return matrices, rest


def schedule(done: float, step: int) -> float:
    """Learning-rate factor at the fraction `done` of the time: warm up, hold, fall to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


def run(args: argparse.Namespace) -> None:
    """Train until the time is up."""
    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" or args.backend else torch.float32
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 32
    config = Config()
    model = DemoModel(config)
    if args.init:
        model.load_state_dict(torch.load(args.init, weights_only=True))
    model = model.to(device)
    matrices, rest = split_parameters(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(
        rest, lr=args.lr, betas=(0.9, 0.98), eps=1e-12, weight_decay=0.0, fused=device == "cuda"
    )
    gates = model.gates()

    # one layer is a region: the graph of an MoE layer is compiled once and serves all of them
    head = head_loss
    if args.backend:
        head = torch.compile(head_loss, backend=args.backend)
        for layer in [*model.layers, model.mtp]:
            layer.compile(backend=args.backend)
    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "log.jsonl").open("w")

    def write(**entry: Any) -> None:
        line = json.dumps(entry)
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    write(parameters=sum(p.numel() for p in model.parameters()), lr=args.lr, minutes=args.minutes)
    feed = batches(args.shards, device, args.tokens)
    step, seen, saved = 0, 0, time.time()
    start, budget = began, args.minutes * 60.0
    total = torch.zeros(len(gates), config.n_routed_experts, device=device)
    while True:
        # the schedule spans what is left of the time once the first steps have been compiled
        if step == args.untimed:
            if device == "cuda":
                torch.cuda.synchronize()
            write(compile_seconds=round(time.time() - began, 1))
            start = time.time()
            budget = args.minutes * 60 - (start - began)
        done = 0.0 if step < args.untimed else (time.time() - start) / budget
        factor = schedule(done, step)
        batch = next(feed)
        packed = Packed.of(batch.tokens, batch.bounds, batch.longest)
        main, ahead, loads = loss(model, packed, batch.wanted, dtype, head)
        (main + MTP_WEIGHT * ahead).backward()
        norm = nn.utils.clip_grad_norm_(rest, 1.0)
        adam.param_groups[0]["lr"] = args.lr * factor
        adam.step()
        muon.step(args.lr * factor)
        for p in model.parameters():
            p.grad = None
        with torch.no_grad():
            speed = BIAS_SPEED * min(1.0, 2 * (1 - done))
            moved = torch.sign(loads.mean(1, keepdim=True) - loads) * speed
            for gate, change in zip(gates, moved, strict=True):
                gate.e_score_correction_bias += change
            total = total * 0.98 + loads * 0.02
        step += 1
        seen += batch.tokens.numel()
        if step % args.log_every == 0 or done >= 1:
            share = total / total.sum(1, keepdim=True) * config.n_routed_experts
            write(
                step=step,
                tokens=seen,
                loss=round(main.item(), 4),
                mtp=round(ahead.item(), 4),
                lr=args.lr * factor,
                norm=round(float(norm), 3),
                seconds=round(time.time() - start, 1),
                load_max=[round(x, 2) for x in share.amax(1).tolist()],
                load_min=[round(x, 2) for x in share.amin(1).tolist()],
                longest=batch.longest,
            )
        if time.time() - saved > 120 or done >= 1:
            torch.save(
                {k: v.bfloat16() if v.ndim > 1 else v for k, v in model.state_dict().items()},
                args.out / "weights.tmp",
            )
            (args.out / "weights.tmp").rename(args.out / "weights.pt")
            saved = time.time()
        if done >= 1:
            break
    write(
        finished=True,
        steps=step,
        tokens=seen,
        minutes=round((time.time() - start) / 60, 2),
        load=(total / total.sum(1, keepdim=True) * config.n_routed_experts).tolist(),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--init", type=Path, help="weights.pt of an earlier run to go on from")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="cut batches (toy runs)")
    parser.add_argument("--untimed", type=int, default=20, help="steps before the schedule starts")
    parser.add_argument("--backend", default="", help="torch.compile backend; none: eager")
    parser.add_argument("--log-every", type=int, default=50)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
