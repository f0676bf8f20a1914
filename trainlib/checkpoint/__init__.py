"""Checkpoints: taken while training goes on, verified before they are trusted, kept K at a time.

A checkpoint is a folder of tensors in safetensors and the rest in JSON, never a pickle, and holds
no trace of how many processes wrote it (``state``; its names: ``layout``). It appears under its
name complete or not at all, written beside the training (``checkpoints``, ``background``); a run
starts from the newest that verifies (``start``). ``best/`` and ``final/`` are written the same way.
What is only tried before a run is taken back without a file (``rehearsal``).
"""

from trainlib.checkpoint.checkpoints import CheckpointOptions, Checkpoints, SaveFailed
from trainlib.checkpoint.rehearsal import undone
from trainlib.checkpoint.start import Start, identity

__all__ = ["CheckpointOptions", "Checkpoints", "SaveFailed", "Start", "identity", "undone"]
