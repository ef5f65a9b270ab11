"""Which of two methods is better on this data? The same seeds, people and budget for both.

python simulations/examples/compare_methods.py
"""

from fedlora.simulation import compare

comparison = compare(
    "watch",
    {
        "fedit": {"federation.method": "fedit"},
        "half the upload": {"federation.method": "ffa-lora"},
    },
    seeds=2,
    overrides={"federation.rounds": 2, "federation.local_steps": 4},
    only="global",  # leave out what everyone trains for themselves
    progress=lambda stage, done, of, words: print(f"{stage} {done}/{of} {words}"),
)
print((comparison.folder / "comparison.md").read_text())
