"""Steps that cannot be predicted are refused, and the training goes on."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from monitored import Ascending, Plain, fit, same, seeded
from predicted import OPTIMIZERS, OwnClipping, monitor, rows, run, trained_with
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from ntk_callbacks.callbacks.prediction import PredictionMonitor


def stepped_aside(model, what, used=None, **settings):
    """A warning that says why; training as without the monitor."""
    used = used or PredictionMonitor(4, 1)
    with pytest.warns(UserWarning, match=what) as caught:
        monitored = run(model, used, **settings)
    texts = [str(w.message) for w in caught if "PredictionMonitor" in str(w.message)]
    assert len(texts) == 1
    assert "step 1 failed" in texts[0]
    assert "off for the rest of this run; training goes on" in texts[0]
    seeded()
    same(monitored.trace(), fit(model(), **({"max_steps": 8} | settings)).trace())
    assert not rows(used)


def test_optimizers_with_a_closure_are_refused():
    model = trained_with(lambda m: torch.optim.LBFGS(m.parameters(), 0.1))
    stepped_aside(model, r"LBFGS.*steps without a closure", max_steps=3)
    with pytest.raises(RuntimeError, match="LBFGS"):
        run(model, monitor(), max_steps=3)


class Locked(SGD):
    """Holds what cannot be copied."""

    def __init__(self, parameters):
        super().__init__(parameters, 0.1)
        self.generator = (number for number in range(3))


def test_optimizers_that_cannot_be_copied_are_refused():
    stepped_aside(trained_with(lambda m: Locked(m.parameters())), "cannot be copied")


def test_random_outputs_are_refused():
    class Noisy(Plain):
        def forward(self, x):
            return self.net(x + torch.randn_like(x))

    stepped_aside(Noisy, "draws random numbers")


@pytest.mark.parametrize("manual", [False, True])
def test_optimizers_that_evaluate_the_loss_again_are_refused(manual):
    class Closed(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            def closure():
                optimizer.zero_grad()
                loss = cross_entropy(self(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            if not manual:
                return super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            optimizer.step(closure=closure)
            return None

    stepped_aside(
        trained_with(lambda m: Ascending(m.parameters(), 0.1), Closed),
        "Ascending evaluates the loss more than once",
    )


def test_failing_prediction_is_tried_again_then_given_up():
    class Failing(Optimizer):
        """Has a rule of its own that fails on the side."""

        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure=None):
            return closure()

        def __deepcopy__(self, memo):
            raise ArithmeticError("no copies")

    stepped_aside(trained_with(lambda m: Failing(m.parameters())), "no copies")


def test_failing_loss_is_tried_three_times():
    def failing(outputs, targets):
        raise ArithmeticError("the loss is broken")

    used = PredictionMonitor(4, 1, loss_fn=failing)
    with pytest.warns(UserWarning, match="the loss is broken") as caught:
        monitored = run(Plain, used)
    texts = [str(w.message) for w in caught if "is broken" in str(w.message)]
    assert len(texts) == 3
    seeded()
    same(monitored.trace(), fit(Plain(), max_steps=8).trace())


def test_module_that_clips_itself_on_several_processes_is_refused(monkeypatch):
    from lightning.pytorch import Trainer

    monkeypatch.setattr(Trainer, "world_size", 2)
    model = trained_with(OPTIMIZERS["sgd"], OwnClipping)
    stepped_aside(model, r"OwnClipping.configure_gradient_clipping may wait for other")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
def test_sharded_weights_are_not_touched_where_a_run_goes_on():
    """There the step comes before any measurement that could refuse them."""

    class FSDPStrategy(SingleDeviceStrategy):
        """Only the name is that of the sharding one."""

    run(Plain, monitor(), max_steps=3).trainer.save_checkpoint("3.ckpt")
    used = PredictionMonitor(4, 1)
    asked = []
    used.instrument.predict = lambda *_, **__: asked.append(1)
    strategy = FSDPStrategy(torch.device("cpu"))
    with pytest.warns(UserWarning, match="step 4 failed.*sharded by FSDPStrategy"):
        run(Plain, used, max_steps=6, ckpt_path="3.ckpt", strategy=strategy)
    assert not asked
