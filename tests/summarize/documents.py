"""Makes input files for tests, and reads what became of them."""

import gzip
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import zstandard


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Rows as JSON lines; a row of bytes is written as it is. Compressed by the suffix."""
    content = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compressed(content, path.suffix))
    return path


def compressed(content: bytes, suffix: str) -> bytes:
    """Content in the compression of a suffix."""
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(content)
    return content


def stored_rows(output: Path) -> list[dict[str, Any]]:
    """The rows in the store beside an output, as they are at this moment."""
    path = output.with_name(f"{output.name}.db")
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as store:
        try:
            return [json.loads(row) for (row,) in store.execute("SELECT row FROM rows ORDER BY number")]
        except sqlite3.OperationalError:
            # Killed before there were any.
            return []


def pdf(pages: list[str]) -> bytes:
    """A PDF with one line of text on each page."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET" if text else ""
        resources = "/Resources << /Font << /F1 3 0 R >> >> /MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {resources} /Contents {5 + 2 * number} 0 R >>")
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n".encode()
    start = len(content)
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    content += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    return content + f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{start}\n%%EOF\n".encode()
