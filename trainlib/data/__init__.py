"""Data: from a source that a recipe names to the micro-batches that the plan names.

``open_source`` finds the splits (``sources``) in the tables of a source (``tables``) and what
their columns hold (``columns``), ``load`` decodes them in one pass (``decoding``, ``loading``),
``Reader`` and ``EvalReader`` read them (``reading``).
"""

from trainlib.data.loading import Dataset, build_augment, load
from trainlib.data.options import AugmentOptions, BatchOptions, DataOptions
from trainlib.data.reading import EvalReader, MicroBatch, Reader, Split
from trainlib.data.sources import open_source

__all__ = [
    "AugmentOptions", "BatchOptions", "DataOptions", "Dataset", "EvalReader", "MicroBatch",
    "Reader", "Split", "build_augment", "load", "open_source",
]
