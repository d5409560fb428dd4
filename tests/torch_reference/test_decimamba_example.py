"""examples/decimamba.py, and that all of this runs where there is no vLLM."""

import json
import subprocess
import sys
from pathlib import Path

from example_modules import EXAMPLES


def test_the_example_within_the_training_length(tmp_path: Path) -> None:
    # 256 tokens: LongMamba filters nothing, and DeciMamba keeps all; a block of vLLM stands for its absence.
    script = str(EXAMPLES / "decimamba.py")
    code = (
        "import runpy, sys; sys.modules['vllm'] = None; "
        f"sys.argv[1:] = ['--lengths', '256', '--output', {str(tmp_path / 'report.json')!r}, "
        """'--settings', '{"layers": [3, 5], "L_base": 512}']; """
        f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path({script!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["found"]) == {"plain", "LongMamba", "DeciMamba"}
    shares = [row["256"] for row in report["found"].values()]
    # The model finds nearly all keys at this length.
    assert shares == [shares[0]] * 3
    assert shares[0] >= 0.75
    assert report["decimamba"]["layers"] == [3, 5]
