"""Reward functions: the user's own, called here or in a process that can be killed.

In reading order:

    signatures  what a function is called with follows from the names of its parameters
    rewards     found by name, called, and every row of what they return checked
    remote      functions in child processes, with limits of time and memory
    child       what runs in such a process
"""
