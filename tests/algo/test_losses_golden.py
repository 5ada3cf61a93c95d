"""Values and gradients against recordings of TRL 1.16.0 and verl 0.9.1 (tests/golden).

In float64 to 1e-12, in float32 to 1e-6 of the largest gradient. Three conventions differ, and each
is put into numbers here rather than into a tolerance:

    empty responses   TRL counts them in means over responses, we and verl do not
    verl's 1e-8       verl divides token sums by |y| + 1e-8; a weight of |y| / (|y| + 1e-8) is that
    verl's k3         is cut at 10, ours is not (a test of its own)
"""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gspo_jax.algo.losses import LOSSES, kl

GOLDEN = Path(__file__).parents[1] / "golden"
RECORDED = json.loads((GOLDEN / "losses.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "losses.npz"))
CASES = list(RECORDED["cases"])
ALMOST_ONE = 1e-8  # what verl adds to a length


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def clip(cfg):
    delta = cfg["delta"]
    return {"clip_low": cfg["eps_low"], "clip_high": cfg["eps_high"]} | (
        {"delta": delta} if delta else {}
    )


def band(cfg, **options):
    return {"clip_low": cfg["eps_low"], "clip_high": cfg["eps_high"]} | options


# What TRL and verl call it -> our loss, its options, and what our total is divided by.
# L_max is 16 for TRL's dr_grpo and the width T of the arrays for verl's.
TRL = {
    "grpo/token": ("grpo", clip, "all responses"),
    "grpo/sequence": ("gspo", clip, "all responses"),
    "bnpo/token": ("ppo", clip, "weight"),
    "dapo/token": ("dapo", clip, "weight"),
    "dr_grpo/token": (
        "dr_grpo",
        lambda cfg: clip(cfg) | {"max_length": cfg["max_completion_length"]},
        "all responses * L_max",
    ),
    "cispo/token": ("cispo", lambda cfg: {"cap": cfg["cispo_eps_high"]}, "weight"),
    "sapo/token": ("sapo", lambda cfg: {}, "all responses"),
    "luspo/sequence": ("luspo", clip, "all responses"),
    # TRL's default aggregation under a sequence ratio: responses weighted by their length.
    "dapo/sequence": ("luspo", clip, "tokens"),
}
VERL = {
    "vanilla/token-mean": ("ppo", lambda cfg: band(cfg, delta=3.0), "weight"),
    "vanilla/seq-mean-token-mean": ("grpo", lambda cfg: band(cfg, delta=3.0), "weight"),
    "vanilla/seq-mean-token-sum-norm": (
        "dr_grpo",
        lambda cfg: band(cfg, delta=3.0, max_length=1),
        "weight * T",
    ),
    "gspo/seq-mean-token-mean": ("gspo", band, "weight"),
    "gspo/seq-mean-token-sum": ("luspo", band, "weight"),
    "gspo/token-mean": ("luspo", band, "tokens"),
    "cispo/token-mean": (
        "cispo",
        lambda cfg: {"floor": 1 - cfg["eps_low"], "cap": 1 + cfg["eps_high"]},
        "weight",
    ),
    "sapo/seq-mean-token-mean": ("sapo", lambda cfg: {}, "weight"),
}


def divisor(key, case, mean):
    mask, cfg = inputs(case)[-1], RECORDED["cases"][case]
    return {
        "weight": mean.weight,
        "weight * T": mean.weight * mask.shape[1],
        "tokens": mask.sum(),
        "all responses": len(mask),
        "all responses * L_max": len(mask) * cfg["max_completion_length"],
    }[(TRL | VERL)[key][2]]


def recorded(key, case, beta="0.0", corrected=0):
    if key in TRL:
        return f"trl/{case}/{key}/beta{beta}/kl_is{corrected}"
    return f"verl/{case}/{key}/beta{beta}"


@cache
def run_all(key, dtype="float64"):
    """By case: Mean, gradient of its total, metrics.

    Cases of equal options go through one vmap. All arrays have one size, the smaller padded with
    NaN, and nothing is jitted: then each primitive is compiled once for the whole module.
    """
    name, options, _ = (TRL | VERL)[key]
    alike = {}
    for case, cfg in RECORDED["cases"].items():
        alike.setdefault(tuple(options(cfg).items()), []).append(case)

    def total(logp, old, adv, mask, weight, options):
        mean, metrics = LOSSES[name](logp, old, adv, mask, weight=weight, **dict(options))
        return mean.total, (mean, metrics)

    results = {}
    for options, cases in alike.items():
        repeated = [cases[i % len(cases)] for i in range(len(CASES))]
        logp, old, adv, mask = (np.stack(xs) for xs in zip(*map(padded, repeated), strict=True))
        weight = np.stack([verls_epsilon(m) for m in mask]) if has_epsilon(key) else None
        floats = [None if x is None else jnp.array(x, dtype) for x in (logp, old, adv, weight)]
        gradient = jax.vmap(jax.grad(partial(total, options=options), has_aux=True))
        out = gradient(*floats[:3], jnp.array(mask), floats[3])
        out = jax.tree.map(np.asarray, out)
        for i, case in enumerate(cases):
            grad, (mean, metrics) = jax.tree.map(lambda x, i=i: x[i], out)
            rows, width = inputs(case)[-1].shape
            np.testing.assert_array_equal(grad[rows:], 0)
            results[case] = mean, grad[:rows, :width], metrics
    return results


def padded(case):
    logp, old, adv, mask = inputs(case)
    wide = np.full((2, 8, 10), np.nan)
    rows, width = mask.shape
    wide[:, :rows, :width] = logp, old
    more = 8 - rows
    return *wide, np.pad(adv, (0, more)), np.pad(mask, ((0, more), (0, 10 - width)))


def inputs(case):
    return [ARRAYS[f"in/{case}/{k}"] for k in ("logp_new", "logp_old", "advantages", "mask")]


def has_epsilon(key):
    return "seq-mean-token-mean" in key


def verls_epsilon(mask):
    length = mask.sum(-1)
    return length / (length + ALMOST_ONE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", [*TRL, *VERL])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_value_and_gradient(dtype, tolerance, key, case):
    mean, grad, _ = run_all(key, dtype)[case]
    assert mean.total.dtype == grad.dtype == dtype
    by = divisor(key, case, mean)
    agree(mean.total / by, grad / by, recorded(key, case), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_verl_geometric_mean(case):
    """verl's 1e-8 is in the exponent too: as if all log-ratios and the range shrank by it.

    Its mean is over all rows, empty ones included.
    """
    logp, old, adv, mask = inputs(case)
    k, total, grad = verls_epsilon(mask), 0.0, np.zeros_like(logp)
    for i in range(len(mask)):  # one by one, since the shrunken range depends on the length
        cfg = RECORDED["cases"][case]
        options = {f"log_clip_{x}": cfg[f"eps_{x}"] * k[i] for x in ("low", "high")}
        row = [jnp.array(x[i : i + 1]) for x in (old, adv, mask, k)]

        def loss(logp, row=row, k=k[i], options=options):
            old, adv, mask, weight = row
            shrunk = old + k * (logp - old)
            return LOSSES["gmpo"](shrunk, old, adv, mask, weight=weight, **options)[0].total

        value, grad[i] = jax.value_and_grad(loss)(jnp.array(logp[i : i + 1]))
        total += value
    by = len(mask)
    agree(total / by, grad / by, f"verl/{case}/geo_mean/seq-mean-token-mean/beta0.0", 1e-12)


def agree(value, grad, key, tolerance):
    """To `tolerance` of the largest gradient, and of one response's share of the loss."""
    expected, expected_grad = RECORDED["results"][key]["loss"], ARRAYS[f"{key}/grad"]
    size = np.abs(expected_grad).sum(-1).max()  # |s A| / B where nothing is clipped
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance * max(size, 1e-3))
    largest = np.abs(expected_grad).max()
    np.testing.assert_allclose(grad, expected_grad, rtol=0, atol=tolerance * max(largest, 1e-6))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_clip_metrics(level, case):
    metrics, theirs = run_all(f"grpo/{level}")[case][2], results(f"grpo/{level}", case)
    if level == "token":
        ours = [metrics[f"clip_frac{x}"] for x in ("_low", "_high", "")]
        theirs = [theirs[f"clip_ratio/{x}_mean"] for x in ("low", "high", "region")]
    else:  # one number per response; TRL's mean is over empty ones too
        ours = [metrics["clip_frac_seq"] * inputs(case)[-1].any(-1).mean()]
        theirs = [theirs["clip_ratio/region_mean"]]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # TRL reduces them in float32


@pytest.mark.parametrize("case", [c for c in CASES if c != "empty_row"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trl_mean_ratio(level, case):
    """TRL's is over empty responses too, whose ratio it takes for 1."""
    theirs = results(f"grpo/{level}", case)["mean_ratio"]
    np.testing.assert_allclose(run_all(f"grpo/{level}")[case][2]["ratio_mean"], theirs, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("key", ["vanilla/token-mean", "gspo/seq-mean-token-mean"])
def test_verl_clip_metrics(key, case):
    metrics, theirs = run_all(key)[case][2], results(key, case)
    np.testing.assert_allclose(metrics["clip_frac"], theirs["actor/pg_clipfrac"], rtol=1e-6)
    if "vanilla" in key:
        lower = theirs["actor/pg_clipfrac_lower"]
        np.testing.assert_allclose(metrics["clip_frac_delta"], lower, rtol=1e-6)


def results(key, case):
    return RECORDED["results"][recorded(key, case)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("corrected", [0, 1])
@pytest.mark.parametrize("key", ["grpo/token", "dapo/token", "grpo/sequence"])
def test_trl_with_a_kl_term(key, corrected, case):
    """beta 0.04 and k3. With a sequence ratio TRL corrects the KL by s instead of w: not ours."""
    if corrected and key == "grpo/sequence":
        return
    mean, grad, _ = run_all(key)[case]
    over = "tokens" if key == "dapo/token" else "responses"
    old = inputs(case)[1] if corrected else None
    penalty, kl_grad, metrics = run_kl(case, over, old)
    by = divisor(key, case, mean)
    loss, grad = (mean.total + 0.04 * penalty.total) / by, (grad + 0.04 * kl_grad) / by
    name = recorded(key, case, "0.04", corrected)
    agree(loss, grad, name, 1e-12)
    np.testing.assert_allclose(metrics["kl"], RECORDED["results"][name]["kl"], rtol=1e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c != "extreme"])
@pytest.mark.parametrize("key", ["vanilla/token-mean", "gspo/seq-mean-token-mean"])
def test_verl_with_a_kl_term(key, case):
    mean, grad, _ = run_all(key)[case]
    by_row = has_epsilon(key)
    mask = inputs(case)[-1]
    k = verls_epsilon(mask) if by_row else np.ones(len(mask))
    over = "responses" if by_row else "tokens"
    for i in range(len(mask)):  # each response with its own k
        penalty, kl_grad, _ = run_kl(case, over, None, only_row=i)
        mean = mean._replace(total=mean.total + 0.04 * k[i] * penalty.total)
        grad = grad + 0.04 * k[i] * kl_grad
    by = divisor(key, case, mean)
    agree(mean.total / by, grad / by, recorded(key, case, "0.04"), 1e-12)


def test_verl_cuts_k3_at_ten_and_we_do_not():
    """A token that the reference likes e^20 times as much still pulls; cut, it would not."""
    ref, logp, mask = jnp.array([[-0.1]]), jnp.array([[-10.1]]), jnp.array([[True]])
    value, grad = jax.value_and_grad(lambda x: kl(x, ref, mask)[0].total)(logp)
    np.testing.assert_allclose(value, np.exp(10) - 11)
    np.testing.assert_allclose(grad, [[1 - np.exp(10)]])


def run_kl(case, over, old, only_row=None):
    logp, _, _, mask = inputs(case)
    if only_row is not None:
        mask = mask & (np.arange(len(mask))[:, None] == only_row)
    ref, mask = jnp.array(ARRAYS[f"in/{case}/logp_ref"]), jnp.array(mask)
    old = None if old is None else jnp.array(old)

    def total(logp):
        mean, metrics = kl(logp, ref, mask, over=over, old_logp=old)
        return mean.total, (mean, metrics)

    grad, (mean, metrics) = jax.grad(total, has_aux=True)(jnp.array(logp))
    return mean, np.asarray(grad), metrics
