"""Python runs this file at its start: it puts a fault into chosen processes of a training."""

import os
import sys
import traceback

_is_training = "FAULTS_PROGRAM" in os.environ and {"moe_lm", "train"} <= set(sys.orig_argv)
if _is_training and os.environ.get("RANK", os.environ["FAULTS_RANK_OF_STARTED"]) in os.environ["FAULTS_RANKS"].split(
    ","
):
    try:
        import injected

        exec(os.environ["FAULTS_PROGRAM"], vars(injected))
    except BaseException:
        traceback.print_exc()
        os._exit(99)  # Python would continue without the fault
