from __future__ import annotations

import random

import pytest
from chroma_trainer.trainer_core.errors import UserError
from chroma_trainer.trainer_core.workflow.graph import Graph, Link, Node


def graph(**takes: str) -> Graph:
    """Nodes by id, with the ids that each takes from."""
    nodes = {
        key: Node(key, key.upper(), key, {f"i{k}": Link(source, 0) for k, source in enumerate(sources.split())})
        for key, sources in takes.items()
    }
    return Graph(nodes)


def test_the_order_is_the_files_where_links_leave_it_open():
    assert graph(c="", a="", b="").order() == ("c", "a", "b")
    assert graph(c="b", a="", b="").order() == ("b", "c", "a")
    assert graph(d="b c", c="a", b="a", a="").order() == ("a", "b", "c", "d")


def test_each_node_stands_after_its_sources():
    draw = random.Random(0)
    for _ in range(50):
        names = [f"n{k}" for k in range(20)]
        takes = {name: " ".join(draw.sample(names[:k], min(k, 3))) for k, name in enumerate(names)}
        shuffled = dict(draw.sample(list(takes.items()), len(takes)))
        order = graph(**shuffled).order()
        assert sorted(order) == sorted(names)
        assert all(order.index(source) < order.index(name) for name in names for source in takes[name].split())


def test_a_chain_longer_than_pythons_stack():
    num_nodes = 20_000
    takes = {f"n{k}": f"n{k + 1}" for k in range(num_nodes - 1)} | {f"n{num_nodes - 1}": ""}
    assert graph(**takes).order()[0] == f"n{num_nodes - 1}"


@pytest.mark.parametrize(
    ("takes", "circle"),
    [
        ({"a": "a"}, "a (A) <- a (A)"),
        ({"x": "", "a": "x b", "b": "c", "c": "a"}, "a (A) <- b (B) <- c (C) <- a (A)"),
        ({"z": "a", "a": "b", "b": "a"}, "a (A) <- b (B) <- a (A)"),
    ],
)
def test_a_circle_is_named(takes: dict[str, str], circle: str):
    with pytest.raises(UserError) as caught:
        graph(**takes).order()
    assert str(caught.value) == f"workflow: nodes form a cycle: {circle}; remove one of these links"
