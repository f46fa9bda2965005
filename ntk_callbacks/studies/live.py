"""A short Lightning run with monitors, for studies of what they see while it trains."""

import logging
import tempfile
import warnings

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ntk_callbacks.reporting.history import Series, load_history


def live_curves(
    module: LightningModule,
    data: LightningDataModule,
    monitors: list[Callback],
    *,
    steps: int,
    device: str,
) -> dict[str, Series]:
    """Train, and read back the curves that the monitors kept.

    Args:
        module: Trained in place.
        data: What it is trained on; nothing is validated.
        monitors: Of this package, with `history=True`.
        steps: Updates.
        device: `"cpu"`, or another accelerator's name in torch.

    Returns:
        Tag -> steps and values, of every scalar.
    """
    # Each job is a run: greetings of Lightning would bury the lines of the study.
    silent = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        logging.disable(max(silent, logging.INFO))
        try:
            Trainer(
                accelerator={"cuda": "gpu"}.get(device, device),
                devices=1,
                max_steps=steps,
                callbacks=monitors,
                limit_val_batches=0,
                num_sanity_val_steps=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            ).fit(module, datamodule=data)
        finally:
            logging.disable(silent)
        history = load_history(folder)
        return {tag: history[tag] for tag in history.scalars}
