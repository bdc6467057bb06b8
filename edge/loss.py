"""The loss: labels, and a teacher if there is one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Loss:
    """What is made small.

    Attributes:
        label_smoothing: share of a label's weight that is spread over all classes.
        teacher_weight: of the teacher's loss; the labels' has the rest.
        temperature: of both distributions in the teacher's loss.
    """

    label_smoothing: float = 0.0
    teacher_weight: float = 0.0
    temperature: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """A scalar, from logits (n, classes) and labels (n,), or (n, classes) of 0 and 1.

        With a teacher's logits: ``(1 - w) CE + w T^2 KL(teacher || logits)``, both at temperature
        T (Hinton, Vinyals, Dean, arXiv:1503.02531). Where an input may have several classes, each
        is a question of its own, and the teacher's answers are probabilities to come close to.
        """
        logits = logits.float()
        several = labels.ndim == 2
        if several:
            eased = labels * (1 - self.label_smoothing) + self.label_smoothing / 2
            loss = functional.binary_cross_entropy_with_logits(logits, eased)
        else:
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if teacher is None or not self.teacher_weight:
            return loss
        t, weight = self.temperature, self.teacher_weight
        teacher = teacher.float()
        if several:
            theirs = functional.binary_cross_entropy_with_logits(
                logits / t, (teacher / t).sigmoid()
            )
        else:
            theirs = functional.kl_div(
                functional.log_softmax(logits / t, dim=1),
                functional.log_softmax(teacher / t, dim=1),
                reduction="batchmean",
                log_target=True,
            )
        return (1 - weight) * loss + weight * t * t * theirs
