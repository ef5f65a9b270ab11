"""Write the folders in tests/golden/peft with PEFT itself: python -m tests.golden.make_peft_files.

The files are committed, so that reading them is tested where PEFT and torch are not installed, and
so that a change of PEFT's format shows as a difference. `outputs.json` beside each adapter holds
the base's weights after PEFT merged the adapter, minus those before; for DoRA, the magnitudes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

FOLDER = Path(__file__).with_name("peft")
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["fc", "embed", "conv1", "conv2"]},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "target_modules": r"fc|conv\d",
        "rank_pattern": {"conv1": 1},
        "alpha_pattern": {r"^conv\d": 5},
    },
    "dora": {"target_modules": ["fc", "conv2"], "use_dora": True},
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv1 = nn.Conv1d(4, 3, 2)
        self.conv2 = nn.Conv2d(1, 2, (2, 1))
        self.fc = nn.Linear(3, 4)


def main() -> None:
    warnings.simplefilter("ignore")
    for number, (name, arguments) in enumerate(CASES.items()):
        torch.manual_seed(number)
        base = Small()
        before = {key: value.clone() for key, value in base.state_dict().items()}
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, **arguments))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key and "magnitude" not in key:
                    parameter.copy_(torch.randn(parameter.shape).mul(16).round() / 32)
        model.save_pretrained(str(FOLDER / name), safe_serialization=True)
        (FOLDER / name / "README.md").unlink()
        config_path = FOLDER / name / "adapter_config.json"
        config = json.loads(config_path.read_text())
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # PEFT writes a set, in any order
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True))
        magnitudes = {
            key.removeprefix("base_model.model.").split(".")[0]: parameter.flatten().tolist()
            for key, parameter in model.named_parameters()
            if "magnitude" in key
        }
        after = model.merge_and_unload().state_dict()
        deltas = {
            key.removesuffix(".weight"): (after[key] - before[key]).tolist()
            for key in sorted(after)
            if not torch.equal(after[key], before[key])
        }
        outputs = {"magnitudes": magnitudes} if magnitudes else {"deltas": deltas}
        (FOLDER / name / "outputs.json").write_text(json.dumps(outputs, indent=1))


if __name__ == "__main__":
    main()
