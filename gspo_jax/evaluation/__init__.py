"""How good a model is, with n and an interval.

In reading order:

    evaluate       accuracy on held-out problems: greedy, avg@k, pass@k, maj@k
    benchmark      several models on several sets, every response saved
    saved          files of saved responses
    continuations  log-likelihoods of given texts
    harness        our models in lm-eval
"""
