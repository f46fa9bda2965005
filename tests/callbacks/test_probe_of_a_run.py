"""A monitor that draws its probe from the training data takes nothing from it."""

import random
import warnings

import numpy as np
import torch
from monitored import Plain, all_monitors, fit, same, seeded


def test_probe_with_an_augmenting_dataset_draws_no_random_number():
    """Modes 6-8: the examples are transformed with the global generators."""

    class Augmented(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            noise = torch.randn(3) + random.random() + float(np.random.rand())  # noqa: NPY002
            return noise, index % 2

    def run(callbacks):
        seeded()
        data = torch.utils.data.DataLoader(Augmented(), batch_size=3, shuffle=True)
        return fit(Plain(), callbacks, train=data)

    monitored = run(all_monitors("epoch", probe=6))
    assert [*monitored.recorder.measured()] == [0, 4, 8]
    same(monitored.trace(), run([]).trace())


def test_iterable_dataset_gives_its_first_examples_to_the_training_too():
    """Mode 6: drawing a probe from a stream consumes nothing of it."""

    class Stream(torch.utils.data.IterableDataset):
        def __init__(self):
            self.source = iter(range(100))

        def __iter__(self):
            for index in self.source:
                if index == 24:
                    return
                yield torch.full((3,), float(index)), index % 2

    def run(callbacks):
        seeded()
        data = torch.utils.data.DataLoader(Stream(), batch_size=3)
        return fit(Plain(), callbacks, train=data, max_epochs=1)

    bare = run([])
    assert bare.trainer.global_step == 8
    with warnings.catch_warnings():
        monitored = run(all_monitors(4))
    same(monitored.trace(), bare.trace())
