"""Reward functions in TRL's form, for tests that train: cheap, deterministic, with spread."""

import os
import signal
import time


def short_words(completions, **_):
    """Share of characters that are low ASCII: a random byte model can learn it."""
    return [sum(c < "P" for c in text) / max(len(text), 1) for text in completions]


def raises(completions, **_):
    raise RuntimeError("the judge is out")


def one_too_few(completions, **_):
    return [0.0] * (len(completions) - 1)


def many_nines(completions, **_):
    """Digits added up, scaled: differs wherever two completions do."""
    return [sum(int(c) for c in text if c.isdigit()) / 99 for text in completions]


def equal_from_the_third_step(completions, trainer_state, **_):
    """Spread at first, then none."""
    step = trainer_state.global_step
    return [1.0] * len(completions) if step and step >= 3 else short_words(completions)


def hangs_at_second_call(completions, **_):
    """Of a process: the rehearsal and every step after a hang are first calls."""
    hangs_at_second_call.calls += 1
    if hangs_at_second_call.calls == 2:
        time.sleep(1e6)
    return short_words(completions)


hangs_at_second_call.calls = 0


def fails_where_asked(completion, level):
    """One response at a time, with what a column asks for."""
    if level == "raise":
        raise ZeroDivisionError("as asked")
    if level == "sleep":
        time.sleep(1e6)
    if level == "spin":  # in C, holding the interpreter's lock
        sum(range(10**15))
    if level == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if level == "exit":
        os._exit(3)
    if level == "memory":
        return float(len(bytearray(10**12)))
    return float(len(completion))


def returns_the_column(completions, level, **_):
    return level[0]


def divides_by_zero(completions, trainer_state, **_):
    """From the second step on."""
    step = trainer_state.global_step or 1
    return [1 / (2 - step)] * len(completions) if step == 2 else short_words(completions)


def fails_at_the_second_evaluation(completions, trainer_state, **_):
    """Of a process: the rehearsal, step 0, then the one that fails."""
    if trainer_state.global_step is None:
        fails_at_the_second_evaluation.calls += 1
        if fails_at_the_second_evaluation.calls == 3:
            raise RuntimeError("late")
    return short_words(completions)


fails_at_the_second_evaluation.calls = 0


def slow(completions, **_):
    time.sleep(0.4)
    return short_words(completions)


def tells_its_process(completion, where):
    """Writes its pid where the column says, then takes a while."""
    with open(where, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return float(len(completion))
