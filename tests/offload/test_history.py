"""The two-layer history against a count in plain Python."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cachemoe.offload.history import History

NOTHING = torch.zeros(1, 4)  # no gate input is looked at


def literal_prediction(trace, later, before, last):
    """Count, in the whole trace, what the layer chose after both, after the last alone, or at all."""
    flat = [set(choice) for token in trace for choice in token]
    layers, k = len(trace[0]), len(trace[0][0])
    places = range(later, len(flat), layers)
    both = [i for i in places if i > 1 and before is not None and (flat[i - 2], flat[i - 1]) == (before, last)]
    one = [i for i in places if i > 0 and flat[i - 1] == last]
    found = both or one or list(places)
    uses = {e: sum(e in flat[i] for i in found) for i in found for e in flat[i]}
    return sorted(uses, key=lambda e: (-uses[e], e))[:k]


@st.composite
def traces(draw):
    """``[T, L, K]`` of few experts, so that choices come again."""
    layers, k = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    choice = st.lists(st.integers(0, 3), min_size=k, max_size=k, unique=True)
    token = st.lists(choice, min_size=layers, max_size=layers)
    return draw(st.lists(token, min_size=1, max_size=12)), draw(st.lists(token, min_size=1, max_size=4))


@given(traces())
def test_it_is_the_literal_count(profiled_and_decoded):
    profiled, decoded = profiled_and_decoded
    layers = len(profiled[0])
    history = History(torch.tensor(profiled))
    seen = [None]
    for place, choice in enumerate(choice for token in decoded for choice in token):
        layer, later = place % layers, (place + 1) % layers
        history.observe(layer, choice)
        seen.append(set(choice))
        assert history.predict(layer, NOTHING) == [(later, literal_prediction(profiled, later, *seen[-2:]))]


def test_probabilities_decide_the_order_and_unseen_choices_fall_back():
    trace = torch.tensor([[[0], [1], [5]]] * 3 + [[[0], [1], [4]]] + [[[2], [1], [7]]] * 5 + [[[2], [3], [6]]])
    history = History(trace)

    def predicted(first, second):
        history.observe(0, [first])
        history.observe(1, [second])
        return history.predict(1, NOTHING)

    assert predicted(0, 1) == [(2, [5])]  # three times of four
    assert predicted(2, 3) == [(2, [6])]
    assert predicted(9, 1) == [(2, [7])]  # after 1 alone: five of nine
    assert predicted(9, 9) == [(2, [7])]  # of all ten


def test_a_choice_is_a_set():
    history = History(torch.tensor([[[0, 1], [2, 3], [4, 5]], [[6, 7], [6, 7], [6, 7]], [[6, 7], [6, 7], [6, 7]]]))
    history.observe(0, [1, 0])
    history.observe(1, [3, 2])
    assert history.predict(1, NOTHING) == [(2, [4, 5])]


def test_after_the_last_layer_comes_the_next_tokens_first():
    history = History(torch.tensor([[[0], [1]], [[2], [3]], [[0], [1]], [[2], [3]]]))
    history.observe(1, [1])
    assert history.predict(1, NOTHING) == [(0, [2])]


def test_before_any_choice_the_most_frequent_are_named():
    assert History(torch.tensor([[[0], [1]], [[0], [2]], [[0], [2]]])).predict(0, NOTHING) == [(1, [2])]
