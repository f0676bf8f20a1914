"""train.py on CPU processes whose Accelerator believes in FSDP2, as it does on GPUs.

On CPUs it is told MULTI_CPU, and passes its FSDP settings over; told MULTI_GPU, it does not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

import train  # noqa: E402
from trainlib import runtime  # noqa: E402

if __name__ == "__main__":
    accelerate.PartialState(cpu=True)
    accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = runtime.make_accelerator

    def make_accelerator(*arguments):
        accelerator = made(*arguments)
        assert accelerator.is_fsdp2
        return accelerator

    runtime.make_accelerator = make_accelerator
    runtime.run(train.main)
