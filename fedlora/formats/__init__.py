"""Adapter files: PEFT folders and packed files. NumPy only; nothing that a file says is trusted."""

from fedlora.formats.adapter_files import AdapterFile, load_adapter, read_info, save_adapter

__all__ = ["AdapterFile", "load_adapter", "read_info", "save_adapter"]
