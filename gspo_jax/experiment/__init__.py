"""Several runs as one experiment.

In reading order:

    trials   which runs an experiment has, running them, what came out
    compare  losses under one harness
    sweep    settings, ranked
"""
