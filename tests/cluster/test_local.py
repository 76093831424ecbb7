"""The Python API for one machine, over the embedded model."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.catalogue import shipped_folder
from cluster.errors import ConfigurationError, InvalidRequestError, NotFoundError
from cluster.local import LocalModel

PROMPT = "The state of the union"
GREEDY = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Iterator[LocalModel]:
    with LocalModel.from_pretrained("bloom-tiny", precision="fp32", memory="3GiB", threads=1) as loaded:
        yield loaded


def expected(token_ids: tuple[int, ...]) -> list[int]:
    reference = AutoModelForCausalLM.from_pretrained(shipped_folder("bloom-tiny"), dtype=torch.float32)
    out = reference.generate(torch.tensor([token_ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return out[0, len(token_ids) :].tolist()


def test_it_writes_what_transformers_writes(model: LocalModel) -> None:
    token_ids = model.tokenize(PROMPT)
    completion = model.generate(PROMPT, **GREEDY)
    assert list(completion.token_ids) == expected(token_ids)
    assert completion.text == model.detokenize(completion.token_ids)


def test_token_ids_may_come_as_a_tensor(model: LocalModel) -> None:
    token_ids = torch.tensor([model.tokenize(PROMPT)])
    assert model.generate(token_ids, **GREEDY).token_ids == model.generate(PROMPT, **GREEDY).token_ids


def test_many_prompts_come_back_in_their_order(model: LocalModel) -> None:
    prompts = [PROMPT, "We must", "Congress"]
    together = [completion.token_ids for completion in model.generate_many(prompts, **GREEDY)]
    assert together == [model.generate(prompt, **GREEDY).token_ids for prompt in prompts]


def test_pieces_are_streamed(model: LocalModel) -> None:
    text = "".join(piece.text for piece in model.stream(PROMPT, **GREEDY))
    assert text == model.generate(PROMPT, **GREEDY).text


def test_closing_ends_every_thread_and_the_progress_was_told() -> None:
    before = set(threading.enumerate())
    states = []
    loaded = LocalModel.from_pretrained(
        "bloom-tiny", memory="3GiB", threads=1, on_status=lambda status: states.append(status.state)
    )
    loaded.close()
    loaded.close()
    assert states[-1] == "ready"
    left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("spanwise", "compute"))]
    assert not left


def test_what_is_wrong_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(NotFoundError):
        LocalModel.from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ConfigurationError, match="precision"):
        LocalModel.from_pretrained("bloom-tiny", precision="int3")
    with pytest.raises(ConfigurationError, match="1 MiB"):
        LocalModel.from_pretrained("bloom-tiny", memory="1MiB", threads=1)
    assert threading.active_count() <= before + 1


def test_a_script_that_closes_nothing_ends_in_peace() -> None:
    script = f"""
from cluster.local import LocalModel
model = LocalModel.from_pretrained("bloom-tiny", precision="fp32", memory="3GiB", threads=1)
stream = model.stream({PROMPT!r}, max_tokens=1000, ignore_eos=True)
print(len(next(stream).token_ids))
"""
    quiet = {**os.environ, "GRPC_VERBOSITY": "NONE", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=quiet, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_model_that_nothing_refers_to_ends_its_threads() -> None:
    before = set(threading.enumerate())
    loaded = LocalModel.from_pretrained("bloom-tiny", precision="fp32", memory="3GiB", threads=1)
    stream = loaded.stream(PROMPT, **GREEDY)
    del loaded
    gc.collect()
    assert next(stream).token_ids  # a stream keeps its model
    ours = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("spanwise", "compute"))]
    del stream
    gc.collect()
    for thread in ours:
        thread.join(30)
    assert ours
    assert not any(thread.is_alive() for thread in ours)


def test_ctrl_c_while_it_loads_is_told_at_once_and_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_over = threading.Event()

    def resolve(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        is_over.wait(60)

    monkeypatch.setattr("cluster.local.resolve", resolve)
    before = set(threading.enumerate())
    with caplog.at_level(logging.WARNING):
        with pytest.raises(KeyboardInterrupt):
            LocalModel.from_pretrained("bloom-tiny", memory="3GiB", threads=1)
        assert not is_over.is_set()
        is_over.set()
        gc.collect()
    assert not caplog.records
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "spanwise-local"]


def test_more_prompts_than_are_taken_at_once_are_all_answered(model: LocalModel) -> None:
    assert len(model.generate_many([[5]] * 1100, temperature=0.0, max_tokens=1)) == 1100


def test_rows_of_a_tensor_are_several_prompts(model: LocalModel) -> None:
    row = list(model.tokenize(PROMPT))
    both = torch.tensor([row, row])
    assert len({completion.token_ids for completion in model.generate_many(both, **GREEDY)}) == 1
    with pytest.raises(InvalidRequestError, match="2 rows: give several prompts to generate_many"):
        model.generate(both)
    with pytest.raises(InvalidRequestError, match="give a list of them, or use generate"):
        model.generate_many(PROMPT)


@pytest.mark.parametrize("prompt", [torch.tensor(5), torch.zeros((1, 1, 3), dtype=torch.long), torch.tensor([1.5])])
def test_what_is_not_token_ids_is_refused(model: LocalModel, prompt: torch.Tensor) -> None:
    with pytest.raises(InvalidRequestError, match=r"must have the shape|must be whole numbers"):
        model.generate(prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 2}, "workers is a setting of `cluster serve`"),
        ({"port": 7050}, "port is a setting of `cluster serve`"),
        ({"device_map": "auto"}, "LocalModel has the unknown setting 'device_map'"),
        ({"threads": "two"}, "threads must be a whole number, not 'two'"),
        ({"kv_memory": "much"}, "kv_memory must be a size like 12GiB"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LocalModel.from_pretrained("bloom-tiny", **settings)


def test_sizes_may_be_text_and_folders_paths(tmp_path: Path) -> None:
    with LocalModel.from_pretrained(
        shipped_folder("bloom-tiny"),
        precision="int8",
        memory=float(3 << 30),
        threads=1,
        kv_memory="16MiB",
        store_dir=tmp_path,
        revision=None,
    ) as loaded:
        assert loaded.generate(PROMPT, stop=None, **GREEDY).token_ids
    assert any(tmp_path.iterdir())
