"""How far tables agree, against plain numpy on the tables' own numbers."""

import numpy as np
import pytest
import torch
from small_tables import small_table

from vllm_longmamba.tables import LayerThresholds, ThresholdTable, table_stability


def tables(count: int = 4) -> list[ThresholdTable]:
    """Tables of two layers, 3 channels and 4 rows, whose numbers differ."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        layers = {}
        for layer in (0, 3):
            thresholds = torch.from_numpy(rng.uniform(0.1, 1.0, (4, 3)).astype(np.float32))
            thresholds[0] = -1.0
            retention = torch.from_numpy(np.array([0.5, 1e-9, 10 ** rng.uniform(-3, -1)]))
            layers[layer] = LayerThresholds(retention, thresholds)
        table = small_table()
        made.append(ThresholdTable(metadata=table.metadata, row_lengths=table.row_lengths, layers=layers))
    return made


def test_table_stability() -> None:
    made = tables()
    found = table_stability(made)
    assert list(found) == [0, 3]
    for index, layer in found.items():
        thresholds = np.stack([table.layers[index].dt_threshold.numpy() for table in made]).astype(np.float64)
        retention = np.stack([table.layers[index].retention.numpy() for table in made])
        np.testing.assert_allclose(layer.threshold_mean, thresholds.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(layer.threshold_std, thresholds.std(axis=0, ddof=1), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(layer.retention_mean, retention.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(layer.retention_std, retention.std(axis=0, ddof=1), rtol=1e-9, atol=1e-15)
        is_global = retention > 1e-2
        assert layer.global_channels.tolist() == is_global.sum(axis=1).tolist()
        # Channel 0 is always global, channel 1 never, channel 2 in some tables.
        assert layer.ever_global.tolist() == [True, False, bool(is_global[:, 2].any())]
        assert layer.undecided == int(is_global[:, 2].any() and not is_global[:, 2].all())
        used = [0, 2] if is_global[:, 2].any() else [0]
        expected = thresholds.std(axis=0, ddof=1)[1:, used] / thresholds.mean(axis=0)[1:, used]
        np.testing.assert_allclose(layer.relative_std, expected, rtol=1e-9)
    assert any(layer.undecided for layer in found.values())


def test_table_stability_takes_another_min_retention() -> None:
    found = table_stability(tables(), min_retention=0.4)
    assert [layer.global_channels.tolist() for layer in found.values()] == [[1] * 4] * 2


def test_table_stability_refuses() -> None:
    with pytest.raises(ValueError, match="needs two tables or more, got 1"):
        table_stability(tables(1))
    with pytest.raises(ValueError, match="the same layers and rows"):
        table_stability([small_table(), small_table(layers=(0, 2))])
    with pytest.raises(ValueError, match="the same layers and rows"):
        table_stability([small_table(), small_table(train_length=9)])
