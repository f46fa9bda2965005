"""The LightningModule that trains a reference classifier."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]


class Classifier(LightningModule):
    """Minimizes the mean cross-entropy of `model` and scores both splits every epoch.

    Logs `train/loss`, `train/accuracy`, `test/loss` and `test/accuracy` at the number
    of completed optimizer updates. The test values belong to the weights at that step;
    the training values are means over the epoch's batches, each taken before its
    update. The loss is in nats, the accuracy in [0, 1]; with several processes both are
    taken over all of them.

    Args:
        model: Maps inputs to logits (n, classes).
        optimizer: Maps parameters to an optimizer: `partial(torch.optim.SGD, lr=0.1)`.
        classes: Number of classes.

    Attributes:
        history: (step, {tag: value}) in the order of measurement; kept in checkpoints.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> Classifier(nn.Linear(4, 3), sgd, classes=3)(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self, model: nn.Module, optimizer: OptimizerFactory, classes: int = 10
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_factory = optimizer
        scores = MetricCollection(
            {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(classes, average="micro"),
            }
        )
        self.train_scores = scores.clone(prefix="train/")
        self.test_scores = scores.clone(prefix="test/")
        self.history: list[tuple[int, dict[str, float]]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs to logits (n, classes)."""
        logits: Tensor = self.model(x)
        return logits

    @override
    def configure_optimizers(self) -> Optimizer:
        return self.optimizer_factory(self.parameters())

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._score(batch, self.train_scores)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._score(batch, self.test_scores)

    @override
    def on_train_epoch_end(self) -> None:
        self._report(self.train_scores)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self.test_scores.reset()
        else:
            self._report(self.test_scores)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classifier_history"] = self.history

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint.get("classifier_history", []))

    def _score(self, batch: tuple[Tensor, Tensor], scores: MetricCollection) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = functional.cross_entropy(logits, y)
        scores.update(value=loss.detach(), weight=len(y), preds=logits, target=y)
        return loss

    def _report(self, scores: MetricCollection) -> None:
        values = {tag: float(value) for tag, value in scores.compute().items()}
        scores.reset()
        step = self.trainer.global_step
        self.history.append((step, values))
        # Lightning's own x axis is one update late after validation, so it only gets
        # the values for its progress bar and for callbacks that monitor them. They are
        # the same in every process; sync_dist only tells Lightning so.
        self.log_dict(values, logger=False, prog_bar=True, sync_dist=True)
        for logger in self.loggers:
            logger.log_metrics(values, step=step)
