"""What changes while a network learns: weights, their average, optimizers, the scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from datamix.errors import ConfigError
from edge.muon import Muon, is_hidden_kernel
from edge.schedules import average_decay, learning_rate
from edge.settings import TrainConfig
from edge.workers import Workers


class Learner:
    """One network in training; :meth:`state` is all that a checkpoint needs of it."""

    def __init__(self, part: nn.Module, config: TrainConfig, workers: Workers) -> None:
        """Take ``part`` over; it is changed in place and stays in training mode.

        Raises:
            ConfigError: the device is not there.
        """
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but torch finds no CUDA device here")
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        # torch's own annotation of this overload wants keywords only.
        self.part = part.to(config.device).to(memory_format=layout)  # type: ignore[call-overload]
        self.part.train()
        self._config, self._workers = config, workers
        self._optimizers = _optimizers(self.part, config)
        self._scaler = torch.amp.GradScaler("cuda", enabled=config.precision == "float16")
        self._parameters = list(self.part.parameters())
        self._buffers = [b for b in self.part.buffers() if b.is_floating_point()]
        self._average: list[Tensor] | None = None
        if config.ema_decay:
            self._average = [tensor.detach().clone() for tensor in self._tensors()]

    def learn(self, step: int, total: int, loss_of: Callable[[], Tensor]) -> Tensor:
        """One step of ``total``; returns the loss, detached, still on the device."""
        config = self._config
        with torch.autocast(
            config.device,
            dtype=torch.float16 if config.precision == "float16" else torch.bfloat16,
            enabled=config.precision != "float32",
        ):
            loss = loss_of()
        for parameter in self._parameters:
            parameter.grad = None
        torch.autograd.backward(self._scaler.scale(loss))
        share = learning_rate(config.schedule, step, total, 1.0, warm_up=config.warm_up)
        for optimizer, peak in self._optimizers:
            self._scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = share * peak
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # Running statistics, too, so that every worker has the same network after every step.
        self._workers.average([*gradients, *self._buffers])
        if config.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, config.clip_norm)
        for optimizer, _ in self._optimizers:
            self._scaler.step(optimizer)
        self._scaler.update()
        if self._average is not None:
            away = 1 - average_decay(step, config.ema_decay)
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._tensors(), away)
        return loss.detach()

    def _tensors(self) -> list[Tensor]:
        """What is averaged: parameters and running statistics."""
        return [*(p.detach() for p in self._parameters), *self._buffers]

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network as it would be kept now, in eval mode: with averaged weights, if any."""
        kept = [tensor.clone() for tensor in self._tensors()]
        self._fill(self._average)
        self.part.eval()
        try:
            yield self.part
        finally:
            self._fill(kept)
            self.part.train()

    def finish(self) -> None:
        """Leave the network as it is to be kept: averaged weights, eval mode, on the CPU."""
        self._fill(self._average)
        contiguous: Any = self.part.eval().to("cpu")
        contiguous.to(memory_format=torch.contiguous_format)

    def _fill(self, values: list[Tensor] | None) -> None:
        if values is not None:
            with torch.no_grad():
                torch._foreach_copy_(self._tensors(), values)

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint must keep of the learner."""
        return {
            "part": self.part.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self._optimizers],
            "scaler": self._scaler.state_dict(),
            "average": self._average,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what :meth:`state` gave."""
        self.part.load_state_dict(state["part"])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            with torch.no_grad():
                for mine, saved in zip(self._average, state["average"], strict=True):
                    mine.copy_(saved)


def _optimizers(part: nn.Module, config: TrainConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """The optimizers with their peak rates."""
    weights = list(part.parameters())
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(
            weights,
            lr=config.peak_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        return [(sgd, config.peak_rate)]
    kernels = [w for w in weights if config.optimizer == "muon" and is_hidden_kernel(w)]
    taken = set(map(id, kernels))
    rest = [w for w in weights if id(w) not in taken]
    chosen: list[tuple[torch.optim.Optimizer, float]] = []
    if kernels:
        muon = Muon(kernels, lr=config.muon_rate, momentum=config.momentum)
        chosen.append((muon, config.muon_rate))
    if rest:
        adamw = torch.optim.AdamW(rest, lr=config.peak_rate, weight_decay=config.weight_decay)
        chosen.append((adamw, config.peak_rate))
    return chosen
