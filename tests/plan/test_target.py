"""What devices a target names; what is compiled for them, tests/targets looks at."""

import importlib.util

import jax
import pytest

from gspo_jax.cli.commands import main
from gspo_jax.errors import ConfigError
from gspo_jax.mesh.sharding import _arranged, make_mesh, platform_of
from gspo_jax.plan.target import target_of


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("b200:1", "there is h100, h200, v5e, v5p, v6e"),
        ("h200", "wanted 1 to 8 GPUs, or whole nodes of 8"),
        ("h200:12", "wanted 1 to 8 GPUs, or whole nodes of 8"),
        ("v6e:8", "wanted a slice's topology"),
        ("v5p:2x2x1:two", "wanted a slice's topology"),
    ],
)
def test_what_is_no_target_is_refused_in_one_line(text, told):
    with pytest.raises(ConfigError, match=told):
        target_of(text)


@pytest.mark.parametrize(("text", "extra"), [("h200:8", "cuda"), ("v5p:2x2x1", "tpu")])
def test_without_what_compiles_for_it_one_line_says_what_to_install(
    text, extra, tiny_dir, capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", f"model.path={tiny_dir}", "--target", text]) == 2
    assert f"pip install 'gspo_jax[target-{extra}]'" in capsys.readouterr().err


class Device:
    """Of a TPU, as far as arranging asks."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5", 0

    def __init__(self, number: int, slices: int):
        self.id, self.slice_index, self.process_index = number, number * slices // 16, 0
        place = number % (16 // slices)
        self.coords = (place % 4, place // 4, 0)


@pytest.mark.parametrize(
    "shape",
    [
        (4, 4, 1, 1),  # data 4 over two slices: half of the copies in either
        (1, 8, 1, 2),  # no data to split: then what shares weights
    ],
)
def test_slices_are_split_by_the_first_axes_alone(shape):
    """What talks most stays where the torus is."""
    arranged = _arranged(shape, [Device(i, 2) for i in range(16)])
    assert arranged.shape == shape
    slices = [[device.slice_index for device in row] for row in arranged.reshape(2, 8)]
    assert slices == [[0] * 8, [1] * 8]


def test_what_cannot_be_arranged_is_refused_with_what_could():
    devices = [Device(i, 1) for i in range(16)]
    with pytest.raises(ConfigError, match=r"of 16 x TPU v5 the first 6 cannot be arranged"):
        make_mesh(data=6, devices=devices)


def test_a_platform_is_that_of_the_mesh_or_else_jaxs_own():
    mesh = make_mesh(data=2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert platform_of(mesh) == platform_of([None, sharding]) == platform_of(None) == "cpu"
