"""A real federation on this host: a server with TLS and devices with keys, then its result.

    python simulations/examples/deploy.py

On real hosts the same steps are `fedlora federation certs`, `key`, `register`, `start-link`,
`start-node` and `submit`: docs/deployment.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import fedlora as fl

folder = Path("federation")
command = [
    *(sys.executable, "-m", "fedlora", "federation", "up"),
    *("--experiment", "watch", "--set", "federation.rounds=2"),
    *("--nodes", "2", "--trainer", "onnx", "--dir", str(folder)),
]
subprocess.run(command, check=True)  # killed at any time: the same with --resume

run = next(folder.rglob("summary.json")).parent
summary = json.loads((run / "summary.json").read_text())
print(f"accuracy: base {summary['base']['mean']:.3f}, personal {summary['personal']['mean']:.3f}")
print("the global adapter:", fl.load_adapter(run / "adapter.safetensors"))
print("each person's own stays on the device:", *sorted(folder.glob("*/state*")))
