"""Training in bfloat16 with float32 masters, and steps recorded as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
        inner, large, small = [], [], []
        for (name, _), master in zip(module.named_parameters(), self.masters, strict=True):
            group = small if master.dim() < 2 else inner if master.dim() == 2 and ".layers." in name else large
            group.append(master)
        on_gpu = self.masters[0].is_cuda  # there an update can be recorded: its rate lies on the device, too
        at = torch.tensor(rate, device="cuda") if on_gpu else rate
        outer = [{"params": large, "weight_decay": decay}, {"params": small, "weight_decay": 0.0}]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(inner, lr=at, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=at, betas=(0.9, 0.98), fused=True, capturable=on_gpu),
        )
        warm = min(200, steps // 10 + 1)
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer,
                lambda step: min(step + 1, warm) / warm * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0))),
            )
            for optimizer in self.optimizers
        ]

    def advance(self) -> None:
        """The rate of the next step."""
        for schedule in self.schedules:
            schedule.step()

    def update(self, loss: Tensor) -> None:
        """One step down; the caller then calls `advance`."""
        loss.backward()
        for parameter in self.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.module.parameters()])
        for parameter in self.module.parameters():
            parameter.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(self.module.parameters()), self.masters)

    def restore(self) -> None:
        """Give the module its float32 weights when training is over."""
        for parameter, master in zip(self.module.parameters(), self.masters, strict=True):
            parameter.data = master.detach()


class Recorded:
    """A function of tensors of fixed shapes on a GPU, which after some calls is recorded as a CUDA graph and replayed:
    launching its thousands of small kernels one by one takes several times as long as they run."""

    FIRST = 3  # calls that run as they are: libraries and optimizer make their memory

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.calls = function, 0
        self.stream = torch.cuda.Stream()
        self.inputs: Sequence[Tensor] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function returns; valid until the next call."""
        self.calls += 1
        if self.calls <= self.FIRST:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.output = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.output
        if self.graph is None:
            self.inputs = [each.clone() for each in inputs]
            self.graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.output = self.function(*self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output
