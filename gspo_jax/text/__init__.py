"""Words that are shown and typed.

In reading order:

    spelling    a value as one would type it, and what a wrong name was probably meant to be
    streams     standard output that cannot end a run, whatever takes it away
    inert     text of a model made harmless to a terminal, credentials left out
    console   a live bar on a terminal, plain lines anywhere else
"""
