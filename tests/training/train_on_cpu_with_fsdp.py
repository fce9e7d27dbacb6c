"""scripts/train.py under FSDP2 on CPUs: accelerate shards on GPUs only, so tests tell it that gloo will do.

Only the branch that accelerate takes is forced; the sharding, the checkpoints and the saved folder are its own.
"""

import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def force_fsdp() -> None:
    initialise = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        first = not AcceleratorState._shared_state
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP"):
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


if __name__ == "__main__":
    force_fsdp()
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from train import main

    main()
