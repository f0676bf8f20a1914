"""Jobs with one fault each, for --diagnose: nets and tables of a user's own."""

import datasets
import numpy as np
import torch
from torch import nn
from torch.nn import functional

COLUMNS = [f"x{number}" for number in range(6)]


def _table(rows: int, seed: int = 0) -> dict:
    """Six columns of noise, and the class that follows from two of them."""
    inputs = np.random.default_rng(seed).normal(size=(rows, len(COLUMNS)))
    target = (inputs[:, 0] > 0).astype(int) + 2 * (inputs[:, 1] > 0)
    return dict(zip(COLUMNS, inputs.T, strict=True)) | {"target": target}


def _dataset(columns: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict({k: np.asarray(v).tolist() for k, v in columns.items()})


def sound() -> datasets.Dataset:
    return _dataset(_table(800))


def shuffled() -> datasets.Dataset:
    table = _table(800)
    return _dataset(table | {"target": np.random.default_rng(1).permutation(table["target"])})


def shuffled_numbers() -> datasets.Dataset:
    table = _table(800)
    skewed = np.exp(np.random.default_rng(1).normal(size=800))  # the mean is not its median
    return _dataset(table | {"target": skewed})


def in_both() -> datasets.DatasetDict:
    train, other = _table(800), _table(100, seed=1)
    other = {k: np.concatenate([v[:90], train[k][17:27]]) for k, v in other.items()}
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(other))


def few_rows() -> datasets.Dataset:
    """500 rows of three columns with few values, so that most inputs come several times."""
    random = np.random.default_rng(0)
    columns = {f"x{i}": random.integers(0, 4, 500).astype(float) for i in range(3)}
    score = columns["x0"] + columns["x1"] + random.normal(size=500)
    return _dataset(columns | {"target": (score > 3).astype(int)})


def some_repeated() -> datasets.DatasetDict:
    """Some training rows stand there twice, and far more validation rows are shared."""
    train, other = _table(800), _table(100, seed=1)
    train = {k: np.concatenate([v, v[:20]]) for k, v in train.items()}
    other = {k: np.concatenate([v[:70], train[k][300:330]]) for k, v in other.items()}
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(other))


def few_shared() -> datasets.DatasetDict:
    """Two validation rows are shared, of so few that it is more than 1 %."""
    train, other = _table(800), _table(30, seed=1)
    other = {k: np.concatenate([v, train[k][17:19]]) for k, v in other.items()}
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(other))


def leak_of_two_percent() -> datasets.DatasetDict:
    train, other = _table(3000), _table(500, seed=1)
    other = {k: np.concatenate([v[:488], train[k][17:29]]) for k, v in other.items()}
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(other))


def class_in_training_only() -> datasets.DatasetDict:
    train, other = _table(800), _table(100, seed=1)
    other["target"] = np.where(other["target"] == 3, 2, other["target"])
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(other))


def noisy_numbers() -> datasets.Dataset:
    """Of which a linear net can learn a third."""
    table, random = _table(3000), np.random.default_rng(2)
    target = table["x0"] - table["x1"] + 2 * random.normal(size=3000)
    return _dataset(table | {"target": target})


def heavy_targets() -> datasets.Dataset:
    """Of which the first micro-batches have a twentieth of the variance of all."""
    table, random = _table(6000, seed=1), np.random.default_rng(1)
    logarithm = 1.4 * (table["x0"] + table["x1"]) + 0.3 * random.normal(size=6000)
    return _dataset(table | {"target": np.exp(logarithm)})


def heavy_inputs() -> datasets.Dataset:
    table = _table(3000)
    return _dataset({k: np.exp(2 * v) if k in COLUMNS else v for k, v in table.items()})


def heavy_shuffled() -> datasets.Dataset:
    table = _table(3000)
    target = np.exp(2 * np.random.default_rng(1).normal(size=3000))
    return _dataset(table | {"target": target})


def ten_classes() -> datasets.Dataset:
    table = _table(3000)
    angle = np.arctan2(table["x0"], table["x1"]) / (2 * np.pi) + 0.5
    return _dataset(table | {"target": np.minimum(9, (10 * angle).astype(int))})


def unbalanced() -> datasets.Dataset:
    table = _table(3000)
    return _dataset(table | {"target": (table["x0"] > 2.2).astype(int)})


def missing_class() -> datasets.DatasetDict:
    train, other = _table(800), _table(100, seed=1)
    train, other = ({k: v.tolist() for k, v in one.items()} for one in (train, other))
    features = datasets.Features(
        {k: datasets.Value("float64") for k in COLUMNS}
        | {"target": datasets.ClassLabel(names=["a", "b", "c", "d", "e"])})
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(train, features),
                                validation=datasets.Dataset.from_dict(other, features))


def contradicting() -> datasets.DatasetDict:
    table = _table(800)
    again = {k: v[:100] for k, v in table.items()}
    again["target"] = (again["target"] + 1) % 4
    train = {k: np.concatenate([v, again[k]]) for k, v in table.items()}
    return datasets.DatasetDict(train=_dataset(train), validation=_dataset(_table(100, seed=1)))


def one_large_column() -> datasets.Dataset:
    table = _table(800)
    return _dataset(table | {"x5": 12 * table["x5"]})


def rare_label() -> datasets.Dataset:
    table = _table(3000)
    labels = np.stack([table["x0"] > 0, table["x1"] > 2.6], 1).astype(int)
    return _dataset({k: table[k] for k in COLUMNS} | {"target": labels})


def labels() -> datasets.Dataset:
    table = _table(800)
    on = np.stack([table["x0"] > 0, table["x1"] > 0.5], 1).astype(int)
    return _dataset({k: table[k] for k in COLUMNS} | {"target": on})


class Net(nn.Module):
    """A sound one; each other differs from it by its fault."""

    def __init__(self, inputs: int, classes: int, width: int = 64):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.active = nn.ReLU()
        self.plant()

    def plant(self) -> None:
        pass

    def forward(self, inputs):
        return self.second(self.active(self.first(inputs.flatten(1))))


class Dead(Net):
    def plant(self):
        nn.init.constant_(self.first.bias, -1000.0)


class DeadFunction(Dead):
    def forward(self, inputs):
        return self.second(nn.functional.relu(self.first(inputs.flatten(1))))


class Unscaled(Net):
    def forward(self, inputs):
        return super().forward(255 * (inputs * self.input_deviation + self.input_mean))


class Confident(Net):
    def plant(self):
        nn.init.normal_(self.second.weight, std=10.0)


class Frozen(Net):
    def plant(self):
        self.first.requires_grad_(False)


class Unused(Net):
    def plant(self):
        self.auxiliary = nn.Linear(64, 3)


class Broken(Net):
    def plant(self):
        self.first.weight.data[0, 0] = float("nan")


class Symmetric(Net):
    def plant(self):
        nn.init.constant_(self.first.weight, 0.1)


class Exploding(Net):
    def plant(self):
        nn.init.normal_(self.first.weight, std=1e4)
        nn.init.normal_(self.second.weight, std=1e4)


class Blind(Net):
    def forward(self, inputs):
        return super().forward(0 * inputs)


class Detached(Net):
    """Only the last bias learns, which is too little for a batch of many classes."""

    def forward(self, inputs):
        hidden = self.active(self.first(inputs.flatten(1))).detach()
        return functional.linear(hidden, self.second.weight.detach(), self.second.bias)


class Infinite(Net):
    def forward(self, inputs):
        return super().forward(inputs) / 0.0


class Failing(Net):
    def forward(self, inputs):
        raise RuntimeError("no such shape")


class Normed(Net):
    def plant(self):
        self.active = nn.Sequential(nn.BatchNorm1d(64), nn.ReLU())


class Stepless(torch.optim.SGD):
    """Its second step raises."""

    def step(self, closure=None):
        if any(self.state.values()):
            raise RuntimeError("no such state")
        self.state[self.param_groups[0]["params"][0]]["seen"] = torch.ones(())


class Deep(nn.Module):
    """Of so many sigmoids that the first layers learn nothing."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        widths = [inputs, *[32] * 16, classes]
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, inputs):
        hidden = inputs.flatten(1)
        for layer in self.layers[:-1]:
            hidden = torch.sigmoid(layer(hidden))
        return self.layers[-1](hidden)


class ZeroStart(Net):
    """Nothing is wrong with a last layer of zeros: it learns from the second step on."""

    def plant(self):
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)


def nan_loss(output, target):
    return nn.functional.cross_entropy(output, target, reduction="none") * float("nan")


def tiny_loss(output, target):
    return 1e-7 * nn.functional.cross_entropy(output, target, reduction="none")


class Softmax(Net):
    def forward(self, inputs):
        return super().forward(inputs).softmax(-1)


class Sigmoid(Net):
    def forward(self, inputs):
        return super().forward(inputs).sigmoid()


class Positive(Net):
    """All of the first outputs are between 0 and 1, and nothing is wrong with that."""

    def plant(self):
        nn.init.normal_(self.second.weight, std=0.001)
        nn.init.constant_(self.second.bias, 0.3)
