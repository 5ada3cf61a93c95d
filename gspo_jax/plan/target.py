"""Devices that are not here, for which XLA compiles nevertheless.

    h200:8, h100:64       so many GPUs, eight to a node
    v5p:2x2x1, v6e:2x4    a TPU slice by its topology; v5p:2x2x1:2 is two slices

A mesh of them is a mesh like any other: programs are lowered for it and compiled, and nothing is
run. The figures of a device are its maker's.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gspo_jax.errors import ConfigError
from gspo_jax.plan.costs import DATASHEET, Rates

NODE = 8  # GPUs
PREALLOCATED = 0.75  # of a GPU's memory that JAX takes, where XLA_PYTHON_CLIENT_MEM_FRACTION does
# not say


class Chip(NamedTuple):
    """What one device has.

    Attributes:
        name: part of what JAX calls it.
        memory: bytes.
        bandwidth: bytes per second.
    """

    name: str
    memory: int
    bandwidth: float


GPUS = {
    "h100": Chip("H100 80GB HBM3", 84942979072, 3.35e12),
    "h200": Chip("H200", 151397597184, 4.8e12),
}
TPUS = {  # memory is what its compiler gives to programs
    "v5e": Chip("TPU v5 lite", int(15.75 * 2**30), 0.82e12),
    "v5p": Chip("TPU v5", int(95.74 * 2**30), 2.765e12),
    "v6e": Chip("TPU v6", int(31.25 * 2**30), 1.64e12),
}
# What XLA must know of a GPU of the Hopper generation to compile for it: the limits that its
# programming guide states for compute capability 9.0, and the size of the chip. The format is
# that of openxla/xla (Apache-2.0), xla/stream_executor/device_description.proto.
HOPPER = """
gpu_device_info {{
  name: "NVIDIA {name}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory} l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA" device_description_str: "NVIDIA {name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
"""


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
        limit: bytes that a run may use of each.
        rates: of each, on paper.
    """

    devices: Sequence[Any]
    limit: int
    rates: Rates


def target_of(text: str) -> Target:
    """The devices that `text` names (see the top).

    To be called before JAX's devices are first asked for: it then has the CPU alone.

    Raises:
        ConfigError: there is no such target, or what compiles for it is not installed.
    """
    kind, _, shape = text.lower().partition(":")
    if kind in GPUS:
        chip, devices = GPUS[kind], _gpus(text, GPUS[kind], shape)
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", PREALLOCATED))
        limit = int(share * chip.memory)
    elif kind in TPUS:
        chip, devices = TPUS[kind], _tpus(text, shape)
        limit = chip.memory
    else:
        raise ConfigError(f"--target {text}: there is {', '.join([*GPUS, *TPUS])}, like h200:8.")
    matmul = next(rate for name, rate in DATASHEET.items() if name in chip.name)
    return Target(devices, limit, Rates(matmul, chip.bandwidth))


def _gpus(text: str, chip: Chip, shape: str) -> Sequence[Any]:
    count = int(shape) if shape.isdecimal() else 0
    nodes, rest = divmod(count, NODE)
    if not count or (nodes and rest and count > NODE):
        raise ConfigError(
            f"--target {text}: wanted 1 to {NODE} GPUs, or whole nodes of {NODE}, like h100:64."
        )
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    _need(text, plugins, "target-cuda")
    topology = f"1x{nodes}x{NODE}" if nodes else f"1x1x{count}"
    config = HOPPER.format(**chip._asdict())
    return _described(text, "cuda", topology=topology, target_config=config)


def _tpus(text: str, shape: str) -> Sequence[Any]:
    layout, _, slices = shape.partition(":")
    if not re.fullmatch(r"\d+(x\d+){1,2}", layout) or not (slices or "1").isdecimal():
        raise ConfigError(f"--target {text}: wanted a slice's topology, like v5p:2x2x1 or v6e:2x4.")
    _need(text, ("libtpu",), "target-tpu")
    chips = math.prod(map(int, layout.split("x")))
    kind = text.lower().partition(":")[0]
    # Or libtpu asks the cloud's metadata server what machine this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-{chips}")
    more = {"num_slices": int(slices)} if slices else {}
    return _described(f"{kind}:{layout}", "tpu", **more)


def _need(text: str, modules: Sequence[str], extra: str) -> None:
    for module in modules:
        try:
            if importlib.util.find_spec(module):
                return
        except ModuleNotFoundError:  # its package
            continue
    raise ConfigError(
        f"--target {text} needs what compiles for it, {' or '.join(modules)}: "
        f"pip install 'gspo_jax[{extra}]'."
    )


def _described(name: str, platform: str, **options) -> Sequence[Any]:
    jax.config.update("jax_platforms", "cpu")  # plugins without their devices would not start
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, NotImplementedError) as error:  # XLA's is a RuntimeError
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"--target {name}: {reason}.") from error
