"""Training in bfloat16 with float32 masters."""

from __future__ import annotations

import math
from collections.abc import Callable, Container

import torch
from torch import Tensor, nn


class Bfloat16:
    """Lets a module compute in bfloat16, and trains float32 masters of its weights: the matrices of its layers with
    Muon, which learns from as many tiles what AdamW learns from several times as many, the rest with AdamW."""

    def __init__(self, module: nn.Module, rate: float, steps: int, decay: float) -> None:
        self.module = module
        for parameter in module.parameters():  # buffers stay: rotary tables are float32 in every precision
            parameter.data = parameter.data.bfloat16()
        self.masters = [parameter.detach().float() for parameter in module.parameters()]
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        inner: list[Tensor] = []
        large: list[Tensor] = []
        small: list[Tensor] = []
        for (name, _), master in zip(module.named_parameters(), self.masters, strict=True):
            group = small if master.dim() < 2 else inner if master.dim() == 2 and ".layers." in name else large
            group.append(master)
        outer = [{"params": large, "weight_decay": decay}, {"params": small, "weight_decay": 0.0}]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(inner, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), fused=True),
        )
        warm = min(200, steps // 10 + 1)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min(step + 1, warm) / warm * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
            )
            for optimizer in self.optimizers
        ]

    @torch.no_grad()
    def compute_with(self, changed: Callable[[Tensor], Tensor], names: Container[str]) -> None:
        """Let the next step compute with `changed(weight)` in place of these weights; what it learns changes the
        weights themselves (straight-through estimate)."""
        for (name, parameter), master in zip(self.module.named_parameters(), self.masters, strict=True):
            if name in names:
                parameter.copy_(changed(master))

    def update(self, loss: Tensor) -> None:
        """One step down."""
        loss.backward()
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.module.parameters()])
        for parameter in self.module.parameters():
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.module.parameters()), self.masters)

    def restore(self) -> None:
        """Give the module its float32 weights when training is over."""
        for parameter, master in zip(self.module.parameters(), self.masters, strict=True):
            parameter.data = master.detach()
