"""Problems made up on the spot, each with exactly one right answer.

In reading order:

    arithmetic  sums and products, with worked solutions
    countdown   reach a number from others
    knights     who tells the truth?
    reasoning   four types of short problems at three levels
    gym         reasoning-gym's problems (extra `gym`)
    gym_judge   its own checkers, in a process of their own
"""
