"""Runs a program text before everything else in chosen processes of a training: how a fault gets inside one."""

import os
import sys
import traceback

if "FAULTS_PROGRAM" in os.environ and {"moe_lm", "train"} <= set(sys.orig_argv):
    rank = os.environ.get("RANK", os.environ["FAULTS_RANK_OF_STARTED"])
    if rank in os.environ["FAULTS_RANKS"].split(","):
        try:
            exec(os.environ["FAULTS_PROGRAM"], {"__name__": "fault", "RANK": rank})
        except BaseException:
            traceback.print_exc()
            os._exit(99)  # Python would go on without the fault
