"""Runs looked at, from their files alone. No JAX.

In reading order:

    run_files   what a run directory says
    follow      the same while it is being written, in bounded memory
    advice      what the course of a run warns of
    drawing     panels: what is drawn on a pair of axes, and how it becomes a picture
    figures     those of one run, of several, of many as bands
    page        a page as blocks, in HTML or Markdown
    report      the page of a run
    comparison  the page of a comparison
    snapshot    what a monitor shows, as plain JSON
    monitor     the live page
    terminal    the same in a terminal
"""
