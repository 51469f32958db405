"""What a command is: the only code that knows Hydra and OmegaConf.

Each module beside this file has `HELP`, one line, and `main(arguments) -> exit code`.
"""

NAMES = ("prepare", "train", "sweep", "evaluate", "score", "report", "describe", "inspect", "audit", "sample", "export")
