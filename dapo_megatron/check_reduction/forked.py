"""Imported once, by the process that ranks are forked from: to import Megatron takes longer than most of what they do.

Nothing here may start a thread.
"""

import gc
import os
import warnings

warnings.simplefilter("ignore")
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TORCH_CPP_LOG_LEVEL="ERROR")

import mbridge  # noqa: E402, F401
import torch  # noqa: E402

import dapo_megatron.actor.actor  # noqa: E402
import dapo_megatron.weights.hf  # noqa: E402, F401
from dapo_megatron.processes import end_with_parent  # noqa: E402

end_with_parent()
torch.set_num_threads(1)
gc.freeze()  # not to be looked through, and so not copied, by every rank
