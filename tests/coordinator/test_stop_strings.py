"""A text ends before a stop string, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import InvalidRequestError
from coordinator.stop_strings import (
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    StopStrings,
    validate_stop_strings,
)


def first_end(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The specification: read character by character, end as soon as a stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    parts=st.lists(st.text("ab€", max_size=4), max_size=12),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=4),
)
def test_result_depends_on_the_text_and_not_on_its_pieces(parts: list[str], stops: list[str]) -> None:
    watcher = StopStrings(stops)
    emitted = "".join(watcher.push(part) for part in parts) + watcher.flush()
    assert (emitted, watcher.matched) == first_end("".join(parts), stops)


def test_beginning_of_a_stop_string_is_held_back_until_it_is_certain() -> None:
    watcher = StopStrings(["###"])
    assert [watcher.push(text) for text in ("a#", "#", "b", "##")] == ["a", "", "##b", ""]
    assert watcher.matched is None
    assert watcher.flush() == "##"


def test_stop_string_across_pieces_ends_the_text_before_it() -> None:
    watcher = StopStrings(["</end>", "\n\n"])
    assert [watcher.push(text) for text in ("one\n", "two</", "end> three", "four")] == ["one", "\ntwo", "", ""]
    assert watcher.matched == "</end>"
    assert watcher.flush() == ""


def test_stop_string_that_is_complete_first_wins() -> None:
    watcher = StopStrings(["abcd", "bc"])
    assert watcher.push("xabcd") == "xa"
    assert watcher.matched == "bc"


def test_without_stop_strings_nothing_is_held_back() -> None:
    watcher = StopStrings([])
    assert watcher.push("anything") == "anything"
    assert watcher.flush() == ""


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([""], "must not be empty"),
        (["x" * (MAX_STOP_STRING_LENGTH + 1)], "at most 1024 characters"),
        (["x"] * (MAX_STOP_STRINGS + 1), "at most 64 stop strings"),
    ],
)
def test_unreasonable_stop_strings_are_refused(stops: list[str], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        validate_stop_strings(stops)


def test_reasonable_stop_strings_are_accepted() -> None:
    validate_stop_strings(["\n", "###"])
