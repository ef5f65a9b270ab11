"""Write tests/golden/packed from tests/golden/peft: python -m tests.golden.make_packed_files.

Files that were published must stay readable, and the same adapter must keep its bytes.
"""

from __future__ import annotations

from pathlib import Path

from fedlora.adapter import Adapter
from fedlora.formats import load_adapter
from fedlora.formats.codecs import CODECS
from fedlora.formats.packed import encode_packed

FOLDER = Path(__file__).with_name("packed")
ADAPTERS = ("lora", "dora")


def packed_bytes(name: str, codec: str) -> bytes:
    adapter = load_adapter(FOLDER.with_name("peft") / name)
    adapter = Adapter(adapter.layers, adapter.config, base="0" * 64)
    return encode_packed(
        adapter, codec, tokenizer="1" * 64, provenance={"method": "fedit", "ε": 2.5}
    )


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in ADAPTERS:
        for codec in CODECS:
            (FOLDER / f"{name}-{codec}.safetensors").write_bytes(packed_bytes(name, codec))


if __name__ == "__main__":
    main()
