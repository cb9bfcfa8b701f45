"""Nets that recipes train from scratch: a small picture classifier, a language model, a DNA classifier.

Their hidden layers come in multiples of 16, so that 16x16 blocks fit without padding. Each function is a
factory: it returns a module and example inputs, as `surgery_recipes.nets:lenet?width=32` in a recipe.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LeNet(nn.Module):
    """LeNet-5 for pictures `[B, 1, 28, 28]`, every layer widened to a multiple of 16.

    Args:
        width: channels of the first convolution; the other layers are multiples of it.
        classes: scores in the output.
    """

    def __init__(self, width: int = 16, classes: int = 10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(2 * width * 25, 8 * width),
            nn.ReLU(),
            nn.Linear(8 * width, 6 * width),
            nn.ReLU(),
            nn.Linear(6 * width, classes),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores `[B, classes]`."""
        return self.classifier(self.features(pictures))


class WordModel(nn.Module):
    """A stacked LSTM that scores the next word at every place of `[B, T]` words.

    Args:
        words: in the vocabulary.
        width: of embedding and hidden state.
        layers: of the LSTM.
        dropout: between layers and around them.
        tied: whether the output layer uses the embedding's weights.
    """

    def __init__(
        self, words: int, width: int = 256, layers: int = 2, dropout: float = 0.2, tied: bool = True
    ):
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, width, layers, dropout=dropout if layers > 1 else 0.0, batch_first=True)
        self.output = nn.Linear(width, words)
        for weight in (p for p in self.lstm.parameters() if p.ndim > 1):
            nn.init.uniform_(weight, -((3 / width) ** 0.5), (3 / width) ** 0.5)  # of deviation 1/sqrt(width)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.output.bias)
        if tied:
            self.output.weight = self.embedding.weight
        else:
            nn.init.uniform_(self.output.weight, -0.1, 0.1)

    def forward(self, words: Tensor) -> Tensor:
        """Scores `[B, T, words]`."""
        hidden, _ = self.lstm(self.dropout(self.embedding(words)))
        return self.output(self.dropout(hidden))


class DeepBind(nn.Module):
    """A one-dimensional convolutional net for one-hot DNA `[B, 4, T]`, in the manner of DeepBind.

    Args:
        width: channels of all layers.
        kernel: bases that the wide convolution sees.
        classes: scores in the output.
        dropout: before the last layer.
    """

    def __init__(self, width: int = 256, kernel: int = 24, classes: int = 3, dropout: float = 0.5):
        super().__init__()
        self.stem = nn.Conv1d(4, width, 1)
        self.motifs = nn.Conv1d(width, width, kernel)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, bases: Tensor) -> Tensor:
        """Scores `[B, classes]`."""
        found = self.motifs(self.stem(bases)).relu().amax(-1)
        return self.output(self.dropout(self.hidden(found).relu()))


Made = tuple[nn.Module, tuple[Tensor, ...]]


def lenet(width: int = 16, classes: int = 10) -> Made:
    """A `LeNet` and two blank pictures."""
    return LeNet(width, classes), (torch.zeros(2, 1, 28, 28),)


def word_model(
    words: int = 10000, width: int = 256, layers: int = 2, dropout: float = 0.2, tied: bool = True
) -> Made:
    """A `WordModel` and two short texts."""
    return WordModel(words, width, layers, dropout, tied), (torch.zeros(2, 5, dtype=torch.long),)


def deepbind(
    width: int = 256, kernel: int = 24, classes: int = 3, dropout: float = 0.5, length: int = 60
) -> Made:
    """A `DeepBind` and two sequences of `length` bases."""
    return DeepBind(width, kernel, classes, dropout), (torch.zeros(2, 4, length),)
