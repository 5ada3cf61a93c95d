"""What an export's card says of its use, run as it is written."""

import json
import re
import subprocess
import sys

import jax
import pytest

from gspo_jax.config.load import load_config
from gspo_jax.policy import load_policy
from gspo_jax.run.export import export_params
from gspo_jax.run.model_card import PLACE, how_to_use, model_card

pytestmark = pytest.mark.parity


def test_the_lines_for_transformers_run_as_the_card_has_them_and_as_they_are_printed(
    tiny_dir, tmp_path
):
    settings = [f"model.path={tiny_dir}", "rollout.max_completion_length=8", "mesh.data=1"]
    config = load_config(None, settings)
    policy = load_policy(config)
    card = model_card(config, steps=1, supervised=False, before={}, after={})
    with jax.set_mesh(policy.mesh):
        out = export_params(policy, policy.params, tmp_path / "an export", card=card)
    written = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    assert written is not None
    code = written[1].replace(PLACE, json.dumps(str(out)))
    printed = how_to_use(out).split("With vLLM:")[0].splitlines()[1:]
    assert code.splitlines() == [line.removeprefix("  ") for line in printed]
    assert len(code.splitlines()) == 3
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "'role': 'assistant'" in done.stdout and "'content': " in done.stdout
