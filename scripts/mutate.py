"""Break the mathematics one line at a time, and see whether the tests notice.

    python scripts/mutate.py [--jobs N] [--only TEXT]

Each mutant is one replacement in a temporary copy of the package; the tests that guard its module
run on it and stop at the first failure. Prints a table, exits 1 if a mutant survives and 2 if one
no longer applies, which means that the code changed and mutants.txt must follow.
"""

import argparse
import importlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Imported once, for they take longer than most tests: each mutant has a fork of this process.
SHARED = ("jax", "flax.nnx", "optax", "hypothesis")


def of(file: str, *names: str) -> list[str]:
    """These tests of a file below tests/, or all of them."""
    return [f"{file}::test_{name}" for name in names] or [file]


LOSSES = ("losses", "losses_golden", "losses_traps", "losses_padding", "losses_invariants")
LOSSES = [f"algo/test_{name}.py" for name in LOSSES]
SUMS = of(
    "update/test_gradient_sums.py",
    "a_gradient_of_4096_ones_is_4096",
    "the_gradient_of_a_token_is_the_sum_over_its_experts_in_float32",
    "a_weight_that_devices_share_has_its_gradient_summed_in_32_bits_and_so_has_its_input",
)
ROLLOUT = of("rollout/test_rollout.py")
ROWS = of(
    "update/test_holes.py",
    "a_row_runs_as_wide_as_its_text_however_few_of_its_tokens_are_trained_on",
)

# The few tests that catch a module's mutants, quickest first. All are in `make test`.
GUARDS = {
    "advantage": of("test_train_advantage.py"),
    "algo/advantages": of("algo/test_advantages.py"),
    "algo/logps": of("algo/test_logps.py"),
    "algo/losses": LOSSES,
    "algo/masked": of("algo/test_masked.py") + LOSSES,
    "algo/mismatch": of("algo/test_mismatch.py"),
    "algo/penalties": of("algo/test_penalties.py"),
    "mesh/sharding": SUMS,
    "models/linear": SUMS,
    "models/moe": SUMS,
    "rollout/engine": of(
        "rollout/test_generate.py",
        "experts_of_a_row_are_its_prompts_and_then_those_that_drew_its_tokens",
        "a_token_is_the_draw_of_its_rows_key_at_its_position",
        "greedy_equals_the_uncached_forward_for_prompts_of_unequal_length",
        "eos_is_kept_and_closes_the_mask_whichever_of_several_it_is",
        "decoding_stops_one_chunk_after_the_last_row_has",
        "samples_do_not_depend_on_chunks_halving_or_the_length_of_the_cache",
    ),
    "rollout/sampling": of(
        "rollout/test_generate.py",
        "every_token_of_every_row_has_a_key_of_its_own",
        "a_nucleus_that_one_token_reaches_exactly_is_that_token",
        "nucleus_and_top_k_keep_the_sets_that_a_sort_finds",
        "a_draw_is_the_gumbel_argmax_with_its_log_probability",
        "top_k_restricts_draws_but_not_their_log_probability",
    ),
    "rollout/schedule": of(
        "rollout/test_generate.py",
        "a_batch_is_the_smallest_that_holds_the_living_while_it_is_worth_a_compilation",
        "programs_follow_from_shapes_alone",
        "a_schedule_holds_all_rows_and_all_tokens_in_few_sizes",
        "lengths_are_rounded_to_few_shapes_with_little_padding",
    ),
    "rollout/stages": ROLLOUT,
    "rollout/dynamic_sampling": ROLLOUT,
    "rollout/reporting": ROLLOUT,
    "rollout/train_rows": ROLLOUT,
    "rollout/truncation": ROLLOUT,
    "update/critic": of(
        "update/test_critic.py",
        "advantages_are_those_of_a_reversed_loop_with_the_kl_in_the_reward",
        "explained_variance_of_a_perfect_a_constant_and_a_contrary_critic",
        "whitening_is_over_valid_tokens_and_leaves_the_returns_alone",
        "a_new_critic_says_zero_and_shares_no_buffer_with_the_policy",
        "only_a_shared_critic_reaches_the_policy_and_does_so_by_its_coefficient",
    )
    + of(
        "update/test_objective.py", "in_16_bits_the_networks_run_whole_and_what_they_find_is_in_32"
    ),
    "update/microbatch": of("update/test_microbatch.py"),
    "update/objective": ROWS
    + of("numbers/test_tally.py")
    + of("update/test_objective.py")
    + of("update/test_update_moe.py", "the_routers_losses_are_added_with_their_weights"),
    "update/optim": of(
        "update/test_optim.py",
        "schedule_by_hand_over_10_updates",
        "what_is_no_matrix_of_whole_blocks_stays_in_float32_however_large",
        "chance_is_not_the_same_for_every_parameter_nor_every_update",
        "a_parameter_named_like_a_second_moment_keeps_the_signs_of_its_first",
        "the_chain_in_float32_is_optax_adamw_with_clipping",
        "a_step_parameter_by_parameter_is_that_of_optax_adamw_or_none_at_all",
    )
    + of("update/test_update.py", "a_schedule_goes_on_through_updates_that_are_left_out"),
    "update/programs": ROWS
    + of("update/test_apply.py")
    + of("update/test_update.py", "a_schedule_goes_on_through_updates_that_are_left_out")
    + of(
        "update/test_objective.py", "shares_of_microbatches_add_up_to_every_term_by_its_coefficient"
    ),
    "update/quant": of(
        "update/test_quant.py",
        "block_size_is_the_largest_divisor",
        "each_block_has_a_scale_of_its_own_whatever_the_dtype",
        "a_block_of_zeros_stays_zero_without_nan",
        "by_chance_nothing_underflows_either",
        "hashed_numbers_are_uniform_and_differ_by_index_and_by_each_seed",
        "rounded_by_chance_the_mean_is_the_value_and_no_error_is_beyond_a_step",
        "nothing_underflows_and_order_is_kept",
    ),
    "update/spikes": of(
        "faults/test_guards.py",
        "a_spike_is_so_many_deviations_above_the_mean",
        "after_many_spikes_in_a_row_the_new_level_is_learned_from",
        "the_oldest_norm_makes_room_and_what_was_not_taken_leaves_none",
    ),
    "update/steps": of("update/test_steps.py"),
}


class Mutant(NamedTuple):
    """`old` occurs exactly once in the module and becomes `new`."""

    module: str
    old: str
    new: str


class Outcome(NamedTuple):
    """The test that failed, or None, and how long that took."""

    caught_by: str | None
    seconds: float


class FirstFailure:
    """A plugin that remembers which test failed, or which file could not be read."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def read_mutants() -> list[Mutant]:
    """The lines of mutants.txt."""
    lines = Path(__file__).with_name("mutants.txt").read_text().splitlines()
    mutants = []
    for line in lines:
        if line and not line.startswith("#"):
            module, _, change = line.partition(": ")
            old, _, new = change.replace("\\n", "\n").partition(" =>")
            mutants.append(Mutant(module, old, new.strip()))
    return mutants


def snapshot(source: Path, folder: Path) -> None:
    """What the tests need of the package, with the bytecode that is there."""
    for name in ("gspo_jax", "tests"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "pyproject.toml", folder)


def tests_on(folder: Path, tests: Iterable[str]) -> Outcome:
    """The first of these tests that fails on the package in this folder."""
    start, first = time.monotonic(), FirstFailure()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # A wrong value has to be noticed, not only a wrong type: without pyproject's checks of those.
    options = ["-n", "0", "-x", "-p", "no:cacheprovider", "-o", "addopts=", "-W"]
    options += ["ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there already
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)], [first])
    caught_by = (first.name or f"pytest exit code {code}") if code else None
    return Outcome(caught_by, time.monotonic() - start)


def attempt(original: Path, mutant: Mutant) -> Outcome:
    """The tests on a copy of the package with the mutant applied."""
    with tempfile.TemporaryDirectory() as folder:
        snapshot(original, Path(folder))
        path = Path(folder, "gspo_jax", f"{mutant.module}.py")
        path.write_text(path.read_text().replace(mutant.old, mutant.new))
        return tests_on(Path(folder), GUARDS[mutant.module])


def main() -> int:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(
        description="Break the mathematics and see whether the tests notice."
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--only", default="", help="mutants whose text contains this")
    options = parser.parse_args()

    mutants = read_mutants()
    stale = [m for m in mutants if source(m).count(m.old) != 1]
    for m in stale:
        print(f"{m.module}.py has {source(m).count(m.old)} times {m.old!r}; wanted once.")
    if stale:
        return 2
    chosen = [m for m in mutants if options.only in " ".join(m)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for name in SHARED:
        importlib.import_module(name)
    needed = dict.fromkeys(test for m in chosen for test in GUARDS[m.module])
    forks = get_context("fork").Pool(options.jobs, maxtasksperchild=1)
    with tempfile.TemporaryDirectory() as folder, forks as pool:
        snapshot(ROOT, original := Path(folder))  # so that editing meanwhile does not matter
        if (unbroken := pool.apply(tests_on, (original, needed))).caught_by:
            print(f"The package itself fails: {unbroken.caught_by}")
            return 2
        outcomes = pool.imap(partial(attempt, original), chosen)
        survivors = print_table(zip(chosen, outcomes, strict=True))
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutants caught.")
    return 1 if survivors else 0


def print_table(results: Iterable[tuple[Mutant, Outcome]]) -> int:
    """One row as soon as it is known; returns how many survived."""
    survivors = 0
    print("| # | module | was | became | caught by | s |\n|---|---|---|---|---|---|")
    for number, (m, outcome) in enumerate(results, 1):
        survivors += outcome.caught_by is None
        verdict = (outcome.caught_by or "**survived**").removeprefix("tests/")
        was, became = (text.replace("|", "\\|").replace("\n", "\\n") for text in (m.old, m.new))
        row = f"{number} | {m.module} | `{was}` | `{became}` | {verdict} | {outcome.seconds:.0f}"
        print(f"| {row} |", flush=True)
    return survivors


def source(mutant: Mutant) -> str:
    """The module that the mutant changes."""
    return (ROOT / "gspo_jax" / f"{mutant.module}.py").read_text()


if __name__ == "__main__":
    sys.exit(main())
