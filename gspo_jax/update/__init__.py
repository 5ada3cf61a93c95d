"""One rollout becomes minibatches x epochs optimizer steps.

In reading order:

    objective   what is minimised: a loss as a sum of shares of its microbatches
    microbatch  which rows run together
    state       what a run carries from step to step
    programs    old log-probs, gradients, the optimizer: the jitted programs of one update
    steps       all updates of a rollout, in their order
    critic      PPO's critic: values, the advantages made of them, its training
    optim       AdamW as an optax chain, its state kept in 8 bits
    quant       blockwise 8-bit logarithmic codes
    spikes      which gradients are unusually long
"""
