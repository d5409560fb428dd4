"""The authors' released files become a table that filters as they say."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from released_files import THOUSANDS, write_release
from tiny_models import write_hf_twin, write_jamba, write_mamba1_original, write_mamba2_original
from typer.testing import CliRunner

from vllm_longmamba.calibration.released_files import METHOD, ReleaseSettings, import_table, read_release
from vllm_longmamba.checkpoint.fingerprint import weights_fingerprint
from vllm_longmamba.checkpoint.shapes import ModelFiles
from vllm_longmamba.checkpoint.table_lookup import Weights
from vllm_longmamba.cli import app
from vllm_longmamba.tables import load_table, save_table

NHEADS, LAYERS = 8, 3


def model_files(folder: Path, architecture: str = "Mamba2ForCausalLM", model_type: str = "mamba2") -> ModelFiles:
    """A checkpoint as `open_model` finds it, without vLLM."""
    config = SimpleNamespace(
        architectures=[architecture], hf_text_config=SimpleNamespace(model_type=model_type, vocab_size=50280)
    )
    files = [str(path) for path in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]]
    return ModelFiles(str(folder), config, Weights(folder, files))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return model_files(write_mamba2_original(tmp_path_factory.mktemp("models") / "tiny", n_layer=LAYERS))


@pytest.fixture
def release(tmp_path: Path) -> Path:
    write_release(tmp_path / "released", [NHEADS] * LAYERS)
    return tmp_path / "released"


def test_table_holds_what_the_files_hold(model: ModelFiles, tmp_path: Path) -> None:
    written = write_release(tmp_path / "longmamba-max", [NHEADS] * LAYERS)
    table = import_table(tmp_path / "longmamba-max", model)
    save_table(table, tmp_path / "table")
    table = load_table(tmp_path / "table")

    # 2048 tokens are a Mamba-2's training length: "1k" and "2k" are not longer.
    kept = [k for k in THOUSANDS if k > 2]
    assert table.row_lengths.tolist() == [2048, *(1000 * k for k in kept)]
    assert sorted(table.layers) == [0, 1, 2]
    for layer, (retention, thresholds) in enumerate(written):
        assert torch.equal(table.layers[layer].retention, retention.double())
        assert (table.layers[layer].dt_threshold[0] == -1).all()
        for row, k in enumerate(kept, start=1):
            assert torch.equal(table.layers[layer].dt_threshold[row], thresholds[f"{k}k"])
        assert torch.equal(table.is_global(layer, 1e-5), retention.double() > 1e-5)
    assert [table.row_of(length) for length in (2048, 2524, 2525, 3499, 3501, 10**6)] == [0, 0, 1, 1, 2, len(kept)]

    metadata = table.metadata
    assert metadata.weights_fingerprint == weights_fingerprint([str(Path(model.name) / "pytorch_model.bin")])
    assert (metadata.model_id, metadata.train_length, metadata.method) == ("tiny", 2048, METHOD)
    assert (metadata.clamp_percent, metadata.min_retention, metadata.num_sequences) == (5.0, 1e-2, 5)
    assert metadata.corpus.startswith("files released by the authors, longmamba-max (blake3 ")


def test_settings(model: ModelFiles, release: Path) -> None:
    settings = ReleaseSettings(train_length=4096, min_retention=1e-20, clamp_percent=10.0, num_sequences=100)
    table = import_table(release, model, settings)
    assert table.row_lengths[:2].tolist() == [4096, 5000]
    metadata = table.metadata
    assert (metadata.min_retention, metadata.clamp_percent, metadata.num_sequences) == (1e-20, 10.0, 100)


def test_mamba1_has_d_inner_channels(tmp_path: Path) -> None:
    folder = write_mamba1_original(tmp_path / "model", n_layer=2, safetensors=True)
    write_release(tmp_path / "released", [128, 128])
    table = import_table(tmp_path / "released", model_files(folder, "MambaForCausalLM", "mamba"))
    assert table.layers[1].retention.shape == (128,)
    assert table.metadata.clamp_percent == 20.0


def test_files_count_mamba_layers_only(tmp_path: Path) -> None:
    folder = write_jamba(tmp_path / "model")
    written = write_release(tmp_path / "released", [128] * 3)
    files = model_files(folder, "JambaForCausalLM", "jamba")
    table = import_table(tmp_path / "released", files, ReleaseSettings(train_length=2048))
    assert sorted(table.layers) == [0, 2, 3]
    assert torch.equal(table.layers[2].retention, written[1][0].double())


def test_channels_of_either_format(model: ModelFiles, tmp_path: Path) -> None:
    twin = write_hf_twin(Path(model.name), tmp_path / "twin")
    save_table(import_table_of(model, tmp_path), twin / "longmamba.safetensors")
    assert model.channels() == model_files(twin).channels() == {0: NHEADS, 1: NHEADS, 2: NHEADS}
    with pytest.raises(ValueError, match="hold no Mamba layer"):
        replace(model, weights=Weights(None, [])).channels()


def import_table_of(model: ModelFiles, tmp_path: Path) -> Any:
    write_release(tmp_path / "of_model", [NHEADS] * LAYERS)
    return import_table(tmp_path / "of_model", model)


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """A function that replaces what a file of a release holds."""

    def run(folder: Path) -> None:
        torch.save(change(torch.load(folder / file)), folder / file)

    return run


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("run by unpickling",))


RETENTION, THRESHOLD = "tA_prod/tA_prod_layer_1.pt", "delta_t-thre/delta_t-thre_layer_1.pt"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("tA_prod"), r"tA_prod: there must be files tA_prod_layer_0.pt.*name the folder that holds"),
        (remove(RETENTION), r"layers \[1\] are in only one of tA_prod and delta_t-thre"),
        (
            lambda folder: [remove(file)(folder) for file in (RETENTION, THRESHOLD)],
            r"the files of layers \[1\] are missing",
        ),
        (
            lambda folder: [remove(file.replace("1", "2"))(folder) for file in (RETENTION, THRESHOLD)],
            r"holds 2 layers, but .* has 3 Mamba layers; the files were made for another model",
        ),
        (edit(THRESHOLD, lambda d: d | {"long": d["3k"]}), r"keys must be prompt lengths such as \"3k\".*'long'"),
        (edit(THRESHOLD, lambda d: d | {3000: d["3k"]}), r"keys must be prompt lengths .* but one is 3000"),
        (edit(THRESHOLD, lambda d: {k: v for k, v in d.items() if k != "5k"}), r"but layer 0 for .*5000"),
        (edit(THRESHOLD, lambda d: d | {"5k": d["5k"][:-1]}), r"'5k' has 7 channels, but tA_prod_layer_1.pt has 8"),
        (edit(THRESHOLD, lambda d: d | {"5k": -d["5k"]}), r"'5k' must lie between 0 and inf"),
        (edit(THRESHOLD, lambda d: d | {"5k": d["5k"] / 0}), r"'5k' must lie between 0 and inf, got NaN"),
        (
            edit(THRESHOLD, lambda d: d | {"5k": d["5k"].tolist()}),
            r"'5k' must be a floating \(channels,\) .* got a list",
        ),
        (edit(THRESHOLD, lambda d: d["5k"]), r"must hold a dict of tensors, but holds a Tensor"),
        (edit(THRESHOLD, lambda d: {}), r"must hold a dict of tensors"),
        (edit(RETENTION, lambda t: t[None]), r"the file must be a floating \(channels,\) tensor.* \(1, 8\)"),
        (edit(RETENTION, lambda t: t.log()), r"the file must lie between 0 and 1.0"),
        (edit(RETENTION, lambda t: {"retention": t}), r"the file must be a floating .* got a dict"),
        (edit(RETENTION, lambda t: Malicious()), r"cannot be read as tensors .*nothing but tensors are accepted"),
        (write(RETENTION, b""), r"cannot be read as tensors"),
        (write(RETENTION, b"no pickle at all"), r"cannot be read as tensors"),
        (write(THRESHOLD, b"PK\x03\x04 a torn zip"), r"delta_t-thre_layer_1.pt: cannot be read as tensors"),
    ],
)
def test_refusals(damage: Callable[[Path], Any], message: str, model: ModelFiles, release: Path) -> None:
    damage(release)
    with pytest.raises(ValueError, match=message):
        import_table(release, model)


def test_nothing_of_a_pickle_is_run(model: ModelFiles, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(Malicious(), release / RETENTION)
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_release(release)
    assert capsys.readouterr().out == ""


def test_other_channels(model: ModelFiles, tmp_path: Path) -> None:
    write_release(tmp_path / "released", [NHEADS, NHEADS, 24])
    with pytest.raises(ValueError, match=r"has 24 channels where layer 2 of .* has 8; .*another model"):
        import_table(tmp_path / "released", model)


def test_nothing_longer_than_the_training_length(model: ModelFiles, release: Path) -> None:
    with pytest.raises(ValueError, match=r"longest thresholds are for 192000 tokens.*200000"):
        import_table(release, model, ReleaseSettings(train_length=200_000))


def test_command(model: ModelFiles, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = ["import-table", str(release), "--model", model.name, "--train-length", "2048"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "cache" / "vllm_longmamba").iterdir()
    assert load_table(path).digest() == import_table(release, model).digest()
    # In the cache, under the name by which the server looks for it.
    assert path.stem == model.weights.fingerprint[:32]

    result = CliRunner().invoke(app, [*command, "--output", str(tmp_path / "table"), "--min-retention", "1e-20"])
    assert result.exit_code == 0, result.output
    assert load_table(tmp_path / "table").metadata.min_retention == 1e-20

    remove(THRESHOLD)(release)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "layers [1] are in only one of tA_prod and delta_t-thre" in " ".join(result.output.split())
