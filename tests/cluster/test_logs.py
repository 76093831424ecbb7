import json
import logging

import pytest

from cluster import logs
from cluster.logs import LogLine, configure_logging, read_line


@pytest.fixture(autouse=True)
def _root_logger_as_before():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.mark.parametrize("is_json", [False, True])
def test_a_written_record_is_read_back(tmp_path, is_json):
    path = configure_logging(tmp_path / "new", "stage-1", json=is_json)
    logging.getLogger("worker.relay").warning("step %d is lost", 7, extra={"request_id": "r1", "stage": 1})
    line = read_line(path.read_text())
    assert path.name == "stage-1.log"
    assert line is not None
    assert (line.level, line.logger, line.message) == ("WARNING", "worker.relay", "step 7 is lost")
    assert (line.request_id, line.stage) == ("r1", "1")


def test_json_is_one_object_per_line_even_with_a_traceback(tmp_path):
    path = configure_logging(tmp_path, "coordinator", json=True)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("it went wrong")
    (line,) = path.read_text().splitlines()
    assert "ValueError: broken" in json.loads(line)["message"]


def test_level_is_respected(tmp_path):
    path = configure_logging(tmp_path, "coordinator", level="warning")
    logging.getLogger("x").info("nothing")
    assert path.read_text() == ""


def test_no_directory_means_the_state_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert configure_logging("", "a") == tmp_path / "spanwise" / "logs" / "a.log"


def test_setting_up_again_replaces_the_file(tmp_path):
    first = configure_logging(tmp_path, "a")
    second = configure_logging(tmp_path, "b")
    logging.getLogger("x").info("once")
    assert first.read_text() == ""
    assert second.read_text().count("once") == 1


def test_files_are_rotated_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 200)
    configure_logging(tmp_path, "a")
    for number in range(100):
        logging.getLogger("x").info("record %d", number)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a.log", *(f"a.log.{number}" for number in range(1, logs.NUM_OLD_FILES + 1))]
    assert all(path.stat().st_size <= 200 for path in tmp_path.iterdir())


@pytest.mark.parametrize("text", ["Traceback (most recent call last):", "", '{"no": "record"}', "{broken"])
def test_other_lines_are_no_records(text):
    assert read_line(text) is None


def test_message_may_look_like_anything():
    line = LogLine("2026-01-01T00:00:00.000+00:00", "INFO", "a.b", "x [y=z]: 50% {ok}", request_id="r")
    assert read_line(line.as_text()) == line
    assert read_line(line.as_json()) == line
