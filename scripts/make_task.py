"""Write a task's problems to files: train.jsonl, val.jsonl, test.jsonl and manifest.json.

    python scripts/make_task.py zebra-synth OUT puzzles=[5*5] sizes.train=1000
    gspo-jax train task.path=OUT ...

A row has the problem's id, prompt, answer and columns. The manifest says how to make the same
files again, and their hashes.
"""

import argparse
import json
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gspo_jax.tasks import SPLITS, TASKS, load_task


def write_task(name: str, out: Path, *, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Write the task's splits into `out`; returns the manifest that is written beside them."""
    task = load_task(name, seed=seed, **options)
    out.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {"task": task.name, "name": name, "seed": seed, "options": options}
    manifest |= {"size": task.size, "fingerprint": task.fingerprint, "files": {}}
    for split in SPLITS:
        problems = [task.problem(split, i) for i in range(task.size[split])]
        rows = [p.columns | {"id": p.id, "prompt": p.prompt, "answer": p.answer} for p in problems]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not rows:
            continue
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        manifest["files"][f"{split}.jsonl"] = {
            "rows": len(rows),
            "difficulty": dict(Counter(str(row.get("difficulty")) for row in rows)),
            "sha256": sha256(text.encode()).hexdigest(),
        }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def main() -> None:
    """Parse the command line, write, and print the manifest."""
    parser = argparse.ArgumentParser(description="Write a task's problems to files.")
    parser.add_argument("name", choices=sorted(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("out", type=Path)
    parser.add_argument("options", nargs="*", metavar="option=value", help="of the task, in YAML")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    options: Any = OmegaConf.to_container(OmegaConf.from_dotlist(given.options))
    print(json.dumps(write_task(given.name, given.out, seed=given.seed, options=options), indent=1))


if __name__ == "__main__":
    main()
