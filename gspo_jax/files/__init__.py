"""Files and processes that may be torn, full, locked or killed. No JAX.

In reading order:

    jsonl          one JSON object per line, of which a crash may have torn the last
    whole          files replaced at once, and the lock on a run's directory
    integrity      directories that are whole or not there: sizes and checksums
    appearing      a directory to fill, which appears whole or not at all
    provenance     what a run's numbers depend on besides its settings: versions, machine, command
    compile_cache  where compiled programs are kept from one start to the next
    stopping       signals and a budget of time, asked for between two steps
    hub            the hub of models and data sets, where it cannot be reached
"""
