"""NTKMonitor with everything on: sharing, learning rates, resume, no trace."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from monitored import Plain, Recorder, fit, loader, same, seeded, smooth_net

from ntk_callbacks import NTKMonitor, NTKOptions


class Descending(Plain):
    """Plain SGD whose rate falls at every step."""

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.4)
        falling = torch.optim.lr_scheduler.ExponentialLR(sgd, 0.8)
        return [sgd], [{"scheduler": falling, "interval": "step"}]

    def training_step(self, batch, batch_idx):
        x, y = next(iter(loader(12, 12)))
        return torch.nn.functional.cross_entropy(self(x), y)


def everything(name="ntk", every=2):
    return NTKMonitor(
        12,
        every,
        metrics="all",
        by="module",
        # Named, because the step above trains on other examples than its batch.
        options=NTKOptions(name=name, history=False, loss="cross_entropy_mean"),
        on_error="raise",
    )


def run(callbacks, **settings):
    seeded()
    return fit(Descending(smooth_net()), callbacks, **({"max_steps": 6} | settings))


def test_training_is_bit_for_bit_the_same():
    bare, watched = run([]), run([everything()])
    same(bare.trace(), watched.trace())


def test_rates_of_every_step_reach_the_prediction():
    monitor = everything(every=3)
    found = run([monitor]).recorder.measured()
    rates = [0.4 * 0.8**step for step in range(3)]
    assert found[3]["ntk/sharpness_limit"] > 2 / rates[-1]
    # One mode by itself: ∏(1 − ηsμ₁) with sμ₁ the sharpness at the start.
    expected = 1.0
    for rate in rates:
        expected *= 1 - rate * found[0]["ntk/sharpness"]
    predicted = found[3]["ntk_modes/decay_predicted/1"]
    assert abs(predicted - expected) < 1e-5
    assert monitor.instrument.optimizers == ()


def test_two_monitors_share_their_kernels():
    calls = []

    def counting(module, x):
        calls.append(None)
        return module(x)

    def monitors(*names):
        return [
            NTKMonitor(
                4,
                1,
                output_fn=counting,
                options=NTKOptions(name=name, history=False),
                on_error="raise",
            )
            for name in names
        ]

    alone = run(monitors("ntk")).recorder.measured()
    single = len(calls)
    calls.clear()
    shared = monitors("ntk", "ntk/two")
    both = run(shared).recorder.measured()
    # The kernels themselves are measured once; how many outputs there are is asked by
    # each of the two at its first measurement.
    assert len(calls) == single + 1
    assert shared[0].instrument.kernels is shared[1].instrument.kernels
    for step, row in alone.items():
        for tag, value in row.items():
            same(both[step][tag], value, tag)
            if tag.startswith("ntk/"):
                same(both[step]["ntk/two" + tag[3:]], value, tag)
    apart = pickle.loads(pickle.dumps([everything(), everything("ntk/two")]))
    assert run(apart).recorder.measured()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.filterwarnings("ignore:Be aware.*add the following.*ModelCheckpoint")
def test_resumed_in_the_middle_of_an_interval(tmp_path):
    unbroken = run([everything(every=4)], max_steps=9).recorder.measured()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    first = run([everything(every=4), saver], max_steps=6, enable_checkpointing=True)
    assert [*first.recorder.measured()] == [0, 4, 6]
    recorder = Recorder()
    seeded()
    fit(
        Descending(smooth_net()),
        [everything(every=4)],
        logger=recorder,
        max_steps=9,
        ckpt_path=str(tmp_path / "step=6.ckpt"),
    )
    resumed = recorder.measured()
    assert [*resumed] == [8, 9]
    for step, row in resumed.items():
        same(row, unbroken[step], f"step {step}")
