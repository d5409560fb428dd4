"""Tests of vllm_longmamba/engine/prefix_cache.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_tables import write_small_table

from vllm_longmamba.engine import patches
from vllm_longmamba.engine.prefix_cache import named_table, next_chunk, salt_request, unfiltered_block_keys
from vllm_longmamba.tables import load_table


def vllm_config(table: Path | None, *, caching: bool = True, connector: bool = False, **options: Any) -> Any:
    given = {"table": str(table) if table is not None else None, **options}
    return SimpleNamespace(
        additional_config={"longmamba": given},
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        kv_transfer_config=SimpleNamespace() if connector else None,
    )


def request_of(length: int, salt: str | None = None) -> Any:
    """The fields of vLLM's `EngineCoreRequest` and `Request` that are read."""
    return SimpleNamespace(
        prompt_token_ids=list(range(length)),
        prompt_embeds=None,
        cache_salt=salt,
        num_prompt_tokens=length,
        num_tokens=length,
        shared_prefix_boundary=0,
        resumable=False,
    )


def salt_of(config: Any, length: int, salt: str | None = None) -> str | None:
    request = request_of(length, salt)
    salt_request(config, request, named_table(config))
    result: str | None = request.cache_salt
    return result


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_small_table(tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


def test_salt_names_table_and_row(table: Path) -> None:
    config = vllm_config(table)
    # Rows of 8, 12, 16 and 20 tokens.
    rows = {length: salt_of(config, length) for length in (1, 8, 11, 13, 15, 20, 500)}
    assert rows[1] == rows[8]
    assert rows[11] == rows[13]
    assert rows[20] == rows[500]
    assert len(set(rows.values())) == 4
    assert [str(rows[length]).split(":")[2:] for length in (8, 11, 15, 20)] == [[row, "0|"] for row in "0123"]


def test_salt_names_the_unfiltered_end(table: Path, tmp_path: Path) -> None:
    write_small_table(tmp_path / "own.safetensors", unfiltered_end=4)
    own = tmp_path / "own.safetensors"
    salts = {
        end: [salt_of(vllm_config(table, unfiltered_end=end), 20), salt_of(vllm_config(own, unfiltered_end=end), 20)]
        for end in (0, 3, 4)
    }
    # The same thresholds and the same end give the same states, whoever says where the end begins.
    assert all(first == second for first, second in salts.values())
    assert len({first for first, _ in salts.values()}) == 3
    assert salt_of(vllm_config(own), 20) == salts[4][0]
    assert salt_of(vllm_config(table), 20) == salts[0][0]
    for end, (salt, _) in salts.items():
        assert str(salt).split(":")[2:] == ["3", f"{end}|"]


def test_salt_differs_between_tables(table: Path, tmp_path: Path) -> None:
    write_small_table(tmp_path / "other.safetensors", channels=4)
    salts = {
        salt_of(vllm_config(table), 20),
        salt_of(vllm_config(tmp_path / "other.safetensors"), 20),
        salt_of(vllm_config(table, min_retention=0.5), 20),
    }
    assert len(salts) == 3
    # The table's own min_retention, written out.
    assert salt_of(vllm_config(table, min_retention=1e-2), 20) in salts


@pytest.mark.parametrize(
    "changes",
    [{"filter": False}, {"caching": False}, {"filter": False, "connector": True}],
    ids=["filter-off", "caching-off", "filter-off-and-connector"],
)
@pytest.mark.parametrize("salt", [None, "mine"])
def test_salt_stays(changes: dict[str, Any], salt: str | None, table: Path) -> None:
    assert salt_of(vllm_config(table, **changes), 20, salt) == salt


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_the_table_is_that_of_the_start(change: str, table: Path) -> None:
    """As in the workers: later, its file may hold another one, or be gone."""
    config = vllm_config(table)
    config.model_config = SimpleNamespace(model_impl="longmamba")
    before = salt_of(config, 20)
    core = SimpleNamespace(vllm_config=config, model_executor=None)
    patches._provide_table(lambda self, vllm_config: None)(core, config)
    table.unlink()
    if change == "replaced":
        write_small_table(table, train_length=100)
    request = request_of(20)
    request.sampling_params = None
    patches._check_request(lambda self, request: None)(core, request)
    assert request.cache_salt == before


def test_salt_reaches_the_cache_of_a_connector(table: Path) -> None:
    salts = {salt_of(vllm_config(table, caching=caching, connector=True), 20) for caching in (False, True)}
    assert salts == {salt_of(vllm_config(table), 20)}


def test_salt_of_the_user_is_kept_apart(table: Path) -> None:
    config = vllm_config(table)
    without = salt_of(config, 20)
    assert without is not None
    foreign = ["mine", "yours", "0", without, salt_of(config, 12), f"{without}mine"]
    salts = [salt_of(config, 20, salt) for salt in foreign]
    assert len({*salts, without}) == len(foreign) + 1
    assert all(str(salted).endswith(f"|{salt}") for salted, salt in zip(salts, foreign, strict=True))


def test_salt_of_a_streamed_prompt_is_its_own(table: Path) -> None:
    """It will be longer, and of another row, when the states behind its first part are cached."""
    config = vllm_config(table)
    salts = {salt_of(config, 8, salt) for salt in (None, "mine")}
    for _ in range(2):
        request = request_of(8)
        request.resumable = True
        salt_request(config, request, load_table(table))
        salts.add(request.cache_salt)
    assert len(salts) == 4


def test_salt_of_a_prompt_of_embeddings(table: Path) -> None:
    request = request_of(0)
    request.prompt_token_ids, request.prompt_embeds = None, torch.zeros(20, 4)
    salt_request(vllm_config(table), request, load_table(table))
    assert request.cache_salt == salt_of(vllm_config(table), 20)


@pytest.mark.parametrize(
    ("length", "salt", "end_token", "expected"),
    [
        (20, "longmamba:0a:3:0|", 16, ()),
        (20, "longmamba:0a:3:0|", 20, ()),
        (20, "longmamba:0a:3:0|", 21, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:3:0|", 32, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:12:0|mine", 32, (("longmamba_prompt_length", 20),)),
        (8, "longmamba:0a:0:0|", 16, ()),
        (8, "longmamba:0a:0:0|longmamba:0a:3:0|", 16, ()),
        (20, "longmamba:0a:3:4|", 15, ()),
        (20, "longmamba:0a:3:4|", 16, ()),
        (20, "longmamba:0a:3:4|", 17, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:3:4|mine", 20, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:3:4|", 32, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:3:16|", 5, (("longmamba_prompt_length", 20),)),
        (20, "longmamba:0a:3:99|", 1, (("longmamba_prompt_length", 20),)),
        (8, "longmamba:0a:0:4|", 8, ()),
        (20, None, 32, ()),
        (20, "mine", 32, ()),
        (20, "mine longmamba:0a:3:0|", 32, ()),
        (20, "longmamba:xy:3:0|", 32, ()),
    ],
    ids=[
        "in-prompt",
        "to-the-end-of-prompt",
        "one-generated-token",
        "generated",
        "with-foreign-salt",
        "row-0",
        "row-0-with-foreign-salt-like-ours",
        "before-the-end",
        "up-to-the-end",
        "one-token-of-the-end",
        "whole-end-with-foreign-salt",
        "generated-behind-an-end",
        "end-of-two-digits",
        "nothing-but-end",
        "row-0-with-an-end",
        "no-salt",
        "foreign-salt",
        "foreign-salt-that-contains-ours",
        "foreign-salt-almost-like-ours",
    ],
)
def test_unfiltered_block_keys(length: int, salt: str | None, end_token: int, expected: tuple[Any, ...]) -> None:
    assert unfiltered_block_keys(request_of(length, salt), end_token) == expected


def test_unfiltered_block_keys_of_a_salted_request(table: Path) -> None:
    request = request_of(20, "longmamba:00:0:0|")
    salt_request(vllm_config(table), request, load_table(table))
    assert unfiltered_block_keys(request, 21) == (("longmamba_prompt_length", 20),)
    request = request_of(8, "longmamba:00:3:0|")
    salt_request(vllm_config(table), request, load_table(table))
    assert unfiltered_block_keys(request, 21) == ()


@pytest.mark.parametrize(
    ("salt", "start", "tokens", "found", "expected", "kept"),
    [
        # 100 tokens, 30 of them unfiltered, in blocks of 16: the last boundary before the end is at 64.
        ("longmamba:0a:3:30|", 0, 100, 0, (64, False), 64),
        ("longmamba:0a:3:30|", 0, 40, 0, (40, False), 64),
        ("longmamba:0a:3:30|", 32, 68, 0, (32, False), 64),
        ("longmamba:0a:3:30|", 64, 36, 0, (36, True), 64),
        ("longmamba:0a:3:30|", 64, 20, 0, (20, False), 64),
        ("longmamba:0a:3:30|", 72, 28, 0, (28, False), 64),
        ("longmamba:0a:3:30|", 100, 1, 0, (1, False), 0),
        ("longmamba:0a:3:30|", 0, 100, 32, (100, False), 32),
        ("longmamba:0a:3:30|", 64, 36, 96, (36, False), 96),
        ("longmamba:0a:3:99|", 0, 100, 0, (100, False), 0),
        ("longmamba:0a:3:0|", 0, 100, 0, (100, False), 0),
        ("longmamba:0a:0:30|", 0, 100, 0, (100, False), 0),
        (None, 0, 100, 0, (100, False), 0),
    ],
    ids=[
        "whole-prompt",
        "part-before",
        "part-across",
        "the-end",
        "part-of-the-end",
        "amid-a-block",
        "generated",
        "vllm-keeps-another",
        "vllm-keeps-one-in-the-end",
        "nothing-but-end",
        "no-end",
        "row-0",
        "not-filtered",
    ],
)
def test_next_chunk(
    salt: str | None, start: int, tokens: int, found: int, expected: tuple[int, bool], kept: int
) -> None:
    request = request_of(100, salt)
    request.shared_prefix_boundary = found
    assert next_chunk(scheduler_of(), request, start, tokens) == expected
    assert request.shared_prefix_boundary == kept


def scheduler_of(**changes: bool) -> Any:
    """The fields of vLLM's `Scheduler` that are read."""
    flags = {"use_eagle_block_drop": False, "mamba_has_prefill_checkpoint_blocks": False} | changes
    return SimpleNamespace(cache_config=SimpleNamespace(block_size=16), **flags)


@pytest.mark.parametrize(
    ("changes", "tokens", "expected"),
    [
        # The state of the block before the last shared one is what attention layers then let be used.
        ({"use_eagle_block_drop": True}, 100, (48, False)),
        # In one step, with a state kept amid it; in several.
        ({"mamba_has_prefill_checkpoint_blocks": True}, 100, (100, False)),
        ({"mamba_has_prefill_checkpoint_blocks": True}, 80, (64, False)),
    ],
)
def test_next_chunk_of_other_schedulers(changes: dict[str, bool], tokens: int, expected: tuple[int, bool]) -> None:
    request = request_of(100, "longmamba:0a:3:30|")
    assert next_chunk(scheduler_of(**changes), request, 0, tokens) == expected


def test_a_resumed_request_is_cut_by_vllm() -> None:
    """It has generated tokens, whose states are kept too."""
    request = request_of(100, "longmamba:0a:3:30|")
    request.num_tokens = 110
    assert next_chunk(scheduler_of(), request, 64, 36) == (36, False)
