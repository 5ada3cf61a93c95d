"""The algorithm: arrays in, arrays out; nothing but jax and jaxtyping is imported.

In reading order:

    losses      GSPO and its siblings: the equations of the README, one function each
    masked      what every loss does with a mask: log-ratios, means, diagnostics
    penalties   what may be added to a loss: KL, entropy, the critic's error
    mismatch    weights against data of another policy
    advantages  from rewards to advantages
    logps       log-probabilities of tokens without a [B, T, V] array
"""
