"""The command line.

In reading order:

    arguments  commands and options; a wrong one told in one line
    commands   what each command does
    story      what it says around a run
"""

from gspo_jax.cli.commands import main

__all__ = ["main"]
