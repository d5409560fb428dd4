"""How far back a model looks, plain and filtered: receptive fields of global channels at two lengths.

    python benchmarks/evidence_inspect.py MODEL --text BOOK --train-length 2048

The measurement of `longmamba inspect`, with the table that an engine makes at its start. Writes a picture into
docs/pictures, and the figures among the records of evidence.py. A model of 36M parameters takes minutes on a CPU.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from results_page import RESULTS, ROOT, add_records

from vllm_longmamba.calibration.offline import calibrate
from vllm_longmamba.calibration.settings import CalibrationSettings
from vllm_longmamba.evaluate.store import settings_key
from vllm_longmamba.inspect.measure import choose_channels, measure
from vllm_longmamba.inspect.pictures import receptive_field_picture
from vllm_longmamba.inspect.summary import kept_by_layer
from vllm_longmamba.tables import save_table


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="one book, .txt")
    parser.add_argument("--train-length", type=int, default=2048, help="[%(default)s]")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384], help="[%(default)s]")
    options = parser.parse_args()
    folder, name = str(options.model), options.model.name
    table = calibrate(folder, CalibrationSettings(train_length=options.train_length))
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "table.safetensors"
        save_table(table, path)
        measured = measure(folder, table, path, options.text, options.lengths, choose_channels(table))
        picture = ROOT / "docs" / "pictures" / f"evidence-receptive-{name}.png"
        receptive_field_picture(table, measured).savefig(picture, dpi=80, metadata={"Software": None})
        record = {
            "key": settings_key({"inspect": name, "text": measured.text}),
            "model": name,
            "text": measured.text,
            "global": [table.count_global(), sum(len(layer.retention) for layer in table.layers.values())],
            "distance": {
                method: {length: float(np.mean([layer.distance for layer in layers.values()])) for length, layers in of}
                for method, of in (("plain", measured.plain.items()), ("default", measured.filtered.items()))
            },
            "kept": {
                length: float(np.mean(list(kept_by_layer(table, measured, length).values())))
                for length in measured.filtered
            },
        }
        lines = Path(temporary) / "record.jsonl"
        lines.write_text(json.dumps(record) + "\n")
        add_records(lines, RESULTS / "evidence")
    print(f"written: {picture}")


if __name__ == "__main__":
    main()
