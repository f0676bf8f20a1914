"""Trackers, which mirror metrics.jsonl: all of them (``mirror``), Weights & Biases
(``weights_and_biases``), trackio and tensorboard (``others``), histograms of weights and gradients
(``histograms``), pictures and tables at the end (``finished``)."""

from trainlib.trackers.mirror import Trackers

__all__ = ["Trackers"]
