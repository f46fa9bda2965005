"""The LightningModule against a loop written by hand and against scikit-learn."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch.nn import functional

from ntk_callbacks.experiments import MLP, Classifier, Digits
from ntk_callbacks.experiments.data import EpochShuffle

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Recorder(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))


def fit(module, data, **kwargs):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **kwargs,
    )
    trainer.fit(module, datamodule=data)
    return trainer


@pytest.fixture(scope="module")
def trained():
    """Two epochs, and the same two by a plain loop."""
    torch.manual_seed(0)
    data, logger = Digits(batch_size=100, seed=5), Recorder()
    module = Classifier(MLP(data.shape, data.classes, width=16), SGD)
    by_hand = MLP(data.shape, data.classes, width=16)
    by_hand.load_state_dict(module.model.state_dict())
    trainer = fit(module, data, max_epochs=2, logger=logger)

    images, labels = data.train_dataloader().dataset.tensors
    optimizer, order = SGD(by_hand.parameters()), EpochShuffle(len(labels), seed=5)
    scores = []
    for epoch in range(2):
        order.set_epoch(epoch)
        loss_sum, hits = 0.0, 0
        for batch in torch.tensor(list(order)).split(100):
            logits = by_hand(images[batch])
            loss = functional.cross_entropy(logits, labels[batch])
            loss_sum += loss.item() * len(batch)
            hits += (logits.argmax(1) == labels[batch]).sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scores.append((loss_sum / len(labels), hits / len(labels)))
    return module, data, logger, trainer, by_hand, scores


def test_training_is_the_plain_loop_bit_for_bit(trained):
    module, _, _, _, by_hand, _ = trained
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, by_hand.state_dict()[name])


def test_training_scores_are_means_over_the_epoch(trained):
    module, *_, scores = trained
    found = [values for _, values in module.history if "train/loss" in values]
    for values, (loss, accuracy) in zip(found, scores, strict=True):
        assert values["train/loss"] == pytest.approx(loss, rel=1e-5)
        assert values["train/accuracy"] == pytest.approx(accuracy, rel=1e-6)


def test_test_scores_are_those_of_scikit_learn_at_the_last_step(trained):
    module, data, _, _, by_hand, _ = trained
    images, labels = data.val_dataloader().dataset.tensors
    probabilities = by_hand(images).detach().double().softmax(1).numpy()
    step, values = [row for row in module.history if "test/loss" in row[1]][-1]
    assert step == 30  # 15 batches of 100 from 1438 examples, twice
    assert values["test/loss"] == pytest.approx(
        log_loss(labels, probabilities), rel=1e-4
    )
    assert values["test/accuracy"] == pytest.approx(
        accuracy_score(labels, probabilities.argmax(1)), rel=1e-6
    )


def test_scores_are_logged_at_completed_updates(trained):
    module, _, logger, trainer, *_ = trained
    tags = ("train/loss", "train/accuracy", "test/loss", "test/accuracy")
    rows = [
        (s, values)
        for s, values in logger.rows
        if tags[0] in values or tags[2] in values
    ]
    assert rows == module.history
    assert [step for step, _ in rows] == [15, 15, 30, 30]
    for tag in tags:  # what EarlyStopping and ModelCheckpoint can monitor
        assert tag in trainer.callback_metrics


def test_the_sanity_check_leaves_no_score():
    module = Classifier(MLP((1, 8, 8), 10, width=4, depth=1), SGD)
    fit(
        module,
        Digits(batch_size=1000),
        max_epochs=1,
        num_sanity_val_steps=1,
        limit_val_batches=1,
        logger=False,
    )
    assert [step for step, _ in module.history] == [2, 2]
