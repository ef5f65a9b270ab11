"""Federate LoRA adapters of your own Hugging Face model, over people's messages.

    python simulations/examples/own_model.py [FOLDER OF THE MODEL]

The folder is what `save_pretrained` writes, with the tokenizer beside it. Without one, a tiny Llama
of random weights takes its place, so that the example runs anywhere.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

from fedlora.experiment import ExperimentConfig
from fedlora.simulation import simulate


def tiny_llama(folder: Path) -> Path:
    """Write a model with fedlora's own tokenizer; yours comes from wherever you trained it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedlora.bases.registry import tokenizer_file
    from fedlora.data.text import load_tokenizer

    tokenizer = tokenizer_file("tiny-chat")
    assert tokenizer is not None
    shape = LlamaConfig(
        vocab_size=load_tokenizer(tokenizer).get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


model = Path(sys.argv[1]) if len(sys.argv) > 1 else tiny_llama(Path(mkdtemp()))
experiment = ExperimentConfig.from_table(
    {
        "name": "own-model",
        "base": {"id": str(model)},
        "data": {"id": "chitchat-small", "task": "next-token", "clients": 4},
        "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]},
        "federation": {"rounds": 2, "cohort": 4, "local_steps": 4, "learning_rate": 2e-3},
        "personalization": {"steps": 8},
    }
)
run = simulate(experiment, progress=lambda stage, done, of, words: print(stage, done, of, words))
print(run.table())
print("the global adapter, for PEFT:", run.folder / "adapter")
