"""Stop strings over a stream: nothing of one is shown, nothing else is lost, however the text is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchargpt.stopping import StopFilter


def by_definition(text, stops):
    """The text before the stop string that is complete first, found character by character."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_equals_the_definition_for_every_cut(pieces, stops):
    stop_filter = StopFilter(tuple(stops))
    expected, stopped = by_definition("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += stop_filter.push(piece)
        # never half shown: what is shown is always the beginning of what remains in the end
        assert expected.startswith(shown)
    assert stop_filter.stopped is stopped
    assert shown + stop_filter.flush() == expected


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["EN", "D"], ["", ""]),
        (["xEN", "Dy"], ["x", ""]),
        (["xEN", "E", "ND"], ["x", "EN", ""]),
        (["EEN", "E"], ["E", "EN"]),
        (["abc"], ["abc"]),
    ],
)
def test_holds_back_only_what_may_become_a_stop(pieces, shown):
    stop_filter = StopFilter(("END",))
    assert [stop_filter.push(piece) for piece in pieces] == shown
