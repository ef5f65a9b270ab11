"""On the device: a bundle served and trained with ONNX Runtime alone, without torch."""
