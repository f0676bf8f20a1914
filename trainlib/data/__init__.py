"""Data: from a source that a recipe names to the micro-batches that the plan names.

``open_source`` finds the splits (``sources``) in the tables of a source (``tables``, ``builtin``)
and what their columns hold (``columns``). Once the tasks are known, their targets are encoded
(``targets``, ``masks``) and texts made tokens (``language``, ``text``). ``load`` decodes everything
in one pass (``decoding``, ``loading``), ``Reader`` and ``EvalReader`` read it (``reading``).
``fingerprint`` tells whether two data sets are the same.
"""

from trainlib.data.fingerprint import fingerprint
from trainlib.data.loading import Dataset, build_augment, load
from trainlib.data.options import AugmentOptions, BatchOptions, DataOptions
from trainlib.data.reading import EvalReader, MicroBatch, Reader, Split
from trainlib.data.sources import open_source
from trainlib.data.targets import TargetInfo

__all__ = [
    "AugmentOptions", "BatchOptions", "DataOptions", "Dataset", "EvalReader", "MicroBatch",
    "Reader", "Split", "TargetInfo", "build_augment", "fingerprint", "load", "open_source",
]
