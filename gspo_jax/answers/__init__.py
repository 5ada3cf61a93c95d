"""Is an answer right? Pure, exact, linear in time; nothing is evaluated.

In reading order:

    verify    the boxed answer of a text against the right one
    notation  how LaTeX writes an answer: what says nothing is peeled off
    units     which units are known, and what each is worth in another
"""
