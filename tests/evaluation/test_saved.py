"""Files of responses: named by all that matters, read up to the last whole batch."""

import json

import pytest

from gspo_jax.evaluation.saved import Batch, file_of, model_hash, whole_batches

# Five problems in batches of two: the greedy responses, then two samples of each.
BATCHES = [Batch(k, range(i, min(i + 2, 5))) for k in (0, 2) for i in (0, 2, 4)]
ROWS = [{"index": i, "sample": s, "text": "é\n"} for b in BATCHES for i, s in b.places]
LINES = [json.dumps(row) + "\n" for row in ROWS]


def test_places_are_problem_by_problem_and_the_greedy_response_is_number_0():
    assert BATCHES[1].places == [(2, 0), (3, 0)]
    assert BATCHES[-2].places == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert len(ROWS) == 15


@pytest.mark.parametrize(
    ("text", "batches"),
    [
        ("", 0),
        ("".join(LINES), 6),
        ("".join(LINES[:9]), 4),
        ("".join(LINES[:12]), 4),  # the fifth batch has four rows
        ("".join(LINES[:8]) + LINES[8][:-4], 3),  # torn in the fourth
        ("".join(LINES[:8]) + LINES[8][:-4] + LINES[9], 3),  # and written on behind it
        ("".join([*LINES[:3], "\0" * 99 + "\n", *LINES[3:]]), 6),  # zeros of a lost power
        ("".join([*LINES[:3], *LINES[4:]]), 1),  # a row is missing
        ("[1]\n" + "".join(LINES[:2]), 1),
    ],
)
def test_whole_batches_are_kept_and_the_rest_is_cut_off(tmp_path, text, batches):
    file = tmp_path / "new" / "a.jsonl"
    file.parent.mkdir()
    file.write_text(text)
    rows, left = whole_batches(file, BATCHES)
    count = sum(len(b.places) for b in BATCHES[:batches])
    assert rows == ROWS[:count] and left == BATCHES[batches:]
    if left:  # ready to be appended to
        assert file.read_text() == "".join(LINES[:count])


def test_a_file_is_found_by_its_identity_whatever_its_model_is_called(tmp_path):
    one, two = {"model": "abc", "seed": 0}, {"model": "abc", "seed": 1}
    file = file_of(tmp_path, "runs/a b/export", one)
    assert file.name.startswith("runs-a-b-export.") and file.suffix == ".jsonl"
    file.touch()
    assert file_of(tmp_path, "elsewhere", one) == file
    assert file_of(tmp_path, "runs/a b/export", two) != file
    assert file_of(tmp_path, "..", two).parent == tmp_path


def test_a_model_is_the_content_of_its_files(tmp_path):
    def made(name, **files):
        directory = tmp_path / name
        directory.mkdir()
        for stem, content in files.items():
            (directory / stem.replace("__", ".")).write_text(content)
        return model_hash(directory)

    same = made("a", config__json="{}", model__safetensors="1")
    assert same == made("b", model__safetensors="1", config__json="{}", README__md="new")
    others = [
        made("c", config__json="{}", model__safetensors="2"),
        made("d", config__json="{}", model__safetensors="1", chat_template__jinja=""),
        made("e", config__json="1", model__safetensors="{}"),
    ]
    assert len({same, *others}) == 4
