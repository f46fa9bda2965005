"""A run that three monitors measured into the event file of TensorBoard."""

from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_callbacks import JacobianMonitor, NTKMonitor, ParameterDriftMonitor, Probe, at

# Two epochs of three steps, and three monitors that agree only on the first and last.
NTK_STEPS = [0, 2, 4, 6]

PARAMS_STEPS = [0, 3, 6]

JACOBIAN_STEPS = [0, 1, 5, 6]

SCALARS = {
    "ntk/condition_number": NTK_STEPS,
    "ntk/eigenvalue_max": NTK_STEPS,
    "ntk/eigenvalue_min": NTK_STEPS,
    "ntk/entropy_rank": NTK_STEPS,
    "ntk/kernel_distance": NTK_STEPS,
    "ntk/kernel_velocity": NTK_STEPS,
    "ntk/max_learning_rate": NTK_STEPS,
    "ntk/off_diagonal_share": NTK_STEPS,
    "ntk/participation_ratio": NTK_STEPS,
    "ntk/relative_change": NTK_STEPS,
    "ntk/target_alignment": NTK_STEPS,
    "ntk/trace": NTK_STEPS,
    "params/cosine_to_init": PARAMS_STEPS,
    "params/displacement": PARAMS_STEPS,
    "params_tensors/displacement/net.0.bias": PARAMS_STEPS,
    "params_tensors/displacement/net.0.weight": PARAMS_STEPS,
    "params_tensors/displacement/net.2.bias": PARAMS_STEPS,
    "params_tensors/displacement/net.2.weight": PARAMS_STEPS,
    "params/path_length": PARAMS_STEPS,
    "jacobian/condition_number": JACOBIAN_STEPS,
    "jacobian/isometry_gap": JACOBIAN_STEPS,
    "jacobian/log_std": JACOBIAN_STEPS,
    "jacobian/mean_square": JACOBIAN_STEPS,
    "jacobian/singular_value_max": JACOBIAN_STEPS,
    "jacobian/singular_value_min": JACOBIAN_STEPS,
}

HISTOGRAMS = {
    "ntk/eigenvalues_log10": NTK_STEPS,
    "jacobian/singular_values_log10": JACOBIAN_STEPS,
}

IMAGES = {
    "ntk/kernel": NTK_STEPS,
    **{f"{tag}_over_time": [6] for tag in HISTOGRAMS},
}

CLASSES = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0, 2, 0])  # in no order, of unequal sizes


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def clusters(classes):
    """Inputs near one of three axes: similar within a class, orthogonal between."""
    return 2 * torch.eye(3)[classes] + 0.3 * torch.randn(len(classes), 3)


@dataclass(frozen=True)
class Run:
    folder: str
    model: nn.Module
    probe: Probe
    events: EventAccumulator


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    y = torch.arange(24) % 3
    data = DataLoader(TensorDataset(clusters(y), y), batch_size=8, shuffle=True)
    probe = Probe(clusters(CLASSES), CLASSES)
    model = Classifier()
    logger = TensorBoardLogger(tmp_path_factory.mktemp("run"), name="", version="")
    Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=logger,
        callbacks=[
            NTKMonitor(probe, every=2, on_error="raise"),
            ParameterDriftMonitor(every="epoch", on_error="raise"),
            JacobianMonitor(probe, every=at(1, 5), on_error="raise"),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)
    events = EventAccumulator(
        logger.log_dir, size_guidance={"scalars": 0, "histograms": 0, "images": 0}
    )
    return Run(logger.log_dir, model, probe, events.Reload())
