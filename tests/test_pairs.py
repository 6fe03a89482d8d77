"""Pair graphs: how many edges, between whom, and never from test to training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdutils import pairs

GRAPHS = sorted(pairs.GRAPHS)
COUNT, WINDOW = st.integers(0, 30), st.integers(1, 6)


def edges(directed):
    return {tuple(sorted(pair)) for pair in directed.tolist()}


@given(st.integers(1, 40), st.integers(1, 8))
def test_sliding_window_has_its_number_of_edges(count, window):
    k = min(window, count - 1)
    assert len(edges(pairs.window_pairs(count, window))) == count * k - k * (k + 1) // 2


@given(COUNT, WINDOW)
def test_logarithmic_window_has_powers_of_two(count, window):
    found = edges(pairs.log_window_pairs(count, window))
    assert found == {(i, i + 2**k) for k in range(window) for i in range(count) if i + 2**k < count}


@given(COUNT)
def test_complete_and_reference_graphs(count):
    assert len(edges(pairs.complete_pairs(count))) == count * (count - 1) // 2
    assert edges(pairs.reference_pairs(count)) == {(0, k) for k in range(1, count)}


def test_reference_image_can_be_chosen():
    assert edges(pairs.reference_pairs(4, 2)) == {(0, 2), (1, 2), (2, 3)}


@given(st.integers(2, 30), WINDOW, st.sampled_from([pairs.window_pairs, pairs.log_window_pairs]))
def test_cyclic_graph_gives_every_image_the_same_part(count, window, graph):
    found = graph(count, window, cyclic=True)
    assert len(set(np.bincount(found[:, 0], minlength=count))) == 1
    assert edges(graph(count, window)) <= edges(found)


def test_cyclic_window_closes_the_ring():
    assert edges(pairs.window_pairs(5, 1, cyclic=True)) == {(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.sampled_from(GRAPHS), WINDOW)
def test_pairs_are_symmetric_unique_and_within_one_sequence(sequence, graph, window):
    sequence = np.array(sequence)
    found = pairs.sequence_pairs(sequence, graph, window)
    assert found.shape == (len(found), 2) and found.dtype == np.int64
    assert (found[:, 0] != found[:, 1]).all()
    assert (sequence[found[:, 0]] == sequence[found[:, 1]]).all()
    directed = {tuple(pair) for pair in found.tolist()}
    assert len(directed) == len(found) and directed == {(j, i) for i, j in directed}


@pytest.mark.parametrize("graph", GRAPHS)
def test_each_sequence_is_one_piece(graph):
    sequence = np.repeat([0, 1, 2], [5, 9, 2])
    pieces, piece = pairs.components(pairs.sequence_pairs(sequence, graph, 2), len(sequence))
    assert pieces == 3
    assert all(len(set(piece[sequence == name])) == 1 for name in range(3))


def test_piece_of_an_image_without_a_pair():
    pieces, piece = pairs.components(np.array([[0, 1], [1, 0]]), 3)
    assert pieces == 2 and piece[0] == piece[1] != piece[2]


@pytest.mark.parametrize("graph", GRAPHS)
def test_one_and_two_images(graph):
    assert pairs.sequence_pairs(np.array([1]), graph).shape == (0, 2)
    assert pairs.sequence_pairs(np.array([1, 1]), graph).tolist() == [[0, 1], [1, 0]]


def test_unknown_graph_names_the_known():
    with pytest.raises(ValueError, match="'ring'.*swin, logwin, oneref, complete"):
        pairs.sequence_pairs(np.zeros(3), "ring")
