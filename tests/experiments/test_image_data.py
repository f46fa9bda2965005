"""Images against scikit-learn and against files written here; nothing is downloaded."""

import hashlib
import pickle
import struct
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from ntk_callbacks.experiments import Digits, TorchvisionImages
from ntk_callbacks.experiments.data import EpochShuffle


def every(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_digits_are_those_of_scikit_learn_split_once():
    data = Digits(batch_size=64)
    train, test = every(data.train_dataloader()), every(data.val_dataloader())
    assert (len(train[1]), len(test[1])) == (1438, 359)
    assert train[0].shape == (1438, *data.shape)
    torch.testing.assert_close(train[0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        train[0].std(correction=0), torch.tensor(1.0), atol=1e-5, rtol=0
    )
    # Undo the affine map by the known range of the pixels, 0 to 16.
    images, labels = (torch.cat(pair) for pair in zip(train, test, strict=True))
    low, high = images.min(), images.max()
    pixels = ((images - low) / (high - low) * 16).round().flatten(1).numpy()
    ours = np.column_stack([pixels, labels.numpy()])
    digits = load_digits()
    theirs = np.column_stack([digits.data, digits.target])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_the_held_out_digits_depend_on_split_seed_alone():
    def held_out(**kwargs):
        return every(Digits(**kwargs).val_dataloader())[1]

    assert torch.equal(held_out(seed=0), held_out(seed=1, batch_size=7))
    assert not torch.equal(held_out(), held_out(split_seed=1))
    assert len(held_out(test_fraction=0.5)) == 898


def test_the_order_of_training_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = EpochShuffle(50, seed)
        sampler.set_epoch(epoch)
        torch.randn(3)  # draws from elsewhere do not matter
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(50))
    # Seed plus epoch would make the next two equal.
    assert order(1, 2) != order(2, 1)
    assert len({tuple(order(s, e)) for s in range(5) for e in range(5)}) == 25


def write_idx(path, array):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")]
)
def test_mnist_files_are_read_from_root(tmp_path, name, folder):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = {
        s: rng.integers(0, 256, (n, 28, 28)) for s, n in [("train", 9), ("t10k", 4)]
    }
    for split, images in pixels.items():
        write_idx(raw / f"{split}-images-idx3-ubyte", images)
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(len(images)))
    data = TorchvisionImages(name, root=str(tmp_path), download=False)
    data.prepare_data()
    images, labels = every(data.test_dataloader())
    expected = (pixels["t10k"] - pixels["train"].mean()) / pixels["train"].std()
    np.testing.assert_allclose(images[:, 0].numpy(), expected, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 3]
    images, labels = every(data.train_dataloader())
    assert images.shape == (9, *data.shape)
    assert sorted(labels.tolist()) == list(range(9))


def test_cifar_is_read_channels_first_and_scaled_by_channel(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(part):
        return {"data": part.reshape(len(part), -1), "labels": list(range(len(part)))}

    # torchvision compares the files with the checksums of the real ones.
    parts = [(f"data_batch_{i + 1}", pixels[2 * i : 2 * i + 2]) for i in range(5)]
    train_list = [write(name, batch(part)) for name, part in parts]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_list)
    test_list = [write("test_batch", batch(pixels[10:]))]
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test_list)
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)

    data = TorchvisionImages("cifar10", root=str(tmp_path), download=False)
    data.prepare_data()
    images, _ = every(data.test_dataloader())
    train = pixels[:10].astype(float)
    mean, std = (getattr(train, f)((0, 2, 3), keepdims=True) for f in ("mean", "std"))
    np.testing.assert_allclose(
        images.numpy(), (pixels[10:] - mean) / std, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("mnist", "MNIST/raw", "t10k-labels-idx1-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py", "data_batch_5"),
    ],
)
@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_asked_for_by_name(
    tmp_path, monkeypatch, name, folder, file, download
):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    data = TorchvisionImages(name, root=str(tmp_path), download=download)
    with pytest.raises(FileNotFoundError) as error:
        data.prepare_data()
    message = str(error.value)
    assert str(tmp_path / folder) in message
    assert file in message
    assert "data.root=" in message
    assert ("could not be downloaded" in message) == download


@pytest.mark.parametrize(
    ("data", "package", "extra"),
    [
        (Digits(), "sklearn.datasets", "experiments"),
        (TorchvisionImages("mnist"), "torchvision", "vision"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, data, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "ntk-callbacks\[{extra}\]"'):
        data.prepare_data()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Digits(batch_size=0), "Digits: batch_size is 0"),
        (lambda: Digits(test_fraction=1.0), r"test_fraction is 1\.0, expected 0 <"),
        (lambda: Digits(seed=-1), "Digits: seed is -1"),
        (lambda: TorchvisionImages("svhn"), "'svhn', expected one of mnist, fashion"),
    ],
)
def test_a_bad_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
