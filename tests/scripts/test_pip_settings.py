"""pip's settings, translated for uv."""

from __future__ import annotations

from scripts.pip_settings import exports, parse_settings


def test_environment_wins_over_files_and_other_sections_are_ignored() -> None:
    listing = "\n".join([":env:.find-links='/env'", "global.find-links='/file'", "wheel.cert='/other'"])
    assert parse_settings(listing) == {"find-links": "/env"}


def test_several_values_are_separated_as_uv_wants_them() -> None:
    settings = {"find-links": "/a\n/b", "extra-index-url": "https://one https://two"}
    assert list(exports(settings, {})) == [
        "export UV_INDEX='https://one https://two'",
        "export UV_FIND_LINKS=/a,/b",
        "export UV_INDEX_STRATEGY=unsafe-best-match",
    ]


def test_a_variable_that_is_set_stays() -> None:
    assert list(exports({"find-links": "/a"}, {"UV_FIND_LINKS": "/mine"})) == []


def test_quotes_in_values_survive_the_shell() -> None:
    assert list(exports({"proxy": "http://me:a$b@proxy"}, {})) == ["export ALL_PROXY='http://me:a$b@proxy'"]
