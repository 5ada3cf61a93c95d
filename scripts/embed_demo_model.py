"""Put a cold-started model into the package as the demo's starting point, with its manifest.

gspo-jax sft configs/cold_start.yaml && python scripts/embed_demo_model.py runs/cold_start-seed0
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "gspo_jax" / "assets" / "demo"
RECIPE = ROOT / "configs" / "cold_start.yaml"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(run: Path) -> dict:
    """Where the weights come from, what they score, and the hash of every file beside them."""
    env = json.loads((run / "env.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "recipe": f"gspo-jax sft {RECIPE.relative_to(ROOT)}",
        "recipe_sha256": sha256(RECIPE),
        "seed": yaml.safe_load((run / "config.yaml").read_text())["run"]["seed"],
        "steps": rows[-1]["step"],
        "versions": env["versions"],
        "evaluation": {k: v for k, v in rows[-1].items() if k.startswith("eval/")},
        "files_sha256": {p.name: sha256(p) for p in sorted(DEMO.iterdir()) if p.name != NAME},
    }


NAME = "manifest.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run of the recipe")
    run = parser.parse_args().run
    shutil.copyfile(run / "export" / "model.safetensors", DEMO / "model.safetensors")
    (DEMO / NAME).write_text(json.dumps(manifest(run), indent=1) + "\n")
    print(DEMO / NAME)


if __name__ == "__main__":
    main()
