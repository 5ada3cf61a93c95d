"""Reward functions in TRL's form, for tests that train: cheap, deterministic, with spread."""

import os
import signal


def short_words(completions, **_):
    """Share of characters that are low ASCII: a random byte model can learn it."""
    return [sum(c < "P" for c in text) / max(len(text), 1) for text in completions]


def terminate_in_third_step(completions, **_):
    """Ask this very process to stop, in the middle of the third step's scoring."""
    terminate_in_third_step.calls += 1
    if terminate_in_third_step.calls == 4:  # one rehearsal came before
        os.kill(os.getpid(), terminate_in_third_step.signal)
    return short_words(completions)


terminate_in_third_step.calls = 0
terminate_in_third_step.signal = signal.SIGTERM


def raises(completions, **_):
    raise RuntimeError("the judge is out")


def one_too_few(completions, **_):
    return [0.0] * (len(completions) - 1)


def many_nines(completions, **_):
    """Digits added up, scaled: differs wherever two completions do."""
    return [sum(int(c) for c in text if c.isdigit()) / 99 for text in completions]
