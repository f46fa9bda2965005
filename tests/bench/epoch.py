"""What one measurement of `NTKMonitor` costs beside an epoch of training.

ResNet-18 for 32×32 images, 64 of them as the probe, full outputs; an epoch is the
50 000 images of CIFAR-10 in batches of 128. Images are noise: the time is the same.
"""

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from bench.models import resnet

BATCH = 128
EXAMPLES = 50_000
WARM = 3


def epoch(steps: int = 20) -> dict[str, Any]:
    """Time training steps and measurements of one run, print and return the ratio.

    Args:
        steps: Training steps that are timed.
    """
    import lightning as L  # noqa: N812 - as everybody calls it
    from lightning.pytorch.loggers.logger import DummyLogger
    from torch.utils.data import DataLoader, TensorDataset

    from ntk_callbacks import NTKMonitor, at

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = resnet(10, None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            x, y = batch
            return functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    class Logged(DummyLogger):
        """Keeps `monitor/seconds` of every measurement: first, in between, last."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            self.seconds += [v for k, v in metrics.items() if k == "monitor/seconds"]

    class Steps(L.Callback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    torch.manual_seed(0)
    count = BATCH * (WARM + steps)
    data = TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,)))
    clock = Steps()
    monitor = NTKMonitor(probe=64, every=at(steps), outputs="full")
    logger = Logged()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, monitor],
    )
    module = Module()
    assert isinstance(module.model, nn.Module)
    trainer.fit(module, DataLoader(data, BATCH))
    step = statistics.median(clock.seconds[WARM:])
    measurement = statistics.median(logger.seconds)
    whole = step * EXAMPLES / BATCH
    ratio = measurement / whole
    print(f"training step, batch of {BATCH}: {step:.2f} s; epoch: {whole:.0f} s")
    print(f"measurement, N = 64, full outputs: {measurement:.2f} s")
    print(f"measurement / epoch: {ratio:.2%}")
    return {"step": step, "measurement": measurement, "ratio": ratio}
