"""The mesh changes where arrays live, and nothing that is computed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gspo_jax.config.load import load_config
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import make_mesh, partition_spec, shard_batch, state_shardings
from gspo_jax.policy import param_shardings
from gspo_jax.train import train
from gspo_jax.update.optim import make_optimizer
from gspo_jax.update.quant import Quantised
from gspo_jax.update.state import init_state


def test_logical_axes_become_mesh_axes_and_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh(data=2, fsdp=4)
    assert partition_spec(("embed", "heads"), mesh) == P("fsdp", None)
    assert partition_spec(("batch", None), mesh, (16, 3)) == P(("data", "fsdp"), None)
    assert partition_spec(("batch", None), mesh, (12, 3)) == P(None, None)  # 12 % 8
    assert partition_spec(("embed", "mlp"), mesh, (6, 8)) == P(None, None)  # 6 % 4


@pytest.mark.parametrize(("data", "fsdp"), [(3, 3), (0, 1), (-1, 16)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused_with_both_numbers(data, fsdp):
    with pytest.raises(ConfigError, match=r"mesh\.data=.* devices and 8 exist"):
        make_mesh(data=data, fsdp=fsdp)


def test_moments_and_their_scales_follow_the_parameters(tiny_view):
    mesh = make_mesh(data=2, fsdp=4)
    _, params = tiny_view
    optimizer = make_optimizer(optax.constant_schedule(1e-3), state="8bit")
    # Large enough to be compressed: [64, 32] * 4 = [256, 32] has 8192 elements.
    params = jax.tree.map(
        lambda p: p.replace(jnp.tile(p[...], (4, 1)) if p[...].ndim == 2 else p[...]),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Param),
    )
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    shardings = state_shardings(shapes, params, mesh)
    adam = shardings.opt_state[1][0].inner

    def coded(variable) -> Quantised:
        return jax.tree.leaves(variable, is_leaf=lambda x: isinstance(x, Quantised))[0]

    for moment in (adam.mu, adam.nu):
        embed = coded(moment["embed"])  # ("vocab", "embed")
        assert embed.codes.spec == P(None, "fsdp")
        assert embed.scale.spec == P(None, None)  # one block per row: nothing to split
        gate = coded(moment["layers"][0]["gate"])  # ("embed", "mlp")
        assert gate.codes.spec == gate.scale.spec == P("fsdp", None)
    assert jax.tree.leaves(shardings.params["layers"][1]["down"])[0].spec == P(None, "fsdp")
    assert adam.count.spec == P()


def test_a_batch_is_split_over_all_devices(tiny_view):
    mesh = make_mesh(data=2, fsdp=4)
    x = shard_batch({"tokens": np.arange(16).reshape(8, 2)}, mesh)["tokens"]
    assert len(x.sharding.device_set) == 8
    assert x.addressable_shards[3].data.shape == (1, 2)


def test_parameters_take_the_sharding_that_their_axes_say(tiny_view):
    _, params = tiny_view
    mesh = make_mesh(data=1, fsdp=8)
    placed = jax.device_put(params, param_shardings(params, mesh))
    q = placed["layers"][0]["q"][...]
    assert q.sharding.spec == P("fsdp", None)
    assert q.addressable_shards[0].data.shape == (32 // 8, 32)


@pytest.fixture(scope="module")
def run_on(tiny_dir, tmp_path_factory):
    """Two steps on a mesh; the metrics and the sampled texts."""
    root = tmp_path_factory.mktemp("meshes")
    data = root / "prompts.jsonl"
    rows = [{"prompt": f"Say {w} {w}", "answer": w, "split": "train"} for w in "abcdefgh"]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(data_axis, fsdp):
        result = train(
            load_config(
                None,
                [
                    f"model.path={tiny_dir}",
                    f"task.path={data}",
                    "task.rewards=[reward_functions:short_words]",
                    "rollout.prompts=8",
                    "rollout.group_size=4",
                    "rollout.max_completion_length=8",
                    "algo.minibatches=2",
                    "algo.microbatch=8",
                    "algo.loss={name: gspo, clip_low: 0.02, clip_high: 0.03}",
                    "optim.learning_rate=1e-3",
                    f"mesh.data={data_axis}",
                    f"mesh.fsdp={fsdp}",
                    f"run.dir={root}",
                    f"run.name=mesh-{data_axis}x{fsdp}",
                    "run.steps=2",
                    "run.log_completions=1",
                ],
            )
        )
        read = [
            [json.loads(line) for line in (result.run_dir / name).read_text().splitlines()]
            for name in ("metrics.jsonl", "samples.jsonl")
        ]
        return read

    return run


@pytest.fixture(scope="module")
def on_one_device(run_on):
    return run_on(1, 1)


@pytest.mark.long
@pytest.mark.parametrize(("data", "fsdp"), [(2, 1), (1, 4), (2, 4)])
def test_any_mesh_samples_the_same_tokens_and_computes_the_same_losses(
    run_on, on_one_device, data, fsdp
):
    metrics, samples = run_on(data, fsdp)
    wanted, wanted_samples = on_one_device
    assert [row["completion"] for row in samples] == [row["completion"] for row in wanted_samples]
    for got, want in zip(metrics, wanted, strict=True):
        for name in ("reward", "completions/mean_length", "num_tokens"):
            assert got[name] == want[name]
        # Losses lie near 0 (advantages are centred): 1e-5 of the scale of its terms, which is 1.
        for name in ("loss", "entropy", "ratio_mean"):
            assert got[name] == pytest.approx(want[name], abs=1e-5), name
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        np.testing.assert_allclose(got["loss_by_update"], want["loss_by_update"], atol=1e-5)
