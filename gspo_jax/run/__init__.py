"""The run directory and a run's life.

In reading order:

    lifecycle   its beginning, its saves, and how it ends
    metrics     the writer: metrics.jsonl, samples.jsonl, status.json, warnings.log
    trackers    Weights & Biases and TensorBoard beside the files
    arrays      the arrays of a tree by name, as Orbax writes them
    checkpoint  all that a run carries, whole or not at all
    resume      from which checkpoint, and whether that is the same run
    export      the weights as a Hugging Face directory
    model_card  its README.md
"""
