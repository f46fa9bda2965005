"""Images to train on: scikit-learn's digits, and MNIST, Fashion-MNIST or CIFAR-10.

Images are float32 (channels, height, width), shifted and scaled per channel to mean 0
and variance 1 over the training split, so that the mean square q of an input is 1.
Labels are integers from 0. The test split is also the validation split of `fit`.

The order of the training batches is a function of the seed and the epoch alone, so a
run resumed at the end of an epoch sees the batches an unbroken run sees.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from typing_extensions import override

from ntk_callbacks.experiments.layers import check_sizes

Split: TypeAlias = tuple[Tensor, Tensor]
"""Images (n, channels, height, width) as uint8 and labels (n,)."""

TorchvisionName: TypeAlias = Literal["mnist", "fashion_mnist", "cifar10"]

_MNIST_FILES = [
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
]
_CIFAR_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]

# name: (class in torchvision.datasets, folder below root, files it must hold)
_TORCHVISION: dict[str, tuple[str, str, list[str]]] = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR_FILES),
}


class EpochShuffle(Sampler[int]):
    """A random order of `n` examples that depends on `seed` and epoch, nothing else.

    Lightning calls `set_epoch` before each epoch, with several processes too: there it
    wraps this sampler in its distributed one.

    Args:
        n: Number of examples.
        seed: Any whole number from 0.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    @override
    def __iter__(self) -> Iterator[int]:
        # torch's CPU generator keeps 32 bits of its seed, hence the mixing.
        mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        return iter(torch.randperm(self.n, generator=generator).tolist())

    def __len__(self) -> int:
        return self.n


class _Images(LightningDataModule):
    """Standardizes what a subclass reads in `_read` and serves it in batches."""

    shape: tuple[int, ...]
    classes: int = 10

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        check_sizes(self, batch_size=batch_size)
        check_sizes(self, least=0, seed=seed)
        self.batch_size = batch_size
        self.seed = seed
        self._train: TensorDataset | None = None
        self._test: TensorDataset | None = None

    def _read(self) -> tuple[Split, Split]:
        raise NotImplementedError

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._train is not None:
            return
        (train, train_labels), (test, test_labels) = self._read()
        variance, mean = torch.var_mean(
            train.float(), dim=(0, 2, 3), correction=0, keepdim=True
        )
        scale = variance.rsqrt()
        self._train = TensorDataset((train.float() - mean) * scale, train_labels)
        self._test = TensorDataset((test.float() - mean) * scale, test_labels)

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        self.setup()
        dataset = cast(TensorDataset, self._train)
        order = EpochShuffle(len(dataset), self.seed)
        return DataLoader(dataset, batch_size=self.batch_size, sampler=order)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        self.setup()
        dataset = cast(TensorDataset, self._test)
        return DataLoader(dataset, batch_size=max(self.batch_size, 256))

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.val_dataloader()


class Digits(_Images):
    """The 1797 handwritten digits of 8×8 pixels that ship with scikit-learn.

    Args:
        batch_size: Examples in a training batch.
        test_fraction: Share of the examples held out for testing, in (0, 1).
        split_seed: Decides which ones, apart from `seed` so that runs with different
            seeds are tested on the same images.
        seed: Decides the order of the training examples in each epoch.

    Raises:
        ValueError: If an argument is outside its range.
        ImportError: From `setup`, if scikit-learn is missing.

    Example:
        >>> digits = Digits(batch_size=64)
        >>> images, labels = next(iter(digits.train_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([64, 1, 8, 8]), torch.Size([64]))

    References:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI.
    """

    shape = (1, 8, 8)

    def __init__(
        self,
        batch_size: int = 64,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed)
        if not 0 < test_fraction < 1:
            raise ValueError(
                f"Digits: test_fraction is {test_fraction}, expected 0 < fraction < 1."
            )
        check_sizes(self, least=0, split_seed=split_seed)
        self.test_fraction = test_fraction
        self.split_seed = split_seed

    @override
    def prepare_data(self) -> None:
        _load_digits()

    @override
    def _read(self) -> tuple[Split, Split]:
        images, labels = _load_digits()
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(self.split_seed)
        )
        held_out = round(self.test_fraction * len(labels))
        test, train = order[:held_out], order[held_out:]
        return (images[train], labels[train]), (images[test], labels[test])


class TorchvisionImages(_Images):
    """MNIST, Fashion-MNIST or CIFAR-10 in their official splits, read by torchvision.

    Args:
        name: `"mnist"`, `"fashion_mnist"` (1×28×28) or `"cifar10"` (3×32×32).
        root: Folder that holds, or shall hold, the files.
        batch_size: Examples in a training batch.
        seed: Decides the order of the training examples in each epoch.
        download: Whether to fetch missing files.

    Raises:
        ValueError: If an argument is outside its range.
        ImportError: From `prepare_data`, if torchvision is missing.
        FileNotFoundError: From `prepare_data`, if files are missing and cannot be
            fetched; says which, and where to put them.
    """

    def __init__(
        self,
        name: TorchvisionName,
        root: str = "data",
        batch_size: int = 128,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, seed)
        if name not in get_args(TorchvisionName):
            raise ValueError(
                f"TorchvisionImages: name is {name!r}, "
                f"expected one of {', '.join(get_args(TorchvisionName))}."
            )
        self.dataset = name
        self.root = root
        self.download = download
        self.shape = (3, 32, 32) if name == "cifar10" else (1, 28, 28)

    @override
    def prepare_data(self) -> None:
        datasets = _torchvision_datasets()
        kind, folder, files = _TORCHVISION[self.dataset]
        try:
            for train in (True, False):
                getattr(datasets, kind)(self.root, train, download=self.download)
        except (OSError, RuntimeError) as error:  # what torchvision and urllib raise
            where = Path(self.root, folder).resolve()
            raise FileNotFoundError(
                f"TorchvisionImages: {self.dataset} is not complete below {where} and "
                f"{'could not be downloaded' if self.download else 'download=False'} "
                f"({error}). Put the unpacked files {', '.join(files)} into {where}, "
                f"or name the folder that holds {folder} with `data.root=…`."
            ) from error

    @override
    def _read(self) -> tuple[Split, Split]:
        train, test = (self._read_split(is_train) for is_train in (True, False))
        return train, test

    def _read_split(self, train: bool) -> Split:
        kind, _, _ = _TORCHVISION[self.dataset]
        dataset = getattr(_torchvision_datasets(), kind)(self.root, train)
        images = torch.as_tensor(dataset.data)
        # MNIST comes as (n, h, w), CIFAR as (n, h, w, channels).
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
        return images, torch.as_tensor(dataset.targets)


def _load_digits() -> Split:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "Digits: the images come with scikit-learn, which is not installed. "
            'Run: pip install "ntk-callbacks[experiments]"'
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype("uint8"))  # pixels are 0..16
    return images[:, None], torch.from_numpy(digits.target.astype("int64"))


def _torchvision_datasets() -> object:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            "TorchvisionImages: the images are read by torchvision, which is not "
            'installed. Run: pip install "ntk-callbacks[vision]"'
        ) from error
    return cast(object, datasets)
