"""From a fit to the event file: every tag, at its steps, with its numbers."""

import io

import event_files
import numpy as np
from event_files import CLASSES, HISTOGRAMS, IMAGES, JACOBIAN_STEPS, NTK_STEPS, SCALARS
from oracles import ntk_by_loop
from PIL import Image

run = event_files.run


def test_event_file_holds_every_tag_at_the_scheduled_steps(run):
    events = run.events
    tags = events.Tags()
    assert {
        tag: [event.step for event in events.Scalars(tag)]
        for tag in tags["scalars"]
        if tag.startswith(("ntk", "params", "jacobian"))
    } == SCALARS
    assert {
        tag: [event.step for event in events.Histograms(tag)]
        for tag in tags["histograms"]
    } == HISTOGRAMS
    assert {
        tag: [event.step for event in events.Images(tag)] for tag in tags["images"]
    } == IMAGES


def test_only_the_velocity_before_the_first_step_is_unknown(run):
    unknown = {
        (tag, event.step)
        for tag in SCALARS
        for event in run.events.Scalars(tag)
        if not np.isfinite(event.value)
    }
    assert unknown == {("ntk/kernel_velocity", 0)}


def test_histograms_count_every_eigenvalue_and_singular_value_once(run):
    counts = {
        tag: [event.histogram_value.num for event in run.events.Histograms(tag)]
        for tag in HISTOGRAMS
    }
    each = len(CLASSES) * 3  # three outputs, each with its own direction
    assert counts == {
        "ntk/eigenvalues_log10": [each] * len(NTK_STEPS),
        "jacobian/singular_values_log10": [each] * len(JACOBIAN_STEPS),
    }


def one_pixel_of_each_entry(png, n):
    """RGB of the middle of every square of an image of n by n squares."""
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    side = len(pixels) // n
    assert pixels.shape == (side * n, side * n, 3)
    return pixels[side // 2 :: side, side // 2 :: side]


# Viridis as Matplotlib prints it at 0, 1/8, … 1; its green never falls.
GREENS = [1, 44, 81, 113, 145, 173, 201, 220, 231]


def test_image_is_the_kernel_of_the_trained_network_in_class_blocks(run):
    classes = run.probe.targets.tolist()
    order = sorted(range(len(classes)), key=lambda i: (classes[i], i))
    full = ntk_by_loop(run.model, run.probe.inputs)  # the weights of the last step
    kernel = np.array([[full[i, j].trace().item() / 3 for j in order] for i in order])
    image = run.events.Images("ntk/kernel")[-1]
    green = one_pixel_of_each_entry(image.encoded_image_string, len(classes))[..., 1]

    position = (kernel - kernel.min()) / (kernel.max() - kernel.min())
    expected = np.interp(position, np.linspace(0, 1, 9), GREENS)
    assert np.abs(green - expected).max() <= 2  # rounding, and that of the nine colors

    labels = np.array(classes)[order]
    same = labels[:, None] == labels[None]
    assert green[same].min() > green[~same].max()
