"""Logic grids, each with exactly one solution.

In reading order:

    puzzles  `zebra-synth`: drawing them, asking, the worked solution
    words    what people differ in, and what each clue says
    solve    how many ways there are to fill a grid
    score    the grid in a response: the share of right cells
"""
