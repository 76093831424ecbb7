"""Short names for well-known models: what `cluster models` prints and `cluster serve NAME` accepts.

Covers names and facts for a person. Everything that serving relies on comes from the checkpoint itself
(`cluster.hub.resolve`), so an entry that ages misleads nobody's arithmetic.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from cluster.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model that has a short name."""

    alias: str
    repo_id: str  # on the hub; empty: ships inside this package
    architecture: str  # config.json's model_type
    num_parameters: int  # tied heads counted once
    licence: str
    is_gated: bool = False  # the hub asks to log in and to accept the licence first


_RAIL = "BigScience RAIL 1.0"
_APACHE = "Apache-2.0"
_APACHE_CONTACT = "Apache-2.0; the hub may ask for contact details"

CATALOGUE = (
    CatalogueEntry("bloom-tiny", "", "bloom", 5_788_160, "CC0-1.0"),
    CatalogueEntry("bloom-176b", "bigscience/bloom", "bloom", 176_247_271_424, _RAIL),
    CatalogueEntry("bloom-7b1", "bigscience/bloom-7b1", "bloom", 7_069_016_064, _RAIL),
    CatalogueEntry("bloom-3b", "bigscience/bloom-3b", "bloom", 3_002_557_440, _RAIL),
    CatalogueEntry("bloom-1b7", "bigscience/bloom-1b7", "bloom", 1_722_408_960, _RAIL),
    CatalogueEntry("bloom-1b1", "bigscience/bloom-1b1", "bloom", 1_065_314_304, _RAIL),
    CatalogueEntry("bloom-560m", "bigscience/bloom-560m", "bloom", 559_214_592, _RAIL),
    CatalogueEntry("bloomz", "bigscience/bloomz", "bloom", 176_247_271_424, _RAIL),
    CatalogueEntry("bloomz-7b1", "bigscience/bloomz-7b1", "bloom", 7_069_016_064, _RAIL),
    CatalogueEntry("bloomz-3b", "bigscience/bloomz-3b", "bloom", 3_002_557_440, _RAIL),
    CatalogueEntry("bloomz-1b7", "bigscience/bloomz-1b7", "bloom", 1_722_408_960, _RAIL),
    CatalogueEntry("bloomz-1b1", "bigscience/bloomz-1b1", "bloom", 1_065_314_304, _RAIL),
    CatalogueEntry("bloomz-560m", "bigscience/bloomz-560m", "bloom", 559_214_592, _RAIL),
    CatalogueEntry("llama-3.1-405b", "meta-llama/Llama-3.1-405B-Instruct", "llama", 405_853_388_800, "Llama 3.1", True),
    CatalogueEntry("llama-3.3-70b", "meta-llama/Llama-3.3-70B-Instruct", "llama", 70_553_706_496, "Llama 3.3", True),
    CatalogueEntry("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct", "llama", 8_030_261_248, "Llama 3.1", True),
    CatalogueEntry("llama-3.2-3b", "meta-llama/Llama-3.2-3B-Instruct", "llama", 3_212_749_824, "Llama 3.2", True),
    CatalogueEntry("llama-3.2-1b", "meta-llama/Llama-3.2-1B-Instruct", "llama", 1_235_814_400, "Llama 3.2", True),
    CatalogueEntry("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", 1_100_048_384, _APACHE),
    CatalogueEntry("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", 1_711_376_384, _APACHE),
    CatalogueEntry("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 134_515_008, _APACHE),
    CatalogueEntry("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.3", "mistral", 7_248_023_552, _APACHE_CONTACT),
    CatalogueEntry(
        "mixtral-8x22b", "mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral", 140_630_071_296, _APACHE_CONTACT
    ),
    CatalogueEntry("mixtral-8x7b", "mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral", 46_702_792_704, _APACHE_CONTACT),
    CatalogueEntry("qwen2.5-72b", "Qwen/Qwen2.5-72B-Instruct", "qwen2", 72_706_203_648, "Qwen"),
    CatalogueEntry("qwen2.5-32b", "Qwen/Qwen2.5-32B-Instruct", "qwen2", 32_763_876_352, _APACHE),
    CatalogueEntry("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "qwen2", 7_615_616_512, _APACHE),
    CatalogueEntry("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "qwen2", 494_032_768, _APACHE),
    CatalogueEntry("qwen3-32b", "Qwen/Qwen3-32B", "qwen3", 32_762_123_264, _APACHE),
    CatalogueEntry("qwen3-8b", "Qwen/Qwen3-8B", "qwen3", 8_190_735_360, _APACHE),
    CatalogueEntry("qwen3-0.6b", "Qwen/Qwen3-0.6B", "qwen3", 596_049_920, _APACHE),
    CatalogueEntry("phi-4", "microsoft/phi-4", "phi3", 14_659_507_200, "MIT"),
    CatalogueEntry("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", "phi3", 3_821_079_552, "MIT"),
    CatalogueEntry("gpt2-xl", "openai-community/gpt2-xl", "gpt2", 1_557_611_200, "MIT"),
    CatalogueEntry("gpt2", "openai-community/gpt2", "gpt2", 124_439_808, "MIT"),
    CatalogueEntry("gpt-neox-20b", "EleutherAI/gpt-neox-20b", "gpt_neox", 20_554_567_680, _APACHE),
    CatalogueEntry("pythia-12b", "EleutherAI/pythia-12b", "gpt_neox", 11_846_072_320, _APACHE),
    CatalogueEntry("pythia-410m", "EleutherAI/pythia-410m", "gpt_neox", 405_334_016, _APACHE),
)


def find_entry(alias: str) -> CatalogueEntry | None:
    """Return the entry of a short name, whatever its case."""
    return next((entry for entry in CATALOGUE if entry.alias == alias.lower()), None)


def shipped_folder(alias: str) -> Path:
    """Return the checkpoint folder of a model that ships inside this package."""
    return Path(str(resources.files("cluster.models") / alias))


def unknown_model(name: str) -> NotFoundError:
    """Return the error for a name that nothing answers to, with the names that it may have meant."""
    close = difflib.get_close_matches(name.lower(), [entry.alias for entry in CATALOGUE], n=3)
    meant = f" (did you mean {' or '.join(close)}?)" if close else ""
    return NotFoundError(
        f"there is no model {name!r}{meant}: give a name that `cluster models` lists, a hub id like "
        f"bigscience/bloom-560m, or a folder with a config.json",
        reason="UNKNOWN_MODEL",
    )
