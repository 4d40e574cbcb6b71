"""The blind vote: sides that cannot be guessed, votes that survive, and what they say; and damaged files."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.run_images.drawable import Asked
from chroma_trainer.trainer_core.run_images.image_sets import (
    SET,
    ImageSet,
    Row,
    Shown,
    find_set,
    image_name,
    read_set,
    set_folder,
    sets_of,
)
from chroma_trainer.trainer_core.run_images.votes import EQUAL, LEFT, RIGHT, VOTES, Vote, outcomes_of, read_vote, wilson
from chroma_trainer.trainer_core.storage.atomic import write_json


def make_set(run: Path, num_rows: int = 40, key: str = "0123456789", kind: str = "vote") -> Path:
    """A set of two versions, with images that say which they are."""
    folder = set_folder(run, kind, key)
    folder.mkdir(parents=True)
    versions = tuple(Shown(f"step {step}", f"{step:064x}", 1.0) for step in (250, 500))
    rows = tuple(Row(f"cat {seed}", f"a cat {seed}", seed, (64, 64)) for seed in range(num_rows))
    for row in range(num_rows):
        for version in (0, 1):
            (folder / image_name(row, version)).write_bytes(f"{row} {version}".encode())
    write_json(folder / SET, ImageSet(kind, versions, rows).as_json())
    return folder


def vote_on(folder: Path) -> Vote:
    vote = read_vote(folder)
    assert vote
    return vote


def preferring(vote: Vote, version: int, rows: list[int]) -> Vote:
    """Vote for a version wherever it is shown."""
    for row in rows:
        vote = vote.with_choice(row, LEFT if vote.version_at(row, LEFT) == version else RIGHT)
    return vote


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [(0, 0, 0, 1), (0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(successes, count, low, high):
    """The last one is the example of Newcombe 1998, Statistics in Medicine 17."""
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_sides_and_order_are_mixed_and_stay(tmp_path):
    folder = make_set(tmp_path)
    vote, again = vote_on(folder), vote_on(folder)
    sides = [vote.version_at(row, LEFT) for row in range(40)]
    assert sides == [again.version_at(row, LEFT) for row in range(40)] and 10 <= sum(sides) <= 30
    assert all(vote.version_at(row, LEFT) != vote.version_at(row, RIGHT) for row in range(40))
    assert vote.order == again.order and sorted(vote.order) == list(range(40)) != vote.order
    other = vote_on(make_set(tmp_path, key="fedcba9876"))
    assert [other.version_at(row, LEFT) for row in range(40)] != sides


def test_votes_are_stored_by_version_and_go_on(tmp_path):
    folder = make_set(tmp_path)
    vote = preferring(vote_on(folder), 1, [0, 1, 2]).with_choice(3, EQUAL)
    vote.save()
    again = vote_on(folder)
    assert again.choices == {0: 1, 1: 1, 2: 1, 3: -1} and not again.is_complete
    assert [again.side_of(row) for row in range(5)] == [vote.side_of(row) for row in range(5)]
    assert (again.side_of(3), again.side_of(4)) == (EQUAL, "")
    assert again.with_choice(0, "").choices == {1: 1, 2: 1, 3: -1}
    assert json.loads((folder / VOTES).read_text("utf-8"))["outcome"]["wins"] == [0, 3]


def test_what_the_votes_say(tmp_path):
    vote = vote_on(make_set(tmp_path))
    assert vote.outcome.text() == "step 500 against step 250: 0 of 40 pairs voted"
    few = preferring(vote, 1, list(range(5)))
    assert few.outcome.better == "step 500" and few.outcome.interval[0] > 0.5
    even = preferring(preferring(vote, 1, list(range(6))), 0, list(range(6, 10))).with_choice(10, EQUAL)
    assert even.outcome.text() == (
        "step 500 against step 250: 11 of 40 pairs voted, step 500 preferred in 6 of 10 (31% to 83%), 1 equal: they can't be "
        "told apart yet"
    )
    assert preferring(vote, 0, list(range(40))).outcome.better == "step 250"
    assert outcomes_of(tmp_path) == []
    even.save()
    assert [outcome.wins for outcome in outcomes_of(tmp_path)] == [(4, 6)]


def test_a_guess_decides_nothing(tmp_path):
    """Somebody who always presses the same key, or any key, prefers no version: 5 % of the votes may seem to decide."""
    draw, decided = random.Random(0), 0
    for number in range(40):
        vote = vote_on(make_set(tmp_path / str(number), 30, key=f"{number:08x}"))
        left = vote
        for row in range(30):
            left, vote = left.with_choice(row, LEFT), vote.with_choice(row, draw.choice((LEFT, RIGHT)))
        decided += bool(left.outcome.better) + bool(vote.outcome.better)
    assert decided <= 10


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"kind": "vote"}',
        '{"kind": "vote", "versions": [], "rows": [5]}',
        '{"kind": 5, "versions": [{}], "rows": []}',
        "[" * 9999,
    ],
)
def test_a_damaged_set_is_none(tmp_path, text):
    folder = make_set(tmp_path)
    (folder / SET).write_text(text, "utf-8")
    assert read_set(folder) is None and read_vote(folder) is None and list(sets_of(tmp_path)) == []
    assert find_set(tmp_path, folder.name) is None


def test_damaged_votes_are_left_out(tmp_path):
    folder = make_set(tmp_path, 3)
    for text in ("", "[]", '{"votes": 5}'):
        (folder / VOTES).write_text(text, "utf-8")
        assert vote_on(folder).choices == {}
    rows = [
        {"row": 0, "version": 1},
        {"row": 7, "version": 1},
        {"row": 1, "version": 2},
        {"row": True, "version": 0},
        5,
        {"row": 2, "version": None},
    ]
    (folder / VOTES).write_text(json.dumps({"votes": rows}), "utf-8")
    assert vote_on(folder).choices == {0: 1, 2: -1}


def test_sets_are_found_by_their_names_alone(tmp_path):
    folder = make_set(tmp_path)
    assert find_set(tmp_path, folder.name) == folder
    for name in ("", "..", "vote-0123456", "vote-01234567/..", "../image-sets/vote-01234567", "vote-zzzzzzzz"):
        assert find_set(tmp_path, name) is None
    make_set(tmp_path, kind="strengths", key="00000001")
    assert {name for name, _ in sets_of(tmp_path)} == {"vote-01234567", "strengths-00000001"}
    strengths = find_set(tmp_path, "strengths-00000001")
    assert strengths and read_vote(strengths) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compare": "1, 2", "strengths": "0, 1"}, "leave one of them empty"),
        ({"strengths": "a"}, "write them as 0, 0.5, 1"),
        ({"strengths": "nan, 1"}, "from -10 to 10"),
        ({"strengths": ",".join(map(str, range(50)))}, "at most 40"),
        ({"strengths": "1"}, "needs two or more"),
        ({"num_seeds": 0}, "use 1 to 64"),
        ({"strengths": "0, 1", "checkpoints": "some"}, "is not a valid selection"),
        ({"checkpoints": "all"}, "are for the slider of strengths"),
    ],
)
def test_what_can_not_be_asked(values, message):
    with pytest.raises(UserError, match=message):
        Asked(**values)


def test_what_is_asked():
    assert not Asked().is_set and Asked(compare="1, people/anna ").names() == ["1", "people/anna"]
    assert Asked(strengths="1, 0,0.5 ,1").strength_list() == [0.0, 0.5, 1.0]
    assert Asked(strengths="1", checkpoints="last 2").checkpoint_choice().last == 2  # of checkpoints alone
