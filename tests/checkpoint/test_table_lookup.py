"""Tests of vllm_longmamba/checkpoint/table_lookup.py."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_tables import write_small_table
from tiny_models import write_mamba2_original

import vllm_longmamba.tables.shipped as shipped
from vllm_longmamba.checkpoint.fingerprint import DUMMY, weights_fingerprint
from vllm_longmamba.checkpoint.table_lookup import (
    FILE_NAME,
    Weights,
    cache_folder,
    cached_table_path,
    find_table,
    locate_weights,
    search_table,
    weight_patterns,
)
from vllm_longmamba.options import LongMambaOptions
from vllm_longmamba.tables import TableError

PLACES = ["option", "beside", "shipped", "cache"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_mamba2_original(tmp_path / "model", n_layer=1, d_model=16, tokenizer=False)


@pytest.fixture
def weights(model: Path) -> Weights:
    return Weights(model, [str(model / "pytorch_model.bin")])


@pytest.fixture
def place(model: Path, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Function: name of a place -> path of the table there; nothing outside tmp_path is looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "__path__", [str(tmp_path / "shipped")])
    paths = {
        "option": tmp_path / "elsewhere" / "mine.safetensors",
        "beside": model / FILE_NAME,
        "shipped": tmp_path / "shipped" / "some-model.safetensors",
        "cache": tmp_path / "cache" / "vllm_longmamba" / f"{weights.fingerprint[:32]}.safetensors",
    }
    return paths.__getitem__


def options_for(name: str, path: Path) -> LongMambaOptions:
    return LongMambaOptions(table=str(path)) if name == "option" else LongMambaOptions()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vllm_longmamba")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/ada")
    assert cache_folder() == Path("/home/ada/.cache/vllm_longmamba")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ValueError, match="this user has no home; set HOME or XDG_CACHE_HOME"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/vllm_longmamba")


def test_cached_table_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cached_table_path("ab" * 32) == Path("/somewhere/vllm_longmamba") / f"{'ab' * 16}.safetensors"


@pytest.mark.parametrize("first", range(len(PLACES)), ids=PLACES)
def test_find_table_takes_the_first_place(first: int, place: Callable[[str], Path], weights: Weights) -> None:
    for name in PLACES[first:]:
        write_small_table(place(name), weights_fingerprint=weights.fingerprint)
    wanted = place(PLACES[first])
    assert find_table("org/model", weights, options_for(PLACES[first], wanted)) == wanted


def test_find_table_option_with_home(
    place: Callable[[str], Path], weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place("option")
    write_small_table(path, weights_fingerprint=weights.fingerprint)
    monkeypatch.setenv("HOME", str(path.parent))
    assert find_table("org/model", weights, LongMambaOptions(table=f"~/{path.name}")) == path


def test_find_table_without_any(place: Callable[[str], Path], weights: Weights) -> None:
    with pytest.raises(TableError, match=r"^no threshold table for 'org/model'") as error:
        find_table("org/model", weights, LongMambaOptions())
    message = str(error.value)
    assert str(place("cache").parent) in message
    assert "make one with `longmamba calibrate org/model`" in message
    assert search_table(weights, LongMambaOptions()) is None
    assert """--additional-config '{"longmamba": {"filter": false}}'""" in message


def test_find_table_takes_what_an_engine_made(place: Callable[[str], Path], weights: Weights) -> None:
    """For the tools; an engine looks for the table of its own settings."""
    folder = place("cache").parent
    made = [folder / f"{weights.fingerprint[:32]}-{key}.safetensors" for key in ("aa", "bb", "cc")]
    for path in made:
        write_small_table(path, weights_fingerprint=weights.fingerprint)
    os.utime(made[0], (2_000_000_000, 2_000_000_000))
    made[2].write_bytes(b"broken")
    os.utime(made[2], (2_100_000_000, 2_100_000_000))
    assert search_table(weights, LongMambaOptions()) is None
    assert find_table("org/model", weights, LongMambaOptions()) == made[0]
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    assert find_table("org/model", weights, LongMambaOptions()) == place("cache")


def test_search_table_passes_a_damaged_table_of_the_cache_over(
    place: Callable[[str], Path], weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine then calibrates itself."""
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    content = place("cache").read_bytes()
    place("cache").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert search_table(weights, LongMambaOptions()) is None
    assert "a table is passed over: threshold table" in caplog.text
    assert "the file is damaged" in caplog.text


def test_search_table_passes_a_cache_over_that_cannot_be_read(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def is_file(path: Path) -> bool:
        if "vllm_longmamba" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return False

    monkeypatch.setenv("XDG_CACHE_HOME", "/root/nobody")
    monkeypatch.setattr(Path, "is_file", is_file)
    assert search_table(weights, LongMambaOptions()) is None
    assert "a table is passed over: [Errno 13] Permission denied: '/root/nobody/vllm_longmamba/" in caplog.text


@pytest.mark.parametrize("writable", ["folder", "file"])
def test_search_table_passes_a_table_over_that_others_may_write(
    writable: str, place: Callable[[str], Path], weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    cached = place("cache")
    for path in (cached, cached.with_stem(cached.stem + "-aa")):
        write_small_table(path, weights_fingerprint=weights.fingerprint)
    assert search_table(weights, LongMambaOptions()) == cached
    cached.parent.chmod(0o777 if writable == "folder" else 0o755)
    for path in cached.parent.iterdir():
        path.chmod(0o644 if writable == "folder" else 0o666)
    assert search_table(weights, LongMambaOptions()) is None
    assert "a table is passed over" in caplog.text
    assert "may be written by others" in caplog.text
    with pytest.raises(TableError, match="no threshold table for 'org/model'"):
        find_table("org/model", weights, LongMambaOptions())


def test_a_shipped_table_may_be_written_by_others(place: Callable[[str], Path], weights: Weights) -> None:
    """Whoever may change the package may change its code."""
    shipped_table = place("shipped")
    write_small_table(shipped_table, weights_fingerprint=weights.fingerprint)
    shipped_table.chmod(0o666)
    shipped_table.parent.chmod(0o777)
    assert search_table(weights, LongMambaOptions()) == shipped_table


def test_search_table_of_a_quantized_model(place: Callable[[str], Path], weights: Weights) -> None:
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    assert search_table(weights, LongMambaOptions(), "fp8") is None
    own = cached_table_path(weights.fingerprint, "fp8")
    assert own.name == f"{weights.fingerprint[:32]}-fp8.safetensors"
    write_small_table(own, weights_fingerprint=weights.fingerprint)
    assert search_table(weights, LongMambaOptions(), "fp8") == own
    assert search_table(weights, LongMambaOptions()) == place("cache")


@pytest.mark.parametrize("name", ["option", "beside"])
def test_find_table_refuses_a_table_of_other_weights(name: str, place: Callable[[str], Path], weights: Weights) -> None:
    write_small_table(place(name), weights_fingerprint="a" * 64)
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    with pytest.raises(TableError, match=r"made for 'org/model' with weights a{12}") as error:
        find_table("org/model", weights, options_for(name, place(name)))
    message = str(error.value)
    assert message.startswith(str(place(name)))
    assert f"the weights to be loaded are {weights.fingerprint[:12]}" in message
    assert "`longmamba calibrate" in message


@pytest.mark.parametrize("name", ["shipped", "cache"])
def test_find_table_passes_over_a_table_of_other_weights(
    name: str, place: Callable[[str], Path], weights: Weights
) -> None:
    write_small_table(place(name), weights_fingerprint="a" * 64)
    with pytest.raises(TableError, match=r"^no threshold table for"):
        find_table("org/model", weights, LongMambaOptions())


@pytest.mark.parametrize("name", ["option", "beside"])
def test_find_table_refuses_a_corrupt_table(name: str, place: Callable[[str], Path], weights: Weights) -> None:
    path = place(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"not a table")
    with pytest.raises(TableError, match=r"no safetensors file, or a truncated one.*`longmamba calibrate") as error:
        find_table("org/model", weights, options_for(name, path))
    assert str(path) in str(error.value)


def test_find_table_refuses_a_missing_option(place: Callable[[str], Path], weights: Weights) -> None:
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    with pytest.raises(TableError, match=r"mine\.safetensors: there is no such file"):
        find_table("org/model", weights, options_for("option", place("option")))


def test_find_table_ignores_a_broken_cache_file(place: Callable[[str], Path], weights: Weights) -> None:
    place("cache").parent.mkdir(parents=True)
    place("cache").write_bytes(b"\x00" * 7)
    with pytest.raises(TableError, match=r"^no threshold table for 'org/model'.*longmamba calibrate"):
        find_table("org/model", weights, LongMambaOptions())


def test_find_table_ignores_a_broken_shipped_file(place: Callable[[str], Path], weights: Weights) -> None:
    write_small_table(place("cache"), weights_fingerprint=weights.fingerprint)
    place("shipped").parent.mkdir()
    place("shipped").write_bytes(b"")
    assert find_table("org/model", weights, LongMambaOptions()) == place("cache")


@pytest.mark.parametrize("name", PLACES)
def test_find_table_compares_the_training_length(name: str, place: Callable[[str], Path], weights: Weights) -> None:
    path = place(name)
    write_small_table(path, weights_fingerprint=weights.fingerprint, train_length=512)
    table = str(path) if name == "option" else None
    assert find_table("org/model", weights, LongMambaOptions(table, train_length=512)) == path
    with pytest.raises(TableError, match=r"training length of 512 tokens, .* train_length says 2048; leave") as error:
        find_table("org/model", weights, LongMambaOptions(table, train_length=2048))
    assert str(error.value).startswith(str(path))


def configs(model: Path, load_format: str = "auto", **load: Any) -> tuple[Any, Any]:
    from vllm.config import LoadConfig

    return SimpleNamespace(model=str(model), revision=None), LoadConfig(load_format=load_format, **load)


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors"])
@pytest.mark.parametrize("table_beside", [False, True], ids=["alone", "table-beside"])
def test_locate_weights_of_safetensors(load_format: str, table_beside: bool, tmp_path: Path) -> None:
    model = write_mamba2_original(tmp_path, n_layer=1, d_model=16, safetensors=True, tokenizer=False)
    expected = weights_fingerprint([str(model / "model.safetensors")])
    if table_beside:
        write_small_table(model / FILE_NAME)
    located = locate_weights(*configs(model, load_format))
    assert (located.folder, located.fingerprint) == (model, expected)


@pytest.mark.parametrize(
    "tables", [[], [FILE_NAME], ["mine.safetensors"], [FILE_NAME, "mine.safetensors"]], ids=["alone", "1", "named", "2"]
)
def test_locate_weights_of_bin(tables: list[str], model: Path) -> None:
    for name in tables:
        write_small_table(model / name)
    located = locate_weights(*configs(model))
    assert located.folder == model
    assert located.fingerprint == weights_fingerprint([str(model / "pytorch_model.bin")])


def test_locate_weights_of_dummy_weights(model: Path) -> None:
    located = locate_weights(*configs(model, "dummy"))
    assert (located.folder, located.fingerprint) == (None, DUMMY)


def test_locate_weights_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Cannot find any model weights .* be \.safetensors or \.bin files"):
        locate_weights(*configs(tmp_path))


@pytest.mark.parametrize("load_format", ["npcache", "tensorizer", "bitsandbytes"])
def test_locate_weights_refuses(load_format: str, model: Path) -> None:
    message = rf"--load-format {load_format} against a threshold table; use auto, safetensors or pt"
    with pytest.raises(ValueError, match=message):
        locate_weights(*configs(model, load_format))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["pytorch_model.bin"], None),
        (["pytorch_model.bin", FILE_NAME], ["*.bin"]),
        (["model.safetensors", FILE_NAME], None),
        (["model.safetensors", "pytorch_model.bin", FILE_NAME], None),
        (["model.safetensors", "pytorch_model.bin"], None),
        ([], None),
    ],
    ids=["bin", "bin-and-table", "safetensors-and-table", "all", "damaged", "none"],
)
def test_weight_patterns(files: list[str], expected: list[str] | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert weight_patterns(SimpleNamespace(model=str(tmp_path), revision=None)) == expected


@pytest.mark.parametrize("has_table", [True, False], ids=["with a table", "without"])
def test_locate_weights_on_the_hub_fetches_the_table(
    has_table: bool, model: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    from vllm.config import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    import vllm_longmamba.checkpoint.table_lookup as table_lookup

    def prepare(
        self: Any, name: str, subfolder: None, revision: str, *args: Any, **kwargs: Any
    ) -> tuple[str, list[str], bool, str]:
        assert (name, revision) == ("org/name", "v1")
        return str(model), [str(model / "pytorch_model.bin")], False, ""

    def download(repo: str, filename: str, **kwargs: Any) -> str:
        assert (repo, filename, kwargs) == ("org/name", FILE_NAME, {"revision": "v1", "cache_dir": "/downloads"})
        if not has_table:
            raise EntryNotFoundError("404")
        write_small_table(model / FILE_NAME, weights_fingerprint=weights.fingerprint)
        return str(model / FILE_NAME)

    monkeypatch.setattr(DefaultModelLoader, "_prepare_weights", prepare)
    monkeypatch.setattr(table_lookup, "weight_patterns", lambda model_config: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    located = locate_weights(SimpleNamespace(model="org/name", revision="v1"), LoadConfig(download_dir="/downloads"))
    assert located.folder == model
    assert (model / FILE_NAME).is_file() is has_table
    assert located.fingerprint == weights.fingerprint
