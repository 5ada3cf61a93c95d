"""Numbers that know how they are put together, and how sure they are. Neither JAX nor files.

In reading order:

    tally       counts, averages and extremes, merged over rounds, updates and processes
    statistics  shares, means, pass@k, votes and differences, with 95 % intervals
    shown       numbers as people read them: with intervals, as times
    summary     from single responses to the tables of an evaluation
"""
