"""One subcommand of `tokenprune` a file: `add(commands)` declares its arguments, its handler does the work.

In: words of a command line. Out: what a room of `evals` makes of them, and an exit code.

Only argparse is imported at the top of these files: `--help` answers at once, and nothing imports torch before every
name on the command line has been checked.
"""

NAMES = (
    "demo", "ls", "check_model", "run", "eval", "sweep", "report", "compare", "parity", "tune", "train", "calibrate",
    "recommend", "diagnose", "ui", "serve",
)  # fmt: skip
"""The files, in the order in which `tokenprune --help` shows them."""
