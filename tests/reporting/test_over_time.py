"""Spectra over the steps: which pixel is lit, and that the run's end draws them."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from monitored import Plain, Recorder, fit, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ntk_callbacks import NTKMonitor
from ntk_callbacks.reporting.density import spectral_densities
from ntk_callbacks.reporting.image_text import text_image
from ntk_callbacks.reporting.images import heat_map, png
from ntk_callbacks.reporting.over_time import density_image


def test_counts_by_a_slow_loop():
    generator = np.random.default_rng(0)
    steps = [0, 3, 4, 9, 20]
    spectra = [3 * generator.standard_normal(n) for n in (5, 5, 4, 5, 3)]
    spectra[1][0] = -np.inf  # a value of zero
    found = spectral_densities(steps, spectra, rows=7, columns=40)
    low, high = np.log10(found.values.low), np.log10(found.values.high)
    expected = np.zeros((7, 40), dtype=int)
    for column in range(40):
        at = 20 * column / 40 if column < 39 else 20
        latest = max(i for i, step in enumerate(steps) if step <= at)
        for value in spectra[latest]:
            if np.isfinite(value):
                row = int(7 * (high - value) / (high - low))
                expected[row, column] += 1
    np.testing.assert_array_equal(found.counts, expected)


def test_one_measurement_and_values_that_are_all_equal_can_be_drawn():
    found = spectral_densities([5], [np.array([2.0, 2.0])], rows=4, columns=6)
    assert (found.counts.sum(axis=0) == 2).all()
    with pytest.raises(ValueError, match="no value of any spectrum is finite"):
        spectral_densities([0], [np.array([np.nan])])
    with pytest.raises(ValueError, match="2 steps, but 1 spectra"):
        spectral_densities([0, 1], [np.zeros(2)])


def test_numbers_stand_at_their_ticks():
    found = spectral_densities([0, 50, 100], [np.array([-2.0, 3.0])] * 3)
    image = density_image(found)
    ink = (image == 0).all(dim=0)
    height = 2 * len(found.counts)
    for value, word in [(100.0, "100"), (1.0, "1"), (0.1, "0.1")]:
        row = 8 + round((1 - found.values.position(value)) * (height - 1))
        word = text_image(word)
        left = 56 - 8 - word.shape[1]
        part = ink[row - 5 : row + 5, left : left + word.shape[1]]
        assert torch.equal(part, word), value


def test_png_is_what_another_library_reads():
    from io import BytesIO

    from PIL import Image

    image = heat_map(torch.randn(5, 7), min_side=9)
    read = np.asarray(Image.open(BytesIO(png(image))))
    np.testing.assert_array_equal(read, image.permute(1, 2, 0).numpy())


def test_common_limits_give_common_colors():
    left, right = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    colors = [heat_map(m, 1, limits=(0.0, 2.0))[:, 0] for m in (left, right)]
    assert torch.equal(colors[0][:, 0], colors[1][:, 0])
    assert not torch.equal(colors[0][:, 1], colors[1][:, 1])
    assert colors[1][:, 1].tolist() == [253, 231, 37]


@pytest.mark.parametrize("ends", [(-323.3, 308.2), (-400.0, 0.0), (5.0, 400.0)])
def test_values_at_the_ends_of_float64_are_counted(ends):
    found = spectral_densities([0, 1], [np.array(ends), np.zeros(3)], rows=5, columns=2)
    assert found.counts[:, 0].tolist() == [1, 0, 0, 0, 1]
    assert found.counts[:, 1].sum() == 3


def images(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tag = "ntk/eigenvalues_log10_over_time"
    assert tag in events.Tags()["images"]
    return [(e.step, e.encoded_image_string) for e in events.Images(tag)]


def test_a_run_ends_with_an_image_and_a_resumed_one_with_the_same(tmp_path):
    def run(folder, max_epochs, ckpt_path=None):
        seeded()
        logger = TensorBoardLogger(tmp_path / folder, name="", version="")
        monitor = NTKMonitor(4, every=1, on_error="raise")
        settings = {"max_epochs": max_epochs, "ckpt_path": ckpt_path}
        return fit(Plain(), [monitor], logger=logger, **settings)

    run("whole", 3)
    first = run("parts", 1)
    first.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    run("parts", 3, tmp_path / "saved.ckpt")
    (whole,), parts = images(tmp_path / "whole"), images(tmp_path / "parts")
    assert [step for step, _ in parts] == [4, 12]
    assert parts[-1] == whole


def test_every_logger_gets_the_image_whatever_another_raises(tmp_path):
    """Two of one type, and one whose server is gone when the run ends."""

    class Leaves(Recorder):
        ended = False

        @property
        def experiment(self):
            if self.ended:
                raise ConnectionError("the server is gone")

    class Ends(Callback):
        def on_train_end(self, trainer, *_):
            trainer.loggers[0].ended = True

    first, last = (TensorBoardLogger(tmp_path / name, "", "") for name in "ab")
    callbacks, loggers = [Ends(), NTKMonitor(4, 4)], [Leaves(), first, last]
    with pytest.warns(UserWarning, match="the server is gone") as caught:
        fit(Plain(), callbacks, logger=loggers)
    (text,) = (str(w.message) for w in caught if "is gone" in str(w.message))
    assert text.startswith("NTKMonitor: Leaves did not take the measurement of step 8")
    assert images(tmp_path / "a") == images(tmp_path / "b")
