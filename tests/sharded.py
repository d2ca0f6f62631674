"""`python sharded.py train.py ...`: train.py under accelerate's FSDP2, on CPUs that accelerate takes for GPUs."""

import os
import runpy
import sys
from pathlib import Path

from accelerate import DistributedType, PartialState

os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
form_group = PartialState.__init__


def form_group_of_gpus(self, *args, **kwargs):
    form_group(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:  # which accelerate never shards; the device stays the CPU
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = form_group_of_gpus
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
