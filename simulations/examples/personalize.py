"""Personalize on a device, without torch: a bundle, a person's messages, an adapter of their own.

fedlora export tiny-chat --train 8x32 --out bundle      # once, where torch is
python simulations/examples/personalize.py bundle       # on the device
"""

import sys

import fedlora as fl
from fedlora.data import draw_batches, load_data
from fedlora.device import Session, Trainer
from fedlora.device.scoring import evaluate

bundle = sys.argv[1] if len(sys.argv) > 1 else "bundle"
session = Session(bundle)
trainer = Trainer(session.bundle, low_memory=True)

people = load_data(
    "chitchat-small", tokenizer=session.bundle.tokenizer(), max_length=32, test_share=0.2
)
me = people.client(people.client_ids[0])  # yours: fedlora.data.chitchat.read_text_client
before = evaluate(session, me.test)

config = fl.TrainConfig(local_steps=24, learning_rate=2e-3, batch_size=8)
batches = draw_batches(me.train, config, seed=0, client_id=me.client_id, round="personal")
trained = trainer.fit(batches, config, seed=0)
session.swap(trained.adapter)  # no reload; None is the base again
after = evaluate(session, me.test)

print(f"loss on held-out messages: {before['loss']:.4f} -> {after['loss']:.4f}")
print("next words after 'see you ':", session.suggest("see you ", k=3))
fl.save_adapter(trained.adapter, "personal.safetensors", codec="int8")
